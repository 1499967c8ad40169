"""What asks a run to stop at the next step edge: SIGTERM, SIGUSR1, SIGHUP, SIGINT, or the end of its time.

A second signal ends the process at once.
"""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
REQUEUE = 75  # exit code of a run that has saved and wants to be started again (EX_TEMPFAIL)
ECHO = 0.2  # seconds within which a signal that comes again is the same one: a terminal and torchrun both send it


class StopRequest:
    """Context manager that turns signals into a flag; `requested` is this rank's, to be agreed on with the others."""

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline`: on the clock of `time.monotonic`."""
        self._deadline = deadline
        self._noted: float | None = None  # when the first signal came
        self._previous: dict[int, object] = {}

    @property
    def signalled(self) -> bool:
        return self._noted is not None

    @property
    def requested(self) -> bool:
        return self.signalled or (self._deadline is not None and time.monotonic() >= self._deadline)

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is not None and now - self._noted > ECHO:
            os._exit(128 + number)
        self._noted = self._noted or now
