"""`<run dir>/heartbeat.json`: when the run was last alive, and where it was, for a watchdog outside to read.

    {"time": 1767225600.0, "step": 120, "doing": "training", "pid": 4711, "host": "node3", "world_size": 16}

`time` counts seconds since 1970. `doing` is starting, training, validating, evaluating, saving, finishing, or how the
run ended: finished (it wants nothing more), stopped (it wants to be started again) or failed.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

EVERY = 1.0  # seconds between two writes, at least: a file system shared by many jobs shall not notice


class Heartbeat:
    """Writes the file; on another rank than 0 it does nothing."""

    def __init__(self, path: Path, rank: int, world_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = (path if rank == 0 else None), clock
        self._who = {"pid": os.getpid(), "host": socket.gethostname(), "world_size": world_size}
        self._last: tuple[str, float] | None = None

    def beat(self, step: int, doing: str) -> None:
        """Say so, unless the same was said less than a second ago. A disk that is full is no reason to end."""
        now = self._clock()
        if self._path is None or (self._last and self._last[0] == doing and now - self._last[1] < EVERY):
            return
        self._last = doing, now
        temporary = self._path.with_suffix(".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps({"time": time.time(), "step": step, "doing": doing, **self._who}) + "\n")
            os.replace(temporary, self._path)  # a reader sees the old one or the new one
