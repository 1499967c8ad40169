"""From a composed configuration to what the formulas of `analysis` take. Without PyTorch."""

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from v4train.analysis.work import Work
from v4train.errors import ConfigError
from v4train.model.config import ModelConfig
from v4train.model.rules import RECOMPUTE_LEVELS, check_attention_mode
from v4train.optim.config import OptimizerConfig
from v4train.parallel.rules import check_layout_of
from v4train.parallel.sizes import (
    AXES,
    ParallelismConfig,
    Sizes,
    check_batch,
    check_layout,
    check_values,
    default_micro_batch,
)
from v4train.rules import DEVICES, PRECISIONS, check_compile
from v4train.structured import structured
from v4train.train.phases import read_phases


@dataclass
class Batch:
    """The keys of `train` that say what a step is: conf/pretrain.yaml."""

    global_batch_size: int
    micro_batch_size: int | None
    sequence_length: int
    attention_mode: str
    recompute: str


class Step(NamedTuple):
    """What steps of a run have in common. prefix: of the keys that say so, in messages."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int | None
    mode: str
    prefix: str = "train"


def read_works(config: DictConfig, model: ModelConfig, ranks: int | None = None) -> list[Work]:
    """What `config`, composed from conf/pretrain.yaml, does in its steps on so many ranks, phase by phase.

    ranks: None for as few as it needs.

    Raises:
        ConfigError: a rule broken that training would refuse too.
    """
    layout = read_layout(config, model, ranks)
    return list(dict.fromkeys(of_step(layout, model, step) for step in read_steps(config, model)))


def read_layout(config: DictConfig, model: ModelConfig, ranks: int | None = None) -> Work:
    """The same but for what phases change: of one row of one token a rank. Raises ConfigError as `read_works` does."""
    batch = read_batch(config)
    parallelism = structured(ParallelismConfig, config.parallelism, "parallelism")
    optimizer = structured(OptimizerConfig, config.optimizer, "optimizer")
    precision, device = _word(config, "precision", PRECISIONS), _word(config, "device", DEVICES)
    optimizer.resolve_dtype(precision)
    check_values(parallelism)
    sizes = check_layout(parallelism, ranks or fewest_ranks(parallelism))
    check_layout_of(model, sizes, sizes.context)
    check_compile(config.compile, sizes.tensor)
    return Work(
        sequence_length=sizes.context,
        stage_length=batch.sequence_length,
        recompute=batch.recompute,
        zero_stage=parallelism.zero_stage,
        optimizer=optimizer.name,
        newton_schulz_steps=sum(optimizer.newton_schulz_steps),
        newton_schulz_dtype=optimizer.newton_schulz_dtype,
        precision=precision,
        device="cpu" if device == "cpu" else "cuda",
        **_bucket(config),
        **{axis: getattr(sizes, axis) for axis in (*AXES, "expert")},
    )


def of_step(layout: Work, model: ModelConfig, step: Step) -> Work:
    """`layout` in such a step. Raises ConfigError where its rows or tokens can't be shared out."""
    sizes = Sizes(**{axis: getattr(layout, axis) for axis in (*AXES, "expert")})
    check_layout_of(model, sizes, step.sequence_length, f"{step.prefix}.sequence_length")
    check_batch(step.global_batch_size, step.micro_batch_size, sizes.data, step.prefix)
    rows = step.global_batch_size // sizes.data
    micro = step.micro_batch_size or default_micro_batch(rows, sizes.pipeline)
    sizes_of_step = {"sequence_length": step.sequence_length, "rows": micro, "accumulation": rows // micro}
    return replace(layout, **sizes_of_step, mode=step.mode)


def read_steps(config: DictConfig, model: ModelConfig) -> list[Step]:
    """Of the phases of `schedule.phases`, each size of a growing batch, or what `train` says; in order.

    Raises:
        ConfigError: phases that can't be read, or a mode that the model can't train in.
    """
    batch = read_batch(config)
    if config.schedule.phases is None:
        steps = [Step(batch.sequence_length, batch.global_batch_size, batch.micro_batch_size, batch.attention_mode)]
    else:
        phases = read_phases(OmegaConf.to_container(config.schedule.phases, resolve=True))
        steps = [
            Step(phase.sequence_length, rows, micro, phase.attention_mode, f"schedule.phases.{number}")
            for number, phase in enumerate(phases)
            for micro in [phase.micro_batch_size or batch.micro_batch_size]
            for rows, _ in phase.batches
        ]
    for step in steps:
        check_attention_mode(model, step.mode, f"{step.prefix}.attention_mode")
    return steps


def _bucket(config: DictConfig) -> dict[str, int]:
    key = "parallelism.deepspeed.zero_optimization.reduce_bucket_size"
    value = OmegaConf.select(config, key)
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise ConfigError(key, value, "it must be a number of elements, at least 1", "leave it out for 500000000")
    return {"bucket": int(value)}


def fewest_ranks(parallelism: ParallelismConfig) -> int:
    """How many a layout needs at least: those of its experts lie within data x context."""
    fixed = math.prod(getattr(parallelism, axis) or 1 for axis in AXES)
    if parallelism.data is not None:
        return fixed
    replicas = math.lcm(parallelism.expert or 1, parallelism.context)
    return fixed // parallelism.context * replicas


def read_batch(config: DictConfig) -> Batch:
    """Raises ConfigError for a value of the wrong type, or one that no run takes."""
    names = [field.name for field in fields(Batch)]
    batch = structured(Batch, {name: config.train[name] for name in names if name in config.train}, "train")
    for key in ("global_batch_size", "micro_batch_size", "sequence_length"):
        value = getattr(batch, key)
        if value is not None and value < 1:
            raise ConfigError(f"train.{key}", value, "it must be at least 1", "choose a positive number")
    if batch.recompute not in RECOMPUTE_LEVELS:
        remedy = f"use one of {', '.join(RECOMPUTE_LEVELS)}"
        raise ConfigError("train.recompute", batch.recompute, "unknown level", remedy)
    return batch


def _word(config: DictConfig, key: str, known: tuple[str, ...]) -> str:
    try:
        value = OmegaConf.select(config, key, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(key, "?", str(error).splitlines()[0], "set it on the command line") from error
    if value not in known:
        raise ConfigError(key, value, "unknown word", f"use one of {', '.join(known)}")
    return value
