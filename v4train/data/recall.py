"""Key-value recall at chosen distances among real text: what a context is remembered by, and a task to train on.

A statement is a few tokens of text, a key and a value. Each pair is stated twice in a row of real text; the second
time, the value can be told from the first statement alone:

    BOS  text ...  \\n @ KEY VALUE  text ... text  \\n @ KEY VALUE  text ...
                           |<------ distance ------->|

Everything is a function of (seed, row number), the tokenizer, and the documents that give the text: the same on any
machine and any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from v4train.data.packing import Row, permutation, raw_numbers
from v4train.data.streams import Documents
from v4train.data.tokenizer import Tokenizer
from v4train.errors import ConfigError

OPENING = "\n@"  # text of a statement before the key
NEAREST = 32  # of the distances that are chosen where none is given
_ATTEMPTS = 64  # to find room for a pair; one that finds none is left out
_ROLES, _ROW = 0, 1  # what is drawn, part of the key that it is drawn from


@dataclass
class RecallConfig:
    """distances: tokens from a value to its repetition. pairs: tried per row. keys, values: how many different ones."""

    distances: list[int]
    pairs: int
    keys: int
    values: int
    key: str  # what the names of these begin with where the user gives them

    def __post_init__(self) -> None:
        for name in ("pairs", "keys", "values"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.key}{name}", getattr(self, name), "at least 1", "for example 4")
        if any(distance < 1 for distance in self.distances):
            raise ConfigError(f"{self.key}distances", self.distances, "each is at least 1", "for example [32,64]")
        if self.pairs > self.keys:
            rule = f"a row's keys differ, and there are {self.key}keys={self.keys}"
            raise ConfigError(f"{self.key}pairs", self.pairs, rule, f"at most {self.keys}")


class RecallRow(NamedTuple):
    """A row of one document, targets everywhere, and where they are to be recalled from.

    distances: int64 [S], of the target of each token if it is a repeated value, else 0.
    """

    row: Row
    distances: np.ndarray


def default_distances(length: int, statement: int) -> list[int]:
    """32, 64, 128, ... as far as a row of `length` tokens has room for two statements."""
    distances, distance = [], NEAREST
    while distance <= length - 1 - statement:
        distances.append(distance)
        distance *= 2
    return distances


def statement_width(tokenizer: Tokenizer) -> int:
    """Tokens of a statement."""
    return len(tokenizer.encode(OPENING)) + 2


class RecallTask:
    """Rows of `length` tokens whose text comes from `documents` (each BOS ... EOS), drawn at random.

    Raises ConfigError: a vocabulary without enough tokens for keys and values, or distances that don't fit.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        *,
        distances: list[int] | None,
        pairs: int,
        keys: int,
        values: int,
        key: str = "recall_",
    ) -> None:
        self.documents, self.tokenizer, self.length, self.seed = documents, tokenizer, length, seed
        self.opening = tokenizer.encode(OPENING)
        self.statement = statement_width(tokenizer)
        distances = default_distances(length, self.statement) if distances is None else distances
        self.config = RecallConfig(distances, pairs, keys, values, key)
        farthest = length - 1 - self.statement
        if not distances or not all(self.statement <= distance <= farthest for distance in distances):
            rule = f"each must lie between {self.statement} (a statement's tokens) and {farthest} (the context's end)"
            raise ConfigError(f"{key}distances", distances, rule, "change them, or the sequence length")
        usable = np.setdiff1d(np.flatnonzero(tokenizer.bytes_per_token), self.opening)
        if len(usable) < keys + values:
            rule = f"the tokenizer has {len(usable)} ordinary tokens, and keys and values need {keys + values}"
            raise ConfigError(f"{key}values", values, rule, "ask for fewer keys and values")
        drawn = usable[permutation(len(usable), seed, _ROLES)[: keys + values]]
        self.keys, self.values = drawn[:keys], drawn[keys:]

    def row(self, number: int) -> RecallRow:
        """Row `number` >= 0. Pair i of all rows has the i-th distance, over and over."""
        draw = self._draws(number)
        pairs, statement = self.config.pairs, self.statement
        tokens = self._text(draw)  # one more than a row, for the last target
        places, distances = np.zeros(len(tokens), dtype=bool), np.zeros(self.length, dtype=np.int64)
        order = permutation(len(self.keys), self.seed, _ROW, number)
        for i in range(pairs):
            distance = self.config.distances[(number * pairs + i) % len(self.config.distances)]
            stated = np.concatenate([self.opening, [self.keys[order[i]], self.values[next(draw) % len(self.values)]]])
            for _ in range(_ATTEMPTS):
                first = 1 + next(draw) % (self.length - statement - distance)
                both = [slice(start, start + statement) for start in (first, first + distance)]
                if not any(places[place].any() for place in both):
                    break
            else:
                continue
            for place in both:
                tokens[place], places[place] = stated, True
            distances[both[1].stop - 2] = distance  # where the key stands, whose target is the value
        document = np.zeros(self.length, dtype=np.int64)
        return RecallRow(Row(tokens[:-1], document, tokens[1:].copy()), distances)

    def _draws(self, number: int) -> Iterator[int]:
        """Raw numbers without end, whatever NumPy's version (NEP 19)."""
        block = 0
        while True:
            yield from map(int, raw_numbers(256, self.seed, _ROW, number, block))
            block += 1

    def _text(self, draw: Iterator[int]) -> np.ndarray:
        """int64 [length + 1]: BOS, then documents drawn at random, without their own BOS and EOS, from a place in the
        first on."""
        found, size = [np.array([self.tokenizer.bos_id])], 1
        while size <= self.length:
            if len(found) > 2 * self.length:
                raise ConfigError("data", "documents", "next to none of them has any text", "use documents that have")
            document = next(draw) % self.documents.num_documents
            inside = int(self.documents.lengths(np.array([document]))[0]) - 1
            first = 1 + next(draw) % max(1, inside - 1) if len(found) == 1 else 1
            tokens = self.documents.tokens(document, first, min(inside, first + self.length))
            found.append(tokens.astype(np.int64))
            size += len(tokens)
        return np.concatenate(found)[: self.length + 1]
