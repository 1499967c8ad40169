"""When a run's checkpoints are written: begun while training goes on, tried again, waited for at the end."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from v4train.train.checkpoint import CheckpointConfig
from v4train.train.checkpoint_writer import CheckpointWriter, Parameters

RETRY_SECONDS = 30  # until a checkpoint that couldn't be written is tried again, if none is due before
LAST_WRITE = 5  # seconds that a run which ends with an error gives to a checkpoint that is being written
FINAL_PAUSES = (0, 2, 4, 8, 16)  # seconds before each attempt to write the last one

logger = logging.getLogger("v4train")


class Saving:
    """One run's checkpoints. Every rank has one and calls its methods at the same steps.

    As a context it covers the training: where that ends with an error, the checkpoint that is being written is still
    worth having.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, rank: int) -> None:
        self.folder, self._rank = folder, rank
        self.writer = CheckpointWriter(folder, config.keep, config.keep_every)
        self.last: int | None = None  # step of the last checkpoint, begun or restored
        self.retry = False  # agreed on by all ranks: one that failed is due again
        self._retry_at = math.inf  # on rank 0's clock

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # perhaps of this rank alone, so that nothing can be agreed on
            self.writer.join(LAST_WRITE)

    def flags(self) -> dict[str, bool]:
        """What this rank knows, to be agreed on at each step: any rank's yes is everybody's."""
        return {
            "write_failed": self.writer.failed,
            "write_again": self._rank == 0 and time.monotonic() >= self._retry_at,
        }

    def agreed(self, flags: dict[str, bool]) -> None:
        """What `flags` has come to over all ranks. Every rank must call it."""
        self.retry = flags["write_again"]
        if flags["write_failed"]:
            self.settle()

    def begin(self, step: int, parameters: Parameters, buffers: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint (`CheckpointWriter.start`), as soon as the one before is written."""
        self.settle()
        self.writer.start(step, parameters, buffers, state)
        self.last, self._retry_at = step, math.inf

    def settle(self) -> str | None:
        """Wait for the checkpoint that is being written; if it failed say so, and why."""
        problem = self.writer.settle()
        if problem is not None:
            self.last, self._retry_at = None, time.monotonic() + RETRY_SECONDS
            if self._rank == 0:
                logger.warning("a checkpoint can't be written (%s): it is tried again", problem)
        return problem

    def finish(self, step: int, save: Callable[[], None]) -> tuple[Path, str | None]:
        """Have a checkpoint of this step on disk, which `save` begins: tried again for half a minute.

        Returns its folder and why it is not there, or None.
        """
        problem = self.settle() if self.last == step else "not begun"
        for pause in FINAL_PAUSES:
            if problem is None:
                break
            time.sleep(pause)
            save()
            problem = self.settle()
        return self.folder / f"step_{step:08d}", problem
