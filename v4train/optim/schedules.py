"""Learning rate as a function of the step (V4 report 4.2.2): linear warm-up, constant, decay at the end."""

import math
from dataclasses import dataclass

from v4train.errors import ConfigError

KINDS = ("cosine", "linear")


@dataclass
class ScheduleConfig:
    """Values and their meaning: conf/schedule/*.yaml."""

    kind: str  # shape of the decay: cosine | linear
    learning_rate: float
    final_ratio: float
    warmup_steps: int | None
    warmup_fraction: float
    min_warmup_steps: int
    decay_fraction: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("schedule.kind", self.kind, "unknown decay", f"use one of {', '.join(KINDS)}")
        for key in ("final_ratio", "warmup_fraction", "decay_fraction"):
            value = getattr(self, key)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"schedule.{key}", value, "must be between 0 and 1", "give a share, not a percentage")
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError("schedule.learning_rate", self.learning_rate, "it can't be negative", "try 1e-3")
        for key in ("warmup_steps", "min_warmup_steps"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ConfigError(f"schedule.{key}", value, "must not be negative", "use 0 for none")


def learning_rate(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0, in a run of `total_steps`.

    Warm-up: peak * (step + 1) / warm-up steps, the peak being reached by the last of them. Decay: over the last
    `decay_fraction` of the run, ending at peak * final_ratio on the last step and staying there after it. Where the two
    overlap (short runs) their factors multiply.
    """
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = max(config.min_warmup_steps, round(config.warmup_fraction * total_steps))
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay_steps = round(config.decay_fraction * total_steps)
    done = (step + 1 - (total_steps - decay_steps)) / decay_steps if decay_steps else 0.0
    done = min(1.0, max(0.0, done))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.kind == "cosine" else 1.0 - done
    return config.learning_rate * warmup * (config.final_ratio + (1.0 - config.final_ratio) * left)
