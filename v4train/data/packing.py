"""Documents to rows of S tokens. Best fit cuts no document that fits in a row, and pads little (arXiv 2404.10830).

A window is a bounded number of documents that are packed together; its rows are a function of nothing else, so that a
place in the data is a window and a row of it. Legend: D documents of the window, S row length.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

IGNORED_TARGET = -100
PADDING_DOCUMENT = -1
MOST_PADDING = 0.005  # of a window's tokens; where best fit leaves more, its emptiest rows are joined end to end


class Row(NamedTuple):
    """int64 [S] each. targets: the next token, IGNORED_TARGET where it belongs to another document or isn't there."""

    input_ids: np.ndarray
    document_ids: np.ndarray  # number of the piece in the row; PADDING_DOCUMENT behind the last
    targets: np.ndarray


class Piece(NamedTuple):
    """Tokens [start, stop) of one document of a window."""

    document: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Window(Protocol):
    """Documents in order."""

    key: tuple[int, ...]  # integers >= 0 that say where the window lies: what is drawn for it is drawn from them
    lengths: np.ndarray  # int64 [D]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, cut at its end."""


@runtime_checkable
class PartlyTrained(Protocol):
    """A window some of whose tokens are no targets."""

    def untrained(self, document: int, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) of a document aren't: bool [stop - start]."""


def best_fit(pieces: Iterable[Piece], length: int) -> list[list[Piece]]:
    """Rows of at most `length` tokens. A piece longer than a row fills rows of its own; its rest counts as a piece.

    The longest pieces go first, each into the fullest row that has room.
    """
    rows, rest = [], []
    for document, start, stop in pieces:
        for first in range(start, stop - length + 1, length):
            rows.append([Piece(document, first, first + length)])
        if (stop - start) % length:
            rest.append(Piece(document, stop - (stop - start) % length, stop))
    rest.sort(key=lambda piece: -piece.size)
    room: dict[int, list[list[Piece]]] = {}  # rows by the tokens that they have room for
    sizes = 0  # bit n is set where there are such of n tokens
    for piece in rest:
        enough = sizes >> piece.size
        space = piece.size + (enough & -enough).bit_length() - 1 if enough else length
        row = room[space].pop() if enough else []
        if enough and not room[space]:
            sizes ^= 1 << space
        row.append(piece)
        if not enough:
            rows.append(row)
        if left := space - piece.size:
            room.setdefault(left, []).append(row)
            sizes |= 1 << left
    return _without_gaps(rows, length)


def _without_gaps(rows: list[list[Piece]], length: int) -> list[list[Piece]]:
    """The rows, as few of the emptiest as it takes joined end to end where more than MOST_PADDING would be padded."""
    fills = [sum(piece.size for piece in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: fills[number])
    fewest, enough = -(-sum(fills) // length), int(sum(fills) / (length * (1 - MOST_PADDING)))
    surplus = len(rows) - max(fewest, enough)
    count = pooled = 0
    while count - -(-pooled // length) < surplus:
        pooled += fills[order[count]]
        count += 1
    emptiest = set(order[:count])
    kept = [row for number, row in enumerate(rows) if number not in emptiest]
    return kept + concatenate((piece for number in order[:count] for piece in rows[number]), length)


def concatenate(pieces: Iterable[Piece], length: int) -> list[list[Piece]]:
    """Rows of `length` tokens from the pieces end to end, cut wherever a row ends; the last one may be shorter."""
    rows: list[list[Piece]] = []
    room = 0
    for document, start, stop in pieces:
        while start < stop:
            if room == 0:
                rows.append([])
                room = length
            size = min(room, stop - start)
            rows[-1].append(Piece(document, start, start + size))
            start, room = start + size, room - size
    return rows


def rejoined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces in the order of their documents, those that follow on one another made one."""
    joined: list[Piece] = []
    for piece in sorted(pieces):
        if joined and joined[-1].document == piece.document and joined[-1].stop == piece.start:
            piece = Piece(piece.document, joined.pop().start, piece.stop)
        joined.append(piece)
    return joined


PACKINGS: dict[str, Callable[[Iterable[Piece], int], list[list[Piece]]]] = {
    "best_fit": best_fit,
    "concatenate": concatenate,
}


def build_row(pieces: Sequence[Piece], window: Window, length: int, pad_id: int) -> Row:
    """The row, padded with `pad_id`. The last token of a piece has the document's next one as its target."""
    untrained = window.untrained if isinstance(window, PartlyTrained) else None
    input_ids = np.full(length, pad_id, dtype=np.int64)
    document_ids = np.full(length, PADDING_DOCUMENT, dtype=np.int64)
    targets = np.full(length, IGNORED_TARGET, dtype=np.int64)
    at = 0
    for number, (document, start, stop) in enumerate(pieces):
        tokens, size = window.tokens(document, start, stop + 1), stop - start
        input_ids[at : at + size] = tokens[:size]
        document_ids[at : at + size] = number
        own = targets[at : at + len(tokens) - 1]
        own[:] = tokens[1:]
        if untrained is not None:
            own[untrained(document, start + 1, start + len(tokens))] = IGNORED_TARGET
        at += size
    return Row(input_ids, document_ids, targets)


class Packed(NamedTuple):
    """What packing did, summed over rows: counts that add up."""

    tokens: int  # of documents
    padding: int
    documents: int  # that begin in these rows
    fitting: int  # of them no longer than a row
    truncated: int  # of `fitting`, cut nevertheless


def packed(pieces: Sequence[Piece], lengths: np.ndarray, length: int) -> Packed:
    """Of one row."""
    tokens = sum(piece.size for piece in pieces)
    begun = [piece for piece in pieces if piece.start == 0]
    fitting = [piece for piece in begun if lengths[piece.document] <= length]
    truncated = sum(piece.size < lengths[piece.document] for piece in fitting)
    return Packed(tokens, length - tokens, len(begun), len(fitting), truncated)


def permutation(count: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation drawn from `key` (integers >= 0).

    Sorting raw PCG64 output, not `Generator.permutation`: NumPy promises that raw streams never change (NEP 19), and a
    run resumed under another NumPy must go on with the same order.
    """
    return np.argsort(raw_numbers(count, *key), kind="stable")


def raw_numbers(count: int, *key: int) -> np.ndarray:
    """uint64 [count], drawn from `key`."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


_ROUNDS = 6


def shuffled(index: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Where a permutation of `count` numbers, drawn from `key`, puts each of `index` (int64 in [0, count)).

    In O(1) memory and O(len(index)) time: a Feistel network on the next power of four, walked until it is inside.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = raw_numbers(_ROUNDS, *key)

    def step(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for own in keys:
            left, right = right, left ^ (_mixed(right + own) & low)
        return (left << half) | right

    result = step(index.astype(np.uint64))
    while (outside := np.flatnonzero(result >= count)).size:
        result[outside] = step(result[outside])
    return result.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
