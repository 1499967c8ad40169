"""Load and check a run's configuration: Hydra overrides in, typed settings out.

Everything here is arithmetic on values and a look at the file system: an impossible run ends in one `ConfigError`
before a model, a process group or a file is made.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from v4train.data import DataConfig, TokenizerConfig, check_data
from v4train.errors import ConfigError
from v4train.evaluation.config import EvaluationConfig
from v4train.model import ModelConfig, model_config
from v4train.model.compiled import cpp_compiler
from v4train.model.rules import RECOMPUTE_LEVELS, check_attention_mode
from v4train.optim.config import OptimizerConfig
from v4train.optim.schedules import ScheduleConfig
from v4train.overrides import complete, composed
from v4train.parallel.rules import check_layout_of
from v4train.parallel.sizes import ParallelismConfig, check_batch, default_micro_batch
from v4train.parallel.topology import Topology, make_topology
from v4train.rules import DEVICES, PRECISIONS, check_compile
from v4train.structured import structured
from v4train.train.checkpoint import CheckpointConfig
from v4train.train.phases import Plan, Stage, make_plan
from v4train.train.spike_guard import GuardConfig
from v4train.train.tracking import TrackingConfig


@dataclass
class RunConfig:
    """Values and their meaning: conf/pretrain.yaml."""

    name: str
    dir: str
    overwrite: bool

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.=+,-]+", self.name) or set(self.name) <= {"."}:
            rule = "it names one folder: letters, digits and _ . = + , - only"
            raise ConfigError("run.name", self.name, rule, "choose another name; run.dir says where the folder lies")


@dataclass
class TrainConfig:
    """Values and their meaning: conf/pretrain.yaml. Batch sizes count sequences."""

    max_steps: int | None
    max_tokens: int | None
    stop_at_step: int | None
    max_minutes: float | None
    global_batch_size: int
    micro_batch_size: int | None
    sequence_length: int
    attention_mode: str
    grad_clip: float
    recompute: str
    deterministic: bool
    log_every: int
    layers_every: int
    validate_every: int
    validation_tokens: int
    evaluate_every: int
    sample_prompt: str
    sample_tokens: int
    sample_temperature: float
    profile: list[int] | None
    hang_timeout: float
    dry_run: bool


@dataclass
class Settings:
    """A whole run, typed and checked. `resolved` is the same as plain values, for files and trackers."""

    seed: int
    precision: str
    compile: bool
    run: RunConfig
    train: TrainConfig
    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallelism: ParallelismConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    guard: GuardConfig
    tracking: TrackingConfig
    topology: Topology
    plan: Plan
    resolved: dict[str, Any]

    def micro_batch(self, stage: Stage) -> int:
        """Sequences of a forward pass on each rank."""
        rows = stage.global_batch_size // self.topology.sizes.data
        return stage.micro_batch_size or default_micro_batch(rows, self.topology.sizes.pipeline)


def load(overrides: list[str]) -> DictConfig:
    """The configuration that `launch/pretrain.py` would run with these overrides, complete and checked.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type, or a rule broken.
    """
    config = composed("pretrain", overrides)
    complete(config, overrides)
    settings(config)
    return config


def settings(config: DictConfig) -> Settings:
    """Typed settings of a composed configuration. Raises ConfigError on the first rule broken."""
    resolved = _resolve(config)
    known = {"device", *(field.name for field in fields(Settings))} - {"topology", "plan", "resolved"}
    for key in resolved.keys() - known:
        raise ConfigError(key, resolved[key], "unknown key", f"known keys: {', '.join(sorted(known))}")
    seed, precision, device = (resolved[key] for key in ("seed", "precision", "device"))
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError("seed", seed, "it must be a whole number from 0 to 2^63 - 1", "use seed=1")
    if precision not in PRECISIONS:
        raise ConfigError("precision", precision, "unknown precision", f"use one of {', '.join(PRECISIONS)}")
    parallelism = structured(ParallelismConfig, resolved["parallelism"], "parallelism")
    topology = make_topology(parallelism, checked_device(device))
    check_compile(resolved["compile"], topology.sizes.tensor)
    train = structured(TrainConfig, resolved["train"], "train")
    model = model_config(OmegaConf.create(resolved["model"]))
    schedule = structured(ScheduleConfig, resolved["schedule"], "schedule")
    _check_train(train, schedule)
    made = Settings(
        seed=seed,
        precision=precision,
        compile=resolved["compile"],
        run=structured(RunConfig, resolved["run"], "run"),
        train=train,
        model=model,
        data=structured(DataConfig, resolved["data"], "data"),
        tokenizer=structured(TokenizerConfig, resolved["tokenizer"], "tokenizer"),
        optimizer=structured(OptimizerConfig, resolved["optimizer"], "optimizer"),
        schedule=schedule,
        parallelism=parallelism,
        checkpoint=structured(CheckpointConfig, resolved["checkpoint"], "checkpoint"),
        evaluation=structured(EvaluationConfig, resolved["evaluation"], "evaluation"),
        guard=structured(GuardConfig, resolved["guard"], "guard"),
        tracking=structured(TrackingConfig, resolved["tracking"], "tracking"),
        topology=topology,
        plan=make_plan(schedule, train, model),
        resolved=resolved,
    )
    made.optimizer.resolve_dtype(precision)
    if made.guard.enabled and made.guard.snapshot == "disk" and not made.checkpoint.every:
        rule = "checkpoint.every=0 writes no checkpoint that a spike could go back to"
        raise ConfigError("guard.snapshot", "disk", rule, "set checkpoint.every, or use guard.snapshot=memory")
    if made.compile and made.topology.device.type == "cpu" and cpp_compiler() is None:
        rule = "torch.compile needs a C++ compiler, and neither $CXX nor g++ nor clang++ is found"
        raise ConfigError("compile", True, rule, "install g++, set CXX, or use compile=false")
    _check_plan(made)
    if made.tokenizer.vocab_size > made.model.vocab_size:
        rule = f"the model embeds only model.vocab_size={made.model.vocab_size} entries"
        raise ConfigError("tokenizer.vocab_size", made.tokenizer.vocab_size, rule, "make it at most as large")
    if Path(made.tokenizer.cache_dir).expanduser().absolute().is_relative_to(Path(made.run.dir).absolute()):
        rule = "it lies in the run's folder, which holds nothing else and run.overwrite=true empties"
        raise ConfigError("tokenizer.cache_dir", made.tokenizer.cache_dir, rule, "name a folder that runs can share")
    check_data(made.data)
    return made


def _resolve(config: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        rule = str(error.msg or error).splitlines()[0]
        raise ConfigError(error.full_key or "config", "?", rule, "set it on the command line") from error


def checked_device(device: str) -> str:
    """`cpu` or `cuda`, of which `auto` picks one. Raises ConfigError for another word, or CUDA where there is none."""
    import torch

    if device not in DEVICES:
        raise ConfigError("device", device, "unknown device", f"use one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", device, "PyTorch sees no CUDA device here", "use device=cpu or device=auto")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _check_train(train: TrainConfig, schedule: ScheduleConfig) -> None:
    def refuse(key: str, rule: str, remedy: str) -> None:
        raise ConfigError(f"train.{key}", getattr(train, key), rule, remedy)

    for key in ("global_batch_size", "sequence_length", "log_every"):
        if getattr(train, key) < 1:
            refuse(key, "it must be at least 1", "choose a positive number")
    free = ("validate_every", "evaluate_every", "layers_every", "validation_tokens", "grad_clip")
    for key in (*free, "sample_tokens", "sample_temperature", "hang_timeout"):
        if not getattr(train, key) >= 0:  # NaN too
            refuse(key, "it can't be negative", "use 0 to switch it off")
    for key in ("max_steps", "max_tokens", "stop_at_step", "micro_batch_size"):
        if getattr(train, key) is not None and getattr(train, key) < 1:
            refuse(key, "it must be at least 1", "choose a positive number, or null")
    if train.max_minutes is not None and not train.max_minutes > 0:
        refuse("max_minutes", "it must be above 0", "give minutes, or null for no limit")
    if train.recompute not in RECOMPUTE_LEVELS:
        refuse("recompute", "unknown level", f"use one of {', '.join(RECOMPUTE_LEVELS)}")
    if train.max_steps is None and train.max_tokens is None and schedule.phases is None:
        refuse("max_steps", "nothing says how long to train", "set train.max_steps or train.max_tokens")
    if train.profile is not None and not (len(train.profile) == 2 and 1 <= train.profile[0] < train.profile[1]):
        refuse("profile", "it must be [start,stop] with 1 <= start < stop", "profile steps 5 to 9 with [5,10], or null")


def _check_plan(made: Settings) -> None:
    """What this model and this layout ask of each phase; without phases train is the only one."""
    train, sizes = made.train, made.topology.sizes
    if train.profile is not None and train.profile[0] > made.plan.total_steps:
        rule = f"the run ends at step {made.plan.total_steps}"
        raise ConfigError("train.profile", train.profile, rule, "start earlier")
    for index, phase in enumerate(made.plan.phases):
        prefix = "train" if made.schedule.phases is None else f"schedule.phases.{index}"
        for batch, _ in phase.batches:
            check_batch(batch, phase.micro_batch_size, sizes.data, prefix)
        check_layout_of(made.model, sizes, phase.sequence_length, f"{prefix}.sequence_length")
        check_attention_mode(made.model, phase.attention_mode, f"{prefix}.attention_mode")
    train.micro_batch_size = made.micro_batch(made.plan.last)
