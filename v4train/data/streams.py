"""One lane of a source's documents, window after window, epoch after epoch, from any position on.

Indexed documents (tokens on disk) come in an order that is drawn anew each epoch, all of them shuffled. Streamed ones
(files read from the start) come file by file, the files shuffled each epoch, and are tokenised on the way.
"""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from v4train.data.files import DataFile
from v4train.data.packing import Window, permutation, shuffled
from v4train.data.problems import Problems
from v4train.data.records import Reading, read_records
from v4train.data.shards import document_hash, held_out
from v4train.data.tokenizer import Tokenizer
from v4train.errors import ConfigError

LEAST_ROWS = 16  # of a window, unless the epoch ends: the last row is padded
WINDOW_DOCUMENTS = 4096  # indexed: only lengths are held
WINDOW_ROWS, LARGE_WINDOW = 64, 1 << 22  # streamed: rows of a window; tokens that LEAST_ROWS are enough for
_ENCODED = 1 << 18  # characters tokenised at a time

Position = list[Any]  # of the next document: plain values for JSON
START = [0, 0, None, {}]  # of streamed documents


class Documents(Protocol):
    """Tokenised documents with random access."""

    num_documents: int

    def lengths(self, documents: np.ndarray) -> np.ndarray: ...

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray: ...

    def trained(self, documents: np.ndarray) -> np.ndarray:
        """Which of these documents aren't held out: bool."""


@dataclass(frozen=True)
class Lane:
    """Which of `count` equal parts of a source, and what orders it."""

    number: int
    count: int
    seed: int
    source: int  # a number that sets the source apart from others of the same seed


class Stream(Protocol):
    position: Position | None  # None: dry
    left_out: dict[str, int]  # bad data before the position, by kind

    def seek(self, position: Position | None) -> None: ...

    def window(self, length: int) -> Window | None:
        """The next documents, for rows of `length`; None where the source is dry."""

    @property
    def epoch(self) -> float:
        """Passes over the documents so far."""


@dataclass
class _Indexed:
    key: tuple[int, ...]
    documents: Documents
    numbers: np.ndarray
    lengths: np.ndarray

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.documents.tokens(int(self.numbers[document]), start, stop)


class IndexedStream:
    """Position: [epoch, documents of the epoch before it, over all lanes]."""

    def __init__(self, documents: Documents, lane: Lane, epochs: int | None) -> None:
        self._documents, self._lane, self._epochs = documents, lane, epochs
        self.position: Position | None = [0, lane.number]
        self.left_out: dict[str, int] = {}

    def seek(self, position: Position | None) -> None:
        self.position = position

    def window(self, length: int) -> Window | None:
        lane, count = self._lane, self._documents.num_documents
        while self.position is not None:
            epoch, first = self.position
            place, size, numbers, lengths = first, 0, [], []
            while place < count and size < LEAST_ROWS * length:
                places = np.arange(place, min(place + WINDOW_DOCUMENTS * lane.count, count), lane.count, dtype=np.int64)
                found = shuffled(places, count, lane.seed, lane.source, epoch)
                numbers.append(found[self._documents.trained(found)])
                lengths.append(self._documents.lengths(numbers[-1]))
                size += int(lengths[-1].sum())
                place = int(places[-1]) + lane.count
            self._advance(epoch, place)
            if size:
                key = lane.source, epoch, first
                return _Indexed(key, self._documents, np.concatenate(numbers), np.concatenate(lengths))
        return None

    def _advance(self, epoch: int, place: int) -> None:
        if place < self._documents.num_documents:
            self.position = [epoch, place]
        else:
            self.position = None if epoch + 1 == self._epochs else [epoch + 1, self._lane.number]

    @property
    def epoch(self) -> float:
        if self.position is None:
            return float(self._epochs)
        return self.position[0] + self.position[1] / self._documents.num_documents


@dataclass
class _Tokenised:
    key: tuple[int, ...]
    documents: list[np.ndarray]
    lengths: np.ndarray

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.documents[document][start:stop]


class _LaneProblems:
    """Problems of a source, counted for one lane."""

    def __init__(self, problems: Problems) -> None:
        self._problems, self.counts = problems, Counter()

    def report(self, kind: str, *where: Any) -> None:
        self._problems.report(kind, *where)
        self.counts[kind] += 1


