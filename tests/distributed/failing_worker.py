"""A run whose rank 1 fails in its fourth step: for torchrun, with overrides as arguments."""

import sys

from v4train.config import load, settings
from v4train.parallel.engine import Engine
from v4train.train.pretrain import pretrain

LAST = 3  # steps that come to an end
train = Engine.train
steps = 0


def failing_train(self: Engine, batches):
    global steps
    steps += 1
    if self.topology.rank == 1 and steps > LAST:
        raise RuntimeError("a fault of rank 1")
    return train(self, batches)


if __name__ == "__main__":
    Engine.train = failing_train
    pretrain(settings(load(sys.argv[1:])))
