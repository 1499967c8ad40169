"""Config group `evaluation`: what is measured on our own rows, and lm_eval's tasks."""

from dataclasses import dataclass
from pathlib import Path
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
    tasks: list[str]
    task_path: str | None
    few_shot: int | None
    task_limit: int | None

    def __post_init__(self) -> None:
        for key in ("tokens", "recall_rows", "seed"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{self.PREFIX}{key}", getattr(self, key), "it can't be negative", "use 0 for none")
        for key, least in (("task_limit", 1), ("few_shot", 0)):
            if getattr(self, key) is not None and getattr(self, key) < least:
                rule = f"it must be at least {least}"
                raise ConfigError(f"{self.PREFIX}{key}", getattr(self, key), rule, "choose a larger number")
        if self.task_path is not None and not Path(self.task_path).is_dir():
            remedy = "name one of lm_eval task files"
            raise ConfigError(f"{self.PREFIX}task_path", self.task_path, "there is no such folder", remedy)
        if self.task_path is not None and not self.tasks:
            remedy = f"give {self.PREFIX}tasks=[name,name]"
            raise ConfigError(f"{self.PREFIX}task_path", self.task_path, "no task of it is asked for", remedy)
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
