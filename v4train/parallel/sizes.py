"""How many ranks each dimension of a layout has: arithmetic on the configuration, without PyTorch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4train.errors import ConfigError
from v4train.parallel.deepspeed_config import check_deepspeed_keys

AXES = ("pipeline", "data", "context", "tensor")
REDUCED = 1 << 20  # numbers whose gradients ZeRO 0-2 reduce at a time on a CPU


def reduce_bucket_size(numbers: int, largest: int) -> int:
    """Numbers of ZeRO 1-2's bucket on a CPU, where a rank trains so many, in tensors of `largest` at most.

    DeepSpeed's own, 500 million, would be one block as large as all gradients, and a second one of what is sent. Where
    tensors lie all over the heap there is room for such at its end only. No tensor is larger than the bucket.
    """
    return min(numbers, max(REDUCED, largest))


@dataclass
class ParallelismConfig:
    """Values and their meaning: conf/parallelism/*.yaml."""

    data: int | None
    expert: int | None
    tensor: int
    pipeline: int
    context: int
    zero_stage: int
    deepspeed: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How many ranks each dimension has. Their product, but for `expert`, is the world."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks over which the gradients of a parameter that is no expert's are averaged: data x context."""
        return self.data * self.context

    def __str__(self) -> str:
        return ", ".join(f"{axis} {getattr(self, axis)}" for axis in (*AXES, "expert"))


def check_layout(config: ParallelismConfig, world_size: int) -> Sizes:
    """Sizes of every dimension on `world_size` ranks. Raises ConfigError where the layout doesn't fit them."""
    check_values(config)
    given = {name: getattr(config, name) for name in (*AXES, "expert")}
    fixed = math.prod(given[name] or 1 for name in AXES)
    if world_size % fixed or (given["data"] is not None and fixed != world_size):
        _refuse_sizes(given, world_size)
    given["data"] = given["data"] or world_size // fixed
    replicas = given["data"] * given["context"]
    given["expert"] = given["expert"] or replicas
    if replicas % given["expert"]:
        rule = f"experts are spread over data {given['data']} x context {given['context']} ranks: it must divide them"
        fitting = math.gcd(given["expert"], replicas)
        raise ConfigError("parallelism.expert", given["expert"], rule, f"for example parallelism.expert={fitting}")
    return Sizes(**given)


def check_values(config: ParallelismConfig) -> None:
    """Raise ConfigError for what no number of ranks could run."""
    for name in (*AXES, "expert"):
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ConfigError(f"parallelism.{name}", size, "it must be at least 1", f"set parallelism.{name}=1")
    if config.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(
            "parallelism.zero_stage", config.zero_stage, "ZeRO has stages 0 to 3", "use 0, 1, 2 or 3; 1 is the default"
        )
    if config.pipeline > 1 and config.zero_stage > 1:
        rule = "DeepSpeed's pipeline holds whole gradients and parameters"
        raise ConfigError("parallelism.zero_stage", config.zero_stage, rule, "set parallelism.zero_stage=1")
    check_deepspeed_keys(config.deepspeed)


def _refuse_sizes(given: Mapping[str, int | None], world_size: int) -> None:
    """Names the sizes, the rule, and the nearest layout that works."""
    product = " x ".join(f"{name} {given[name]}" for name in AXES if given[name] is not None)
    plural = "" if world_size == 1 else "es"
    left, fitting = world_size, {}
    for name in ("tensor", "context", "pipeline"):
        fitting[name] = math.gcd(given[name], left)
        left //= fitting[name]
    fitting["data"] = left
    wrong = [name for name, size in fitting.items() if given[name] is not None and given[name] != size]
    key = "data" if wrong == ["data"] else next(name for name in wrong if name != "data")
    remedy = f"set {' '.join(f'parallelism.{name}={fitting[name]}' for name in wrong)}"
    needed = math.prod(given[name] or 1 for name in AXES)
    rule = f"{product} must {'divide' if given['data'] is None else 'be'} the {world_size} process{plural} started"
    raise ConfigError(
        f"parallelism.{key}", given[key], rule, f"{remedy}, or start {needed} with torchrun --nproc-per-node={needed}"
    )


def check_batch(global_batch_size: int, micro_batch_size: int | None, data_size: int, prefix: str = "train") -> None:
    """Raise ConfigError for a step's rows that are no multiple of what the data ranks take at a time.

    prefix: of the keys, in messages.
    """
    micro = micro_batch_size or 1
    if global_batch_size % (micro * data_size):
        rule = f"it must be a multiple of micro_batch_size={micro} x {data_size} data ranks"
        fitting = max(1, round(global_batch_size / (micro * data_size))) * micro * data_size
        raise ConfigError(f"{prefix}.global_batch_size", global_batch_size, rule, f"for example {fitting}")


def default_micro_batch(rows: int, stages: int) -> int:
    """Rows of a micro-batch: all of a step's, or in a pipeline so many that all stages are at work most of the time."""
    if stages == 1:
        return rows
    return min(rows // count for count in range(1, min(rows, 4 * stages) + 1) if rows % count == 0)
