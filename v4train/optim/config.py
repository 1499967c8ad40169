"""What the optimizer's configuration says."""

import math
from dataclasses import dataclass

from v4train.errors import ConfigError

OPTIMIZERS = ("muon", "adamw")
NEWTON_SCHULZ_DTYPES = ("auto", "float32", "bfloat16")
# Matrix elements that go through Newton-Schulz together, by where they are: more make no product faster, and need
# memory; on a CPU in blocks so large that none fits into what smaller ones leave of the heap
BATCH = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass
class OptimizerConfig:
    """Values and their meaning: conf/optimizer/*.yaml."""

    name: str  # muon: Muon on matrices and AdamW on the rest | adamw: AdamW on everything
    learning_rate: float  # peak of the schedule, which reads it
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    momentum: float
    update_rms: float
    newton_schulz_steps: tuple[int, int]
    newton_schulz_dtype: str  # float32 | bfloat16 | auto, which `resolve_dtype` replaces
    per_head: bool
    per_group: bool

    def __post_init__(self) -> None:
        self.betas = tuple(self.betas)
        self.newton_schulz_steps = tuple(self.newton_schulz_steps)
        if self.name not in OPTIMIZERS:
            raise ConfigError("optimizer.name", self.name, "unknown optimizer", f"use one of {', '.join(OPTIMIZERS)}")
        self._check_ranges()
        if self.newton_schulz_dtype not in NEWTON_SCHULZ_DTYPES:
            remedy = f"use one of {', '.join(NEWTON_SCHULZ_DTYPES)}"
            raise ConfigError("optimizer.newton_schulz_dtype", self.newton_schulz_dtype, "unknown type", remedy)

    def resolve_dtype(self, precision: str) -> None:
        """Put what `auto` means with this precision in its place. Raises ConfigError for bfloat16 in an fp32 run."""
        if self.newton_schulz_dtype == "auto":
            self.newton_schulz_dtype = "bfloat16" if precision == "bf16" else "float32"
        elif self.newton_schulz_dtype == "bfloat16" and precision != "bf16":
            rule = f"precision={precision}, and Muon multiplies in bfloat16 only with precision=bf16"
            raise ConfigError("optimizer.newton_schulz_dtype", "bfloat16", rule, "use auto, or precision=bf16")

    def _check_ranges(self) -> None:
        """Written as `not ...`, so that NaN is refused too."""
        for key in ("eps", "weight_decay"):
            if not 0 <= (value := getattr(self, key)) < math.inf:
                raise ConfigError(f"optimizer.{key}", value, "it must be finite and not negative", "use 0 for none")
        if not 0 < self.update_rms < math.inf:
            raise ConfigError("optimizer.update_rms", self.update_rms, "it must be finite and above 0", "V4 has 0.18")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            key, value = ("momentum", self.momentum) if not 0 <= self.momentum < 1 else ("betas", list(self.betas))
            raise ConfigError(f"optimizer.{key}", value, "each decay must lie in [0, 1), betas being two", "see conf/")
        if len(self.newton_schulz_steps) != 2 or min(self.newton_schulz_steps) < 0:
            steps = list(self.newton_schulz_steps)
            raise ConfigError("optimizer.newton_schulz_steps", steps, "two counts are expected", "V4 has [8, 2]")
