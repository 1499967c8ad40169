"""One lane of the global sequence of rows: every L-th row, from the lane's share of every source.

Lanes know nothing of each other, nor of ranks: a rank reads the lanes that its rows lie in, and whoever reads a lane
reads the same rows.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from v4train.data.fill_in_middle import FillInMiddle
from v4train.data.mixture import Mixture
from v4train.data.packing import (
    PACKINGS,
    Packed,
    PartlyTrained,
    Piece,
    Row,
    Window,
    build_row,
    packed,
    permutation,
    rejoined,
)
from v4train.data.streams import Stream

_ORDER = 2  # sets the order of a window's rows apart from other numbers of the window


@dataclass(frozen=True)
class RowConfig:
    """How documents become rows."""

    length: int  # tokens
    packing: str
    fim_rate: float
    fim_ids: tuple[int, ...] | None
    pad_id: int
    seed: int


@dataclass
class PackerState:
    """A place in a lane of a source: small, plain values.

    start: the stream's position before the window at hand. parts: [row length, rows taken] since then, one for each
    change of the length within the window; what was not taken is packed anew at the next length.
    """

    start: Any
    parts: list[list[int]] = field(default_factory=list)

    def copy(self) -> "PackerState":
        return PackerState(self.start, [list(part) for part in self.parts])


class Packer:
    """The rows of one lane of one source, one after the other."""

    def __init__(self, stream: Stream, config: RowConfig, state: PackerState | None = None) -> None:
        self._stream, self._config = stream, config
        if state is not None:
            stream.seek(state.start)  # for `epoch` and `left_out` until the first row
        self.state = PackerState(stream.position) if state is None else state.copy()
        if not self.state.parts or self.state.parts[-1][0] != config.length:
            self.state.parts.append([config.length, 0])
        self._windows: list[Window] = []
        self._rows: list[list[Piece]] | None = None  # that are left, the next one last; None: to be made from the state
        self._row: list[Piece] = []
        self._begun = 0.0  # epochs before the windows at hand
        self._share, self._planned = 1.0, 1  # of these windows' tokens what was packed last, and in how many rows

    @property
    def left_out(self) -> dict[str, int]:
        """Bad data among those read for the rows so far and the next few, by kind."""
        return self._stream.left_out

    @property
    def epoch(self) -> float:
        """Passes over the documents so far."""
        left = self._share * len(self._rows) / self._planned if self._rows else 0
        return self._stream.epoch - (self._stream.epoch - self._begun) * left

    def advance(self) -> bool:
        """Go on to the next row; False where the source is dry."""
        if self._rows is None:
            self._stream.seek(self.state.start)
            self._pack()
        while not self._rows:
            if self._stream.position is None:
                return False
            self.state = PackerState(self._stream.position, [[self._config.length, 0]])
            self._pack()
        self._row = self._rows.pop()
        self.state.parts[-1][1] += 1
        return True

    def build(self) -> tuple[Row, Packed]:
        """The row at hand."""
        window = _Joined(self._windows)
        row = build_row(self._row, window, self._config.length, self._config.pad_id)
        return row, packed(self._row, window.lengths, self._config.length)

    def _pack(self) -> None:
        """The rows that are left from the state on; the stream stands where it begins."""
        self._windows, self._rows, self._begun = [], None, self._stream.epoch
        rows: list[list[Piece]] = []
        for length, taken in self.state.parts:
            rows = self._packed(rejoined(piece for row in rows for piece in row), length)
            packed_last, self._planned = sum(piece.size for row in rows for piece in row), max(1, len(rows))
            del rows[len(rows) - taken :]
        self._share = packed_last / max(1, sum(int(window.lengths.sum()) for window in self._windows))
        self._rows = rows

    def _packed(self, pieces: list[Piece], length: int) -> list[list[Piece]]:
        """Rows of the pieces, and of further windows where they don't fill a row; the first one last."""
        while sum(piece.size for piece in pieces) < length and (window := self._stream.window(length)) is not None:
            if self._config.fim_rate:
                window = FillInMiddle(window, self._config.fim_rate, self._config.fim_ids, self._config.seed)
            first = sum(len(own.lengths) for own in self._windows)
            self._windows.append(window)
            pieces = pieces + [Piece(first + i, 0, size) for i, size in enumerate(window.lengths.tolist())]
        rows = PACKINGS[self._config.packing](pieces, length)
        key = self._windows[0].key if self._windows else ()
        return [rows[i] for i in permutation(len(rows), self._config.seed, *key, _ORDER)]


class _Joined:
    """Several windows as one."""

    def __init__(self, windows: list[Window]) -> None:
        self._windows, self.key = windows, windows[0].key
        self.lengths = windows[0].lengths if len(windows) == 1 else np.concatenate([own.lengths for own in windows])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        window, document = self._place(document)
        return window.tokens(document, start, stop)

    def untrained(self, document: int, start: int, stop: int) -> np.ndarray:
        window, document = self._place(document)
        if isinstance(window, PartlyTrained):
            return window.untrained(document, start, stop)
        return np.zeros(stop - start, dtype=bool)

    def _place(self, document: int) -> tuple[Window, int]:
        for window in self._windows:
            if document < len(window.lengths):
                return window, document
            document -= len(window.lengths)
        raise IndexError(document)


class LaneRow(NamedTuple):
    """A row, its number in the global sequence, and the lane's state behind it.

    digest: two numbers in [0, 2^32), of the row's number and its tokens. Their sums over rows tell whether two runs
    were trained on the same sequence.
    """

    number: int
    row: Row
    packed: Packed
    source: str
    digest: tuple[int, int]
    state: dict[str, Any]
    epochs: dict[str, float]  # passes over each source's documents in this lane so far


class LaneReader:
    """The rows of lane `number` of `count` that `owned` picks, in order, from row `first_row` of the sequence on."""

    def __init__(
        self,
        number: int,
        count: int,
        packers: dict[str, Packer],
        mixture: Mixture,
        tokens_before: Callable[[int], int],
        when_dry: str,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`tokens_before`: of a row of the sequence. `when_dry`: `stop` or `drop`."""
        self._packers, self._mixture, self._tokens_before = packers, mixture, tokens_before
        self._count, self._when_dry = count, when_dry
        self._next = number if state is None else state["next"]
        self._dry = frozenset() if state is None else frozenset(state["dry"])

    def read(self, wanted: Callable[[int], bool], first_row: int) -> LaneRow | None:
        """The next row that is wanted and not before `first_row`; None where the lane is dry."""
        while True:
            number = self._next
            source = self._mixture.choose(number, self._tokens_before(number), self._dry)
            if source is None:
                return None
            packer = self._packers[source]
            if not packer.advance():
                if self._when_dry == "stop":
                    return None
                self._dry |= {source}
                continue
            self._next = number + self._count
            if number >= first_row and wanted(number):
                row, of_row = packer.build()
                return LaneRow(number, row, of_row, source, _digest(number, row), self.state(), self._epochs())

    def state(self) -> dict[str, Any]:
        """Where the lane stands: plain values for JSON."""
        sources = {name: asdict(own.state) for name, own in self._packers.items()}
        left_out = {name: own.left_out for name, own in self._packers.items()}
        return {"next": self._next, "dry": sorted(self._dry), "sources": sources, "left_out": left_out}

    def _epochs(self) -> dict[str, float]:
        return {name: own.epoch for name, own in self._packers.items()}


def _digest(number: int, row: Row) -> tuple[int, int]:
    digest = hashlib.sha256(number.to_bytes(8) + row.input_ids.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])
