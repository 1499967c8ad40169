"""How long work shows that it goes on: a bar on a terminal, a plain line in the log now and then elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator

from rich import progress
from rich.console import Console

logger = logging.getLogger("v4train")

PLAIN_LINE_SECONDS = 30.0  # a job's output file shows life at least this often
DRAWN = {"drawn": True}  # `extra` of a record that the terminal already shows in a better form

console = Console()


def on_terminal() -> bool:
    """Not rich's own answer, which FORCE_COLOR and the like change: a file must never get control characters."""
    return sys.stdout.isatty() and not console.is_dumb_terminal


def format_duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or "3d 04:05:06"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Work:
    """Progress of work around training, as a context manager.

    Every `PLAIN_LINE_SECONDS` a line is logged, by a thread, so that a call which doesn't come back for long shows life
    too; what is done before that says nothing. On a terminal these lines go to log.txt only, and a bar shows the state.
    Where the `v4train` logger is not set up to tell (other ranks, a program that uses the library) there is neither.

    Args:
        what: what is being done.
        total_bytes: how much text there is; None where that is unknown, or the work isn't one on text.
    """

    def __init__(self, what: str, total_bytes: int | None = None) -> None:
        self._what, self._total, self._done = what, total_bytes, 0
        self._ended = threading.Event()

    def __enter__(self) -> "Work":
        self._started = time.monotonic()
        self._bar = self._thread = None
        if not logger.isEnabledFor(logging.INFO):
            return self
        if on_terminal():
            self._bar = _make_bar()
            self._task = self._bar.add_task(self._what, total=self._total, amount="")
            self._bar.start()
        self._thread = threading.Thread(target=self._speak, name="v4train-work", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
        if self._bar:
            self._bar.stop()

    def advance(self, done_bytes: int) -> None:
        """So many more bytes of text are done."""
        self._done += done_bytes
        if self._bar:
            self._bar.update(self._task, completed=self._done if self._total else 0, amount=self._amount())

    def counted(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, each counted as it is taken."""
        for text in texts:
            self.advance(len(text.encode()))
            yield text

    def _amount(self) -> str:
        of = f" of {self._total / 1e6:,.1f}" if self._total else ""
        return f"{self._done / 1e6:,.1f}{of} MB" if self._done or self._total else ""

    def _speak(self) -> None:
        while not self._ended.wait(PLAIN_LINE_SECONDS):
            seconds = time.monotonic() - self._started
            parts = [part for part in (self._amount(), format_duration(seconds)) if part]
            if self._total and self._done:
                parts.append(f"ETA {format_duration(seconds * (self._total - self._done) / self._done)}")
            logger.info("%s: %s", self._what, ", ".join(parts), extra=DRAWN if self._bar else {})


def _make_bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None),  # moves to and fro where the total is unknown
        progress.TextColumn("{task.fields[amount]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        expand=True,
        transient=True,
    )
