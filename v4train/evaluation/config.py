"""Config group `evaluation`: what is measured on our own rows."""

from dataclasses import dataclass
from typing import ClassVar

from v4train.data.recall import RecallConfig
from v4train.errors import ConfigError


@dataclass
class EvaluationConfig:
    """Values and their meaning: conf/evaluation/default.yaml."""

    PREFIX: ClassVar[str] = "evaluation."  # of the keys, where the user gives them

    tokens: int
    recall_rows: int
    recall_distances: list[int] | None
    recall_pairs: int
    recall_keys: int
    recall_values: int
    seed: int

    def __post_init__(self) -> None:
        for key in ("tokens", "recall_rows", "seed"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{self.PREFIX}{key}", getattr(self, key), "it can't be negative", "use 0 for none")
        RecallConfig(self.recall_distances or [], **self.recall_sizes)

    @property
    def recall_sizes(self) -> dict[str, int | str]:
        """Keyword arguments of the recall task that are no list."""
        sizes = {"pairs": self.recall_pairs, "keys": self.recall_keys, "values": self.recall_values}
        return sizes | {"key": f"{self.PREFIX}recall_"}

    def held_out_tokens(self, validation_tokens: int) -> int:
        """Tokens that every source has to hold ready, 0 for all, so that training and launch/evaluate.py draw the same
        rows: as many as the run validates on, or more where more are asked for."""
        return validation_tokens and max(validation_tokens, self.tokens)
