"""Ends a job in which nothing has moved for too long, and leaves the stacks of all its ranks.

When one rank hangs, the others wait for it in a collective, so every rank's watch runs out, each on its own:

    <run dir>/stacks/rank-00003.txt    every thread of that rank, innermost call first

A rank that leaves no file is stopped, or its machine is gone. On a GPU a rank whose work is not done may wait in a
collective, which no Python frame shows, so only those whose GPU is idle are said to hang by themselves.
"""

import faulthandler
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch

GRACE = 10.0  # seconds in which the other ranks' watches run out too: they differ by less than a step
POLL = 0.1
SLICE = 10.0  # seconds between looks at the clock: one that takes far longer has been suspended, and counts for nothing
COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


class HangWatch:
    """Context manager; `beat` says that this rank has got on.

    Args:
        folder: of the stacks, on a file system that all ranks see.
        timeout: seconds without a beat after which the job ends with code 1; 0 for never.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self._folder, self._rank, self._world, self._timeout = folder, rank, world_size, timeout
        self._watched = threading.get_ident()
        self._ended, self._gives_up = threading.Event(), threading.Event()
        self.beat()

    def beat(self) -> None:
        self._last = time.monotonic()

    def __enter__(self) -> "HangWatch":
        if self._timeout:
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)  # of an earlier life of this run
            self.beat()
            self._thread = threading.Thread(target=self._watch, name="v4train-hang-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._gives_up.is_set():  # another rank's watch has ended that rank, and this one lost it in a collective
            self._thread.join()  # for ever: it ends the process

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(max(0.0, min(SLICE, self._last + self._timeout - before))):
            now = time.monotonic()
            if now - before > 2 * SLICE:
                self.beat()
            elif now - self._last >= self._timeout:
                self._give_up()
            before = now

    def _give_up(self) -> None:
        """Leave this rank's stacks, wait for those of the others, say what happened, end the process."""
        self._gives_up.set()
        last = threading.Timer(3 * GRACE, os._exit, (1,))  # it may be the file system that hangs
        last.daemon = True
        last.start()
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_stacks()
            end = time.monotonic() + GRACE
            while len(list(self._folder.glob("rank-*.txt"))) < self._world and time.monotonic() < end:
                time.sleep(POLL)
            if self._is_first():
                print(f"error: {self._message()}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly end would wait for the rank that hangs

    def _write_stacks(self) -> None:
        path = self._folder / f"rank-{self._rank:05d}.txt"
        with path.with_suffix(".tmp").open("w") as file:
            state = "waits for other ranks" if self._waits() else "is not waiting for other ranks"
            print(f"rank {self._rank}, process {os.getpid()}, {state}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(path.with_suffix(".tmp"), path)

    def _waits(self) -> bool:
        if torch.cuda.is_initialized() and not torch.cuda.default_stream().query():
            return True
        frames = _callers(sys._current_frames().get(self._watched))
        return any(frame.f_code.co_filename.endswith(COLLECTIVES) for frame in frames)

    def _is_first(self) -> bool:
        """Of the ranks, one speaks."""
        try:
            (self._folder / "said").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _message(self) -> str:
        heads = {path: path.read_text().partition("\n")[0] for path in sorted(self._folder.glob("rank-*.txt"))}
        ranks = {int(path.stem.removeprefix("rank-")): "not waiting" in head for path, head in heads.items()}
        silent = [rank for rank in range(self._world) if rank not in ranks]
        stuck = [rank for rank, itself in ranks.items() if itself]
        who = []
        if silent:
            who.append(f"rank {_listed(silent)} doesn't answer (stopped, or its machine is gone)")
        if stuck:
            who.append(f"rank {_listed(stuck)} hangs outside of any collective")
        return (
            f"nothing has moved for {self._timeout:g} s (train.hang_timeout), so the job ends: "
            f"{'; '.join(who) or 'all ranks wait for each other'}; the stacks of all ranks are in {self._folder}, and "
            "the same command continues from the last checkpoint"
        )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
