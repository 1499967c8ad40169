"""Rows of the recall task to train on, as a lane of a source (`data.recall`): conf/data/recall.yaml."""

from dataclasses import dataclass

import numpy as np

from v4train.data.packing import Window, raw_numbers
from v4train.data.recall import RecallRow, RecallTask
from v4train.data.streams import LEAST_ROWS, Documents, Lane
from v4train.data.tokenizer import Tokenizer
from v4train.errors import ConfigError

OF_A_SEED = 1 << 32  # rows of one seed of a run; evaluation has the numbers below
_TARGETS = 2  # sets these draws apart from those of a row


@dataclass
class RecallSourceConfig:
    """Values and their meaning: conf/data/recall.yaml."""

    pairs: int
    keys: int
    values: int
    seed: int
    nearest: int
    farthest: int
    distances: int
    text_targets: float

    def __post_init__(self) -> None:
        if not 0 < self.nearest <= self.farthest:
            rule = "it lies between 1 and data.recall.farthest"
            raise ConfigError("data.recall.nearest", self.nearest, rule, f"for example {self.farthest}")
        if self.distances < 1:
            raise ConfigError("data.recall.distances", self.distances, "at least 1", "for example 30")
        if not 0 <= self.text_targets <= 1:
            rule = "a share of the text's tokens, 0 to 1"
            raise ConfigError("data.recall.text_targets", self.text_targets, rule, "for example 1.0: all")

    @property
    def chosen(self) -> list[int]:
        """The distances, as many in each octave; fewer where rounding makes two the same."""
        spread = np.geomspace(self.nearest, self.farthest, self.distances)
        return np.unique(spread.round().astype(np.int64)).tolist()


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


class RecallStream:
    """Every row is a document of its own, as long as a row. Position: [number of the next row, over all lanes]."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, config: RecallSourceConfig, lane: Lane) -> None:
        self._documents, self._tokenizer, self._config, self._lane = documents, tokenizer, config, lane
        self.position = [lane.number]
        self.left_out: dict[str, int] = {}

    def seek(self, position: list[int]) -> None:
        self.position = position

    def window(self, length: int) -> Window:
        """The next rows. Raises ConfigError: distances that don't fit in them, or a tokenizer with too few tokens."""
        config, first = self._config, self.position[0]
        sizes = {"pairs": config.pairs, "keys": config.keys, "values": config.values}
        task = RecallTask(
            self._documents, self._tokenizer, length, config.seed, distances=config.chosen, key="data.recall.", **sizes
        )
        begin = (1 + self._lane.seed) * OF_A_SEED + first
        numbers = range(begin, begin + LEAST_ROWS * self._lane.count, self._lane.count)
        rows = [task.row(number) for number in numbers]
        trained = [self._trained(row, number) for row, number in zip(rows, numbers, strict=True)]
        self.position = [first + len(numbers) * self._lane.count]
        documents = [row.row.input_ids for row in rows]
        return _Rows((self._lane.source, first), documents, trained, np.full(len(rows), length))

    def _trained(self, row: RecallRow, number: int) -> np.ndarray:
        """Repeated values, and a share of all else."""
        drawn = raw_numbers(len(row.distances), self._config.seed, number, _TARGETS) / 2**64
        trained = drawn < self._config.text_targets
        trained[1:] |= row.distances[:-1] > 0  # these are where the value is the next token
        return trained

    @property
    def epoch(self) -> float:
        """Rows are drawn anew without end: none is seen twice."""
        return 0.0
