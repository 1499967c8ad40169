"""What a run says while it trains: a table at the start, a progress bar on a terminal, plain lines elsewhere.

Everything goes through the `v4train` logger, so that log.txt has it all. On a terminal some of it is drawn as well (the
table, the bar); such a record is marked as drawn and only log.txt takes it.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box, progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from v4train.terminal import DRAWN, PLAIN_LINE_SECONDS, console, format_duration, on_terminal

logger = logging.getLogger("v4train")


def setup_logging(run_dir: str | Path | None, rank: int) -> None:
    """Point the `v4train` logger of this process somewhere; called again, it replaces what it set up before.

    Rank 0 writes everything to standard output and to `<run_dir>/log.txt`, appending, with what it said while there was
    no folder yet; the others only warnings and errors, to standard error.
    """
    early = [record for handler in logger.handlers if isinstance(handler, _Kept) for record in handler.records]
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False  # Hydra and other libraries give the root logger handlers: no line twice
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if rank != 0:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"rank {rank}: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        return
    logger.addHandler(_ConsoleHandler())
    if run_dir is None:
        logger.addHandler(_Kept())
        return
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    log_file = _LogFile(Path(run_dir) / "log.txt", encoding="utf-8")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(log_file)
    for record in early:
        log_file.handle(record)


def start_table(rows: list[tuple[str, str]], title: str) -> None:
    """Show the settings of a run, one (name, value) a row."""
    width = max((len(name) for name, _ in rows), default=0)
    if on_terminal():
        table = Table(title=title, box=box.SIMPLE, show_header=False, title_style="bold", title_justify="left")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        console.print(table)
    for line in (title, *(f"  {name:<{width}}  {value}" for name, value in rows)):
        logger.info("%s", line, extra=DRAWN if on_terminal() else {})


class Progress:
    """Progress of a run, as a context manager around its loop; one without `rank == 0` shows nothing.

    A plain line is logged at the first step, at every tenth of the run, at the end and every `PLAIN_LINE_SECONDS`; on a
    terminal these go to log.txt only and a bar shows the current step.

    Args:
        total_steps: the step at which the run ends.
        start_step: the step already done, from a checkpoint; 0 for a new run.
        rank: the global rank.
        clock: seconds, monotonic.
    """

    def __init__(
        self, total_steps: int, start_step: int, rank: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps = total_steps
        self._enabled = rank == 0
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first update: its own duration is start-up
        self._last_line: tuple[int, float] = (start_step, clock())
        self._bar = _make_bar() if self._enabled and on_terminal() else None
        if self._bar:
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, figures="", eta="--:--")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, **others: float) -> None:
        """Report a finished step; `others` (lr=..., grad_norm=...) appear in the plain lines only."""
        if not self._enabled:
            return
        now = self._clock()
        eta = self._eta(step, now)
        if self._bar:
            figures = f"loss {loss:.4f}  {tokens_per_second:,.0f} tok/s"
            self._bar.update(self._task, completed=step, figures=figures, eta=eta)
        if self._line_is_due(step, now):
            width = len(str(self.total_steps))
            figures = "".join(f"  {name} {value:.3g}" for name, value in others.items())
            logger.info(
                f"step {step:>{width}}/{self.total_steps}  loss {loss:.4f}{figures}"
                f"  {tokens_per_second:,.0f} tok/s  ETA {eta}",
                extra=DRAWN if self._bar else {},
            )
            self._last_line = (step, now)

    def note(self, text: str) -> None:
        """Say something once, above the bar: a validation result, a checkpoint."""
        if self._enabled:
            logger.info("%s", text)

    def _eta(self, step: int, now: float) -> str:
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step >= self.total_steps:
            return format_duration(0)
        if step == first_step:
            return "--:--"
        return format_duration((now - first_time) / (step - first_step) * (self.total_steps - step))

    def _line_is_due(self, step: int, now: float) -> bool:
        last_step, last_time = self._last_line
        new_tenth = step * 10 // self.total_steps > last_step * 10 // self.total_steps
        is_first = self._first is not None and self._first == (step, now)
        return is_first or new_tenth or step >= self.total_steps or now - last_time >= PLAIN_LINE_SECONDS


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """For a program whose work has parts of unknown length: gives what says which one begins.

    On a terminal a spinner shows it, elsewhere it is a line; both on standard error.
    """
    errors = Console(stderr=True)
    if not sys.stderr.isatty() or errors.is_dumb_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with errors.status("") as status:
        yield lambda text: status.update(Text(text))


class _LogFile(logging.FileHandler):
    """What a full disk doesn't take is on the console all the same."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Kept(logging.Handler):
    """The last records, for a file that there is no folder for yet."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _ConsoleHandler(logging.Handler):
    """Standard output: above the bar on a terminal, plain text elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "drawn", False):
            return
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            if on_terminal():
                style = (
                    "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else ""
                )
                console.print(Text(text, style=style), soft_wrap=True)
            else:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
        except Exception:
            self.handleError(record)


def _make_bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        progress.BarColumn(bar_width=None),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[figures]}", markup=False),
        progress.TextColumn("ETA {task.fields[eta]}", style="cyan"),
        console=console,
        expand=True,
    )
