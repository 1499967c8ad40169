"""What asks a run to stop at the next step edge: SIGTERM, SIGUSR1, SIGHUP, SIGINT, or the end of its time.

A second signal ends the process at once, wherever it is.
"""

import os
import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SPIKED = 76  # exit code of a run that spikes again and again (spike_guard.py), and has saved
REQUEUE = 75  # exit code of a run that has saved and wants to be started again (EX_TEMPFAIL)
ECHO = 0.2  # seconds within which a signal that comes again is the same one: a terminal and torchrun both send it


class StopRequest:
    """Context manager that turns signals into a flag; `requested` is this rank's, to be agreed on with the others.

    A thread reads what the interpreter notes of each signal the moment it comes: a handler runs only between two steps
    of the interpreter, and a collective that never returns is one of them.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline`: on the clock of `time.monotonic`."""
        self._deadline = deadline
        self._noted: tuple[int, float] | None = None  # the first signal, and when it came
        self._previous: dict[int, object] = {}

    @property
    def signalled(self) -> bool:
        return self._noted is not None

    @property
    def requested(self) -> bool:
        return self.signalled or (self._deadline is not None and time.monotonic() >= self._deadline)

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, name="v4train-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write)  # ends the thread

    def _watch(self) -> None:
        while numbers := os.read(self._read, 16):
            for number in set(numbers) & set(SIGNALS):
                self._note(number)
        os.close(self._read)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._noted is None:
            self._noted = number, now
        elif number != self._noted[0] or now - self._noted[1] > ECHO:
            os._exit(128 + number)
