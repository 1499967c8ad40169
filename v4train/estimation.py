"""From a composed configuration to what the formulas of `analysis` take. Without PyTorch."""

import math
from dataclasses import dataclass, fields

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from v4train.analysis.work import Work
from v4train.errors import ConfigError
from v4train.model.config import ModelConfig
from v4train.model.rules import RECOMPUTE_LEVELS
from v4train.optim.config import OPTIMIZERS
from v4train.parallel.rules import check_layout_of
from v4train.parallel.sizes import AXES, ParallelismConfig, check_batch, check_layout, default_micro_batch
from v4train.structured import structured

PRECISIONS = ("fp32", "bf16")


@dataclass
class Batch:
    """The keys of `train` that say what a step is: conf/pretrain.yaml."""

    global_batch_size: int
    micro_batch_size: int | None
    sequence_length: int
    recompute: str


def read_work(config: DictConfig, model: ModelConfig, ranks: int | None = None) -> Work:
    """What `config`, composed from conf/pretrain.yaml, does in a step on so many ranks; None: as few as it needs.

    Raises:
        ConfigError: a rule broken that training would refuse too.
    """
    parallelism = structured(ParallelismConfig, config.parallelism, "parallelism")
    batch = read_batch(config)
    ranks = ranks or fewest_ranks(parallelism)
    sizes = check_layout(parallelism, ranks)
    check_layout_of(model, sizes, batch.sequence_length)
    check_batch(batch.global_batch_size, batch.micro_batch_size, sizes.data)
    rows = batch.global_batch_size // sizes.data
    bucket = OmegaConf.select(config, "parallelism.deepspeed.zero_optimization.reduce_bucket_size")
    micro = batch.micro_batch_size or default_micro_batch(rows, sizes.pipeline)
    return Work(
        sequence_length=batch.sequence_length,
        rows=micro,
        accumulation=rows // micro,
        recompute=batch.recompute,
        zero_stage=parallelism.zero_stage,
        optimizer=_word(config, "optimizer.name", OPTIMIZERS),
        precision=_word(config, "precision", PRECISIONS),
        **({"bucket": int(bucket)} if bucket else {}),
        **{axis: getattr(sizes, axis) for axis in (*AXES, "expert")},
    )


def fewest_ranks(parallelism: ParallelismConfig) -> int:
    """How many a layout needs at least: those of its experts lie within data x context."""
    fixed = math.prod(getattr(parallelism, axis) or 1 for axis in AXES)
    if parallelism.data is not None:
        return fixed
    replicas = math.lcm(parallelism.expert or 1, parallelism.context)
    return fixed // parallelism.context * replicas


def read_batch(config: DictConfig) -> Batch:
    """Raises ConfigError for a value of the wrong type, or one that no run takes."""
    batch = structured(Batch, {field.name: config.train[field.name] for field in fields(Batch)}, "train")
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
