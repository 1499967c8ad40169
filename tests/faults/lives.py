"""Runs of a tiny model that are started, harmed and started again, each life in a process of its own.

A life is forked from a server that has imported everything, so that it begins within a second.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
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
    from v4train.parallel.topology import leave
    from v4train.train.pretrain import pretrain

    torch.set_num_threads(1)
    pretrain(settings(load(arguments)))
    if "RANK" in os.environ:
        leave()


def _be(rank: dict[str, str]) -> None:
    os.environ.update(rank)


class Life:
    """A process that trains."""

    def __init__(self, arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> None:
        self.log, self.process = log, CONTEXT.Process(target=live, args=(arguments, log, before), daemon=True)
        self.process.start()

    @classmethod
    def of_ranks(cls, ranks: int, arguments: list[str], log: Path) -> list["Life"]:
        """The ranks of one run, without torchrun, which would end the others for one that is killed."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        return [
            cls(arguments, log, partial(_be, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(ranks)
        ]

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