class TextStream:
    """Position: [epoch, file of the epoch's order, position in it of `read_records` or None, what was left out].

    With as many files as lanes or more each lane has files of its own; with fewer, each reads all files and keeps its
    share of the records.
    """

    def __init__(
        self,
        files: list[DataFile],
        reading: Reading,
        tokenizer: Tokenizer,
        validation_fraction: float,
        lane: Lane,
        epochs: int | None,
    ) -> None:
        self._files, self._tokenizer, self._problems = files, tokenizer, _LaneProblems(reading.problems)
        self._reading = replace(reading, problems=self._problems)
        self._fraction, self._lane, self._epochs = validation_fraction, lane, epochs
        self._shared = len(files) < lane.count
        self._num_own = len(files if self._shared else files[lane.number :: lane.count])
        self._texts = self._read(None)
        self.seek(START)

    def seek(self, position: Position | None) -> None:
        self.position = position
        self.left_out = dict(position[-1]) if position else {}
        self._problems.counts = Counter(self.left_out)
        self._ready: deque[tuple[np.ndarray, Position | None]] = deque()  # documents, each with the position after it
        self._texts.close()
        self._texts = self._read(position)

    def window(self, length: int) -> Window | None:
        if self.position is None:
            return None
        wanted = min(WINDOW_ROWS * length, max(LARGE_WINDOW, LEAST_ROWS * length))
        if self.position == START:  # so that the lanes' windows don't all end at once
            wanted = max(1, wanted * (self._lane.number + 1) // self._lane.count)
        key, documents, size = self._key(), [], 0
        while size < wanted and self._fill():
            document, after = self._ready[0]
            if documents and after[0] != self.position[0]:
                break  # an epoch ends with a window
            self._ready.popleft()
            documents.append(document)
            self.position, self.left_out = after, after[-1]
            size += len(document)
        if documents:
            return _Tokenised(key, documents, np.array([len(document) for document in documents]))
        return None

    @property
    def epoch(self) -> float:
        if self.position is None:
            return float(self._epochs)
        return self.position[0] + self.position[1] / self._num_own

    def _fill(self) -> bool:
        """See to it that a document is ready; whether there is one before the end."""
        if self._ready:
            return True
        texts, positions, size = [], [], 0
        for text, after in self._texts:
            texts.append(text)
            positions.append(after)
            size += len(text)
            if size >= _ENCODED:
                break
        if not texts:
            self.position, self.left_out = None, dict(self._problems.counts)
        ends = [self._tokenizer.bos_id], [self._tokenizer.eos_id]
        dtype = np.uint16 if self._tokenizer.vocab_size <= 1 << 16 else np.uint32
        for ids, after in zip(self._tokenizer.encode_batch(texts), positions, strict=True):
            self._ready.append((np.concatenate([ends[0], ids, ends[1]]).astype(dtype), after))
        return bool(texts)

    def _read(self, position: Position | None) -> Iterator[tuple[str, Position | None]]:
        """Texts that aren't held out, each with the position after it, from `position` on."""
        if position is None:
            return
        epoch, place, inside, _ = position
        whole = place == 0 and inside is None
        while epoch != self._epochs:
            found, files = False, self._own(epoch)
            for number in range(place, len(files)):
                lane = (self._lane.number, self._lane.count) if self._shared else (0, 1)
                with closing(read_records(files[number], self._reading, inside, *lane)) as records:
                    for text, after in records:
                        if not held_out(document_hash(text), self._fraction):
                            found = True
                            yield text, [epoch, number, after, dict(self._problems.counts)]
                inside = None
            if whole and not found:
                rule = f"no document to train on among those of lane {self._lane.number} of {self._lane.count}"
                raise ConfigError("data.lanes", self._lane.count, rule, "use fewer lanes, or more data")
            epoch, place, whole = epoch + 1, 0, True

    def _own(self, epoch: int) -> list[DataFile]:
        """This lane's files in the epoch's order."""
        order = permutation(len(self._files), self._lane.seed, self._lane.source, epoch)
        return [self._files[i] for i in (order if self._shared else order[self._lane.number :: self._lane.count])]

    def _key(self) -> tuple[int, ...]:
        epoch, place, inside, _ = self.position
        return self._lane.source, self._lane.number, epoch, place, *(inside or [0])
