"""Learning rate over a run (V4 report 4.2.2): linear warm-up by steps, constant, decay by tokens at the end."""

import math
from dataclasses import dataclass
from typing import Any

from v4train.errors import ConfigError

KINDS = ("cosine", "linear", "sqrt")


@dataclass
class ScheduleConfig:
    """Values and their meaning: conf/schedule/*.yaml."""

    kind: str  # shape of the decay, one of KINDS
    learning_rate: float
    final_ratio: float
    warmup_steps: int | None
    warmup_fraction: float
    min_warmup_steps: int
    decay_fraction: float
    mtp_weight_in_decay: float | None
    phases: Any  # None or a list, which train/phases.py reads

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("schedule.kind", self.kind, "unknown decay", f"use one of {', '.join(KINDS)}")
        for key in ("final_ratio", "warmup_fraction", "decay_fraction"):
            value = getattr(self, key)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"schedule.{key}", value, "must be between 0 and 1", "give a share, not a percentage")
        if not 0 <= self.learning_rate < math.inf:
            rule = "it must be finite and not negative"
            raise ConfigError("schedule.learning_rate", self.learning_rate, rule, "try 1e-3")
        for key in ("warmup_steps", "min_warmup_steps", "mtp_weight_in_decay"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"schedule.{key}", value, "must be finite and not negative", "use 0 for none")


def warmup(step: int, steps: int) -> float:
    """Factor of step `step`, counted from 0: (step + 1) / steps, and 1 from the last step of the warm-up on."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Steps of the warm-up of a run of `total_steps`."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return max(config.min_warmup_steps, round(config.warmup_fraction * total_steps))


def decayed(done: int, total: int, unit: int, config: ScheduleConfig) -> float:
    """Share of the decay that is over, from 0 to 1, when `done` of `total` tokens have been trained on.

    The decay takes the last `decay_fraction` of the run, as a whole number of `unit` tokens, those of the last step.
    """
    length = round(config.decay_fraction * (total / unit)) * unit
    return min(1.0, max(0.0, (done - (total - length)) / length)) if length else 0.0


def decay(share: float, config: ScheduleConfig) -> float:
    """Factor at that share of the decay: from 1 down to `final_ratio`.

    `sqrt` is 1 - sqrt(share), steep at first (arXiv 2405.18392).
    """
    left = {"cosine": 0.5 * (1.0 + math.cos(math.pi * share)), "linear": 1.0 - share, "sqrt": 1.0 - math.sqrt(share)}
    return config.final_ratio + (1.0 - config.final_ratio) * left[config.kind]
