"""Runs of a tiny model that are started, harmed and started again, each life in a process of its own.

A life is forked from a server that has imported everything, so that it begins within a second.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.runs import tiny

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.warm"])
LIMIT = 120  # seconds that a life may take


def overrides(base: Path, name: str, *more: str) -> list[str]:
    return tiny(base, name, "checkpoint.every=1", "checkpoint.keep=3", *more)


def live(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> None:
    """What a life does. before: called first, in its process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if before is not None:
        before()
    import torch

    from v4train.config import load, settings
    from v4train.train.pretrain import pretrain

    torch.set_num_threads(1)
    pretrain(settings(load(arguments)))


class Life:
    """A process that trains."""

    def __init__(self, arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> None:
        self.log, self.process = log, CONTEXT.Process(target=live, args=(arguments, log, before), daemon=True)
        self.process.start()

    def end(self) -> int:
        """Wait for it; its exit code, negative for a signal's."""
        self.process.join(LIMIT)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still alive after {LIMIT} s:\n{self.log.read_text()[-3000:]}")
        return self.process.exitcode

    def kill_when(self, ready: Callable[[], bool]) -> bool:
        """SIGKILL as soon as it is ready; False if it ended before."""
        end = time.monotonic() + LIMIT
        while self.process.is_alive() and time.monotonic() < end:
            if ready():
                self.process.kill()
                self.process.join()
                return self.process.exitcode == -9
            time.sleep(0.0005)
        return False
