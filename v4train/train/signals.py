"""SIGINT, SIGTERM and SIGHUP ask a run to stop at the next step edge; a second SIGINT stops it at once."""

import signal
from types import FrameType


class StopRequest:
    """Context manager that turns signals into a flag; `requested` is this rank's, to be agreed on with the others."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Schedulers and torchrun may repeat a SIGTERM; a second SIGINT is the user's impatience.
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
