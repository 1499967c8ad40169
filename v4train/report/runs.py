"""What a report knows of a run: its configuration, its metrics as curves, its samples."""

from dataclasses import dataclass
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
    those of `train.evaluate_every`, `incidents` those of events.jsonl."""

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    samples: str
    evaluations: tuple[dict[str, Any], ...] = ()
    incidents: tuple[dict[str, Any], ...] = ()
    finished: bool = False

    @cached_property
    def clock(self) -> Curve:
        """Steps, and the hours of training up to each; steps that were not logged took as long as the next that was.

        Before the first line lie no more than `train.log_every` steps: a run that started from another's checkpoint
        has not run the others.
        """
        steps = np.array([record["step"] for record in self.steps], dtype=float)
        seconds = np.array([record.get("step_seconds", 0.0) for record in self.steps], dtype=float)
        counts = np.diff(steps, prepend=0.0)
        counts[:1] = np.minimum(counts[:1], self.config["train"]["log_every"])
        return steps, np.cumsum(seconds * counts) / 3600

    def curve(self, key: str, by: str = "step") -> Curve:
        """A key's values where they are finite numbers, of training or validation. by: step | tokens | hours."""
        records = self.validations if key.startswith("val_") else self.steps
        rows = [(r.get("tokens" if by == "tokens" else "step"), r.get(key)) for r in records]
        table = np.array([row for row in rows if None not in row], dtype=float).reshape(-1, 2)
        x, values = table[np.isfinite(table).all(axis=1)].T
        return np.interp(x, *self.clock) if by == "hours" and len(self.steps) else x, values

    def training_loss(self, by: str = "step") -> Curve:
        """The language model's, or the whole loss where that alone was logged."""
        curve = self.curve("lm_loss", by)
        return curve if len(curve[0]) else self.curve("loss", by)

    @property
    def diverged(self) -> list[int]:
        """Steps whose loss was not finite, so that no curve has them."""
        return [record["step"] for record in self.steps if not np.isfinite(record["loss"])]

    @property
    def events(self) -> list[tuple[int, str]]:
        """(step, what happened): updates skipped, losses that are no numbers, spikes, changes of what is trained on."""
        events = [(record["step"], "update skipped") for record in self.steps if record.get("skipped")]
        events += [(step, "loss not finite") for step in self.diverged]
        events += [(event["seen_at"], event["event"]) for event in self.incidents]
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            changed = [key for key in CHANGES if before.get(key) != after.get(key)]
            events += [(after["step"], f"another {key.replace('_', ' ')}") for key in changed]
        return sorted(set(events))

    @property
    def end(self) -> int:
        """The newest step, 0 of a run without any."""
        return max((record["step"] for record in [*self.steps[-1:], *self.validations[-1:]]), default=0)

    @property
    def recall(self) -> dict[int, float]:
        """Accuracy by distance at the last evaluation."""
        last = self.evaluations[-1] if self.evaluations else {}
        found = {int(key.removeprefix(RECALL)): of for key, of in last.items() if key.startswith(RECALL)}
        return {distance: accuracy for distance, accuracy in found.items() if accuracy is not None}

    def gains(self, way: str) -> dict[int, float]:
        """Gain of the product of all mixing matrices by step, of those that were logged. way: forward | backward."""
        found = {}
        for record in self.steps:
            gains = [of[f"gain_{way}"] for of in record.get("layers", {}).values() if f"gain_{way}" in of]
            if gains:
                found[record["step"]] = gains[-1 if way == "forward" else 0]
        return found

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
    evaluations = tuple(record for record in records if any(key.startswith("eval/") for key in record))
    incidents = tuple(read_metrics(directory.events)) if directory.events.is_file() else ()
    return Run(
        config["run"]["name"],
        config,
        steps,
        validations,
        samples.rstrip("\n"),
        evaluations,
        incidents,
        directory.summary.is_file(),
    )
