"""Config group `evaluation`: what is measured on our own rows."""

from dataclasses import dataclass

from v4train.errors import ConfigError


@dataclass
class EvaluationConfig:
    """Values and their meaning: conf/evaluation/default.yaml."""

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
                raise ConfigError(key, getattr(self, key), "it can't be negative", "use 0 for none")
