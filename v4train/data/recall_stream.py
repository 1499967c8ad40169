"""Rows of the recall task to train on, as a lane of a source (`data.recall`): conf/data/recall.yaml."""

from dataclasses import dataclass

import numpy as np

from v4train.data.packing import Window, raw_numbers
from v4train.data.recall import RecallRow, RecallTask, statement_width
from v4train.data.streams import LEAST_ROWS, Documents, Lane
from v4train.data.tokenizer import Tokenizer
from v4train.errors import ConfigError

OF_A_SEED = 1 << 32  # rows of one seed of a run; evaluation has the numbers below
_TARGETS = 2  # sets these draws apart from those of a row


@dataclass
class RecallSourceConfig:
    """Values and their meaning: conf/data/recall.yaml."""

    contexts: list[int] | None
    tokens_per_pair: int
    keys: int
    values: int
    seed: int
    nearest: int
    distances: int
    text_targets: float

    def __post_init__(self) -> None:
        for name in ("tokens_per_pair", "nearest", "distances"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.recall.{name}", getattr(self, name), "at least 1", "for example 20")
        if not 0 <= self.text_targets <= 1:
            rule = "a share of the text's tokens, 0 to 1"
            raise ConfigError("data.recall.text_targets", self.text_targets, rule, "for example 1.0: all")

    def spread(self, farthest: int) -> list[int]:
        """Distances from `nearest` to `farthest`, as many in each octave; fewer where rounding makes two the same."""
        found = np.geomspace(min(self.nearest, farthest), farthest, self.distances)
        return np.unique(found.round().astype(np.int64)).tolist()


@dataclass
class _Rows:
    key: tuple[int, ...]
    documents: list[np.ndarray]
    trained: list[np.ndarray]  # bool, of each token: whether it is a target
    lengths: np.ndarray

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.documents[document][start:stop]

    def untrained(self, document: int, start: int, stop: int) -> np.ndarray:
        return ~self.trained[document][start:stop]


def recall_tasks(
    documents: Documents, tokenizer: Tokenizer, config: RecallSourceConfig, length: int
) -> dict[int, RecallTask]:
    """By length, those of the contexts in rows of `length` tokens.

    Raises ConfigError: contexts or pairs that don't fit, or a tokenizer with too few tokens.
    """
    lengths = config.contexts or [length]
    if max(lengths) > length:
        rule = f"a row has {length} tokens"
        raise ConfigError("data.recall.contexts", lengths, rule, "use shorter ones, or a longer row")
    return {own: _task(documents, tokenizer, config, own) for own in set(lengths)}


def _task(documents: Documents, tokenizer: Tokenizer, config: RecallSourceConfig, length: int) -> RecallTask:
    farthest = length - 1 - statement_width(tokenizer)
    if farthest < config.nearest:
        rule = f"its last value can be {farthest} tokens from the first, and data.recall.nearest={config.nearest}"
        raise ConfigError("data.recall.contexts", length, rule, "use longer contexts")
    pairs = min(config.keys, max(1, length // config.tokens_per_pair))
    sizes = {"pairs": pairs, "keys": config.keys, "values": config.values}
    distances = config.spread(farthest)
    return RecallTask(documents, tokenizer, length, config.seed, distances=distances, key="data.recall.", **sizes)


class RecallStream:
    """Contexts as documents, those of row number n all as long, as many as a row holds.

    Position: [number of the next row, over all lanes].
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer, config: RecallSourceConfig, lane: Lane) -> None:
        self._documents, self._tokenizer, self._config, self._lane = documents, tokenizer, config, lane
        self.position = [lane.number]
        self.left_out: dict[str, int] = {}

    def seek(self, position: list[int]) -> None:
        self.position = position

    def window(self, length: int) -> Window:
        """The next rows. Raises ConfigError, as `recall_tasks`."""
        tasks = recall_tasks(self._documents, self._tokenizer, self._config, length)
        lengths = self._config.contexts or [length]
        first, most = self.position[0], length // min(lengths)
        numbers = range(first, first + LEAST_ROWS * self._lane.count, self._lane.count)
        documents, trained = [], []
        for number in numbers:
            own = lengths[number % len(lengths)]
            begin = (1 + self._lane.seed) * OF_A_SEED + number * most
            for each in range(begin, begin + length // own):
                row = tasks[own].row(each)
                documents.append(row.row.input_ids)
                trained.append(self._trained(row, each))
        self.position = [first + len(numbers) * self._lane.count]
        return _Rows((self._lane.source, first), documents, trained, np.array([len(own) for own in documents]))

    def _trained(self, row: RecallRow, number: int) -> np.ndarray:
        """Repeated values, and a share of all else."""
        drawn = raw_numbers(len(row.distances), self._config.seed, number, _TARGETS) / 2**64
        trained = drawn < self._config.text_targets
        trained[1:] |= row.distances[:-1] > 0  # these are where the value is the next token
        return trained

    @property
    def epoch(self) -> float:
        """Rows are drawn anew without end: none is seen twice unless a later phase's rows are shorter."""
        return 0.0
