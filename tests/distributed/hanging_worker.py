"""A run whose rank 1 is slow and, in its fifth step, comes no further: for torchrun, with overrides as arguments."""

import sys
import threading
import time

from v4train.config import load, settings
from v4train.parallel.engine import Engine
from v4train.train.pretrain import pretrain

SLOW = 1.0  # seconds that rank 1 works longer in each step: much longer than a busy machine may hold the other up
LAST = 4  # steps that come to an end
train = Engine.train
steps = 0


def comes_no_further() -> None:
    threading.Event().wait()


def slow_train(self: Engine, batches):
    global steps
    steps += 1
    if self.topology.rank == 1:
        end = time.monotonic() + SLOW
        while time.monotonic() < end:
            pass
        if steps > LAST:
            comes_no_further()
    return train(self, batches)


if __name__ == "__main__":
    Engine.train = slow_train
    pretrain(settings(load(sys.argv[1:])))
