"""What a report knows of a run: its configuration, its metrics as curves, its samples."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from v4train.errors import ConfigError
from v4train.train.metrics import read_metrics
from v4train.train.run_directory import FIND_RUN, RunDirectory

Curve = tuple[np.ndarray, np.ndarray]  # x and y, both [n]
RECALL = "eval/recall/"  # of a key, before the distance
CHANGES = ("phase", "attention_mode", "sequence_length", "global_batch_size")


@dataclass(frozen=True)
class Run:
    """One run's folder, read. `steps` are the records of training, `validations` those with `val_loss`, `evaluations`
    those of `train.evaluate_every`."""

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    samples: str
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def clock(self) -> Curve:
        """Steps, and the hours of training up to each; steps that were not logged took as long as the next that was."""
        steps = np.array([record["step"] for record in self.steps], dtype=float)
        seconds = np.array([record.get("step_seconds", 0.0) for record in self.steps], dtype=float)
        return steps, np.cumsum(seconds * np.diff(steps, prepend=0.0)) / 3600

    def curve(self, key: str, by: str = "step") -> Curve:
        """A key's values where they are finite numbers, of training or validation. by: step | tokens | hours."""
        records = self.validations if key.startswith("val_") else self.steps
        rows = [(r["step"], r.get("tokens"), r.get(key)) for r in records]
        table = np.array([row for row in rows if None not in row], dtype=float).reshape(-1, 3)
        table = table[np.isfinite(table).all(axis=1)]
        if by == "hours":
            return np.interp(table[:, 0], *self.clock) if len(self.steps) else table[:, 0], table[:, 2]
        return table[:, ("step", "tokens").index(by)], table[:, 2]

    @property
    def events(self) -> list[tuple[int, str]]:
        """(step, what happened): updates that were skipped, and changes of what is trained on."""
        events = [(record["step"], "update skipped") for record in self.steps if record.get("skipped")]
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            changed = [key for key in CHANGES if before.get(key) != after.get(key)]
            events += [(after["step"], f"another {key.replace('_', ' ')}") for key in changed]
        return sorted(events)

    @property
    def recall(self) -> dict[int, float]:
        """Accuracy by distance at the last evaluation."""
        last = self.evaluations[-1] if self.evaluations else {}
        found = {int(key.removeprefix(RECALL)): of for key, of in last.items() if key.startswith(RECALL)}
        return {distance: accuracy for distance, accuracy in found.items() if accuracy is not None}

    def last(self, key: str) -> Any:
        """The newest value of a key that was logged now and then; None if it never was."""
        return next((record[key] for record in reversed(self.steps) if key in record), None)


def read_run(path: Path) -> Run:
    """Read a run's folder, finished or not.

    Raises:
        ConfigError: there is no run.
    """
    directory = RunDirectory(path)
    if not directory.holds_run():
        raise ConfigError("run", path, "the folder holds no run", FIND_RUN)
    config = OmegaConf.to_container(OmegaConf.load(directory.config))
    records = read_metrics(directory.metrics) if directory.metrics.is_file() else []
    samples = directory.samples.read_text(encoding="utf-8") if directory.samples.is_file() else ""
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "val_loss" in record]
    evaluations = [record for record in records if any(key.startswith("eval/") for key in record)]
    return Run(config["run"]["name"], config, steps, validations, samples.rstrip("\n"), evaluations)
