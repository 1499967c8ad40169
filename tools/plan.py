"""Layouts for a model on so many GPUs: those that fit, best first, from formulas alone; the best as a configuration.

    python tools/plan.py model=flash gpus=256 gpu_memory=80 train.global_batch_size=4096 train.sequence_length=4096 \\
        precision=bf16 write=conf/parallelism/mine.yaml

Then `parallelism=mine` with the `train.*` keys that the file's head names. Keys of conf/plan.yaml describe the
machine; all else are overrides of conf/, as in launch/pretrain.py. `parallelism.*` keys that are given hold for every
layout that is tried, as do `train.micro_batch_size` and `train.recompute`. Step times serve to compare layouts: they
rest on the few numbers of conf/plan.yaml. What memory is made of: `tools/estimate.py` with the layout.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from v4train import durable
from v4train.analysis.memory import GIB, Memory, stage_memory, static_memory
from v4train.analysis.parameters import Share, stage_shares
from v4train.analysis.step_time import Device, StepTime, Use, bubble_fraction, step_time
from v4train.analysis.work import Work
from v4train.errors import ConfigError, refusing_bad_input
from v4train.estimation import read_batch, read_work
from v4train.model.config import ModelConfig, model_config
from v4train.model.rules import RECOMPUTE_LEVELS
from v4train.overrides import composed
from v4train.parallel.rules import check_layout_of
from v4train.parallel.sizes import Sizes
from v4train.structured import structured, wants_help

FORMATS = ("table", "json")
ROWS = (1, 2, 4, 8)  # of a micro-batch that are tried
WIDTH = 140  # of a table that no terminal shows
ALIKE = 1.02  # times within this ratio are taken to be equal: the layout with more memory left is the better one


@dataclass
class PlanConfig:
    """Values and their meaning: conf/plan.yaml."""

    gpus: int
    gpu_memory: float
    hardware: str
    write: str | None
    show: int
    format: str
    max_pipeline: int
    max_tensor: int
    max_context: int
    headroom: float
    efficiency: float
    overlap: float
    devices: dict[str, Device]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError("format", self.format, "unknown format", f"use one of {', '.join(FORMATS)}")
        if self.hardware not in self.devices:
            known = ", ".join(self.devices)
            raise ConfigError("hardware", self.hardware, "there is no such device", f"use one of {known}, or add one")
        for key in ("gpus", "show", "max_pipeline", "max_tensor", "max_context"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "it must be at least 1", "choose a positive number")
        for key, low, high in (("gpu_memory", 0, 1e6), ("efficiency", 0, 1)):
            if not low < getattr(self, key) <= high:
                raise ConfigError(
                    key, getattr(self, key), f"it must lie above {low}, up to {high:g}", "see conf/plan.yaml"
                )
        for key in ("headroom", "overlap"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "it must lie in [0, 1)", "see conf/plan.yaml")

    @property
    def device(self) -> Device:
        return self.devices[self.hardware]

    @property
    def room(self) -> float:
        """Bytes of a rank that a layout may use."""
        return self.gpu_memory * GIB * (1 - self.headroom)


@dataclass(frozen=True)
class Plan:
    """A layout that fits: what a rank needs at most, and how long a step takes."""

    work: Work
    memory: Memory
    time: StepTime


def main(arguments: list[str]) -> None:
    if wants_help(arguments):
        return print(__doc__)
    known = composed("plan", [])
    own = [word for word in arguments if word.lstrip("+~").partition("=")[0].partition(".")[0] in known]
    overrides = [word for word in arguments if word not in own]
    options = structured(PlanConfig, composed("plan", own), "")
    config = composed("pretrain", overrides)
    plans = Search(config, overrides, options).best_first()
    if options.write:
        write(plans[0], config, overrides, Path(options.write))
    if options.format == "json":
        print(json.dumps([as_json(plan) for plan in plans[: options.show]], indent=1))
    else:
        print(table(plans, str(config.model.name), options))


class Search:
    """Every layout of the model on the GPUs, within the limits of `options` and what the command line fixes."""

    def __init__(self, config: DictConfig, overrides: list[str], options: PlanConfig) -> None:
        self.config, self.options, self.batch = config, options, read_batch(config)
        self.model: ModelConfig = model_config(config.model)
        keys = {word.lstrip("+").partition("=")[0]: word for word in overrides}
        self.fixed = {
            axis: config.parallelism[axis]
            for axis in ("pipeline", "data", "context", "tensor", "expert", "zero_stage")
            if f"parallelism.{axis}" in keys and config.parallelism[axis] is not None
        }
        self.recompute = [self.batch.recompute] if "train.recompute" in keys else list(RECOMPUTE_LEVELS)
        self.words = self._words()
        self._shares: dict[tuple[int, ...], list[Share]] = {}

    def best_first(self) -> list[Plan]:
        """Raises ConfigError where no layout fits."""
        plans, least = [], None
        for work in self._works():
            memory = self._memory(work)
            if memory.total > self.options.room:
                least = min(least or memory.total, memory.total)
                continue
            use = Use(self.options.efficiency, self.options.overlap)
            plans.append(Plan(work, memory, step_time(self.model, work, self.options.device, use, self._of(work))))
        if not plans:
            self._refuse(least)
        return ordered(plans)

    def _works(self) -> Iterator[Work]:
        for sizes in self._sizes():
            try:
                check_layout_of(self.model, sizes, self.batch.sequence_length)
            except ConfigError:
                continue
            rows = self.batch.global_batch_size // sizes.data
            if self.batch.global_batch_size % sizes.data:
                continue
            micro = [self.batch.micro_batch_size] if self.batch.micro_batch_size else ROWS
            micro = [size for size in micro if rows % size == 0]
            stages = (0, 1) if sizes.pipeline > 1 else (0, 1, 2, 3)
            stages = (self.fixed["zero_stage"],) if "zero_stage" in self.fixed else stages
            for size, stage, recompute in itertools.product(micro, stages, self.recompute):
                axes = {axis: getattr(sizes, axis) for axis in ("pipeline", "data", "context", "tensor", "expert")}
                step = {"rows": size, "accumulation": rows // size, "recompute": recompute, "zero_stage": stage}
                yield replace(self.words, **axes, **step)

    def _sizes(self) -> Iterator[Sizes]:
        limits, gpus = self.options, self.options.gpus
        axes = {"pipeline": limits.max_pipeline, "tensor": limits.max_tensor, "context": limits.max_context}
        choices = [
            [self.fixed[axis]] if axis in self.fixed else [n for n in divisors(gpus) if n <= limit]
            for axis, limit in axes.items()
        ]
        for pipeline, tensor, context in itertools.product(*choices):
            replicas, left = divmod(gpus, pipeline * tensor)
            data, rest = divmod(replicas, context)
            if left or rest or self.fixed.get("data", data) != data:
                continue
            experts = [self.fixed["expert"]] if "expert" in self.fixed else divisors(replicas)
            for expert in experts:
                if replicas % expert == 0:
                    yield Sizes(pipeline, data, context, tensor, expert)

    def _of(self, work: Work) -> list[Share]:
        key = (work.pipeline, work.tensor, work.expert)
        if key not in self._shares:
            self._shares[key] = stage_shares(self.model, work)
        return self._shares[key]

    def _memory(self, work: Work) -> Memory:
        shares = self._of(work)
        static = max((static_memory(share, work) for share in shares), key=lambda memory: memory.total)
        if static.total - static.working > self.options.room:  # activations can't help
            return static
        return max(stage_memory(self.model, work, shares), key=lambda memory: memory.total)

    def _words(self) -> Work:
        """What every layout shares: length, optimizer, precision; checked as a run's would be, on a rank."""
        alone = self.config.copy()
        alone.parallelism.update({"data": None, "context": 1, "tensor": 1, "pipeline": 1, "expert": 1, "zero_stage": 1})
        alone.train.micro_batch_size = None
        return read_work(alone, self.model, 1)

    def _refuse(self, least: float | None) -> None:
        gpus, memory = self.options.gpus, self.options.gpu_memory
        if least is None:
            rule = f"no layout of {gpus} GPUs shares out {self.batch.global_batch_size} rows of a step"
            remedy = f"set train.global_batch_size to a multiple of {gpus}, or give fewer gpus"
            raise ConfigError("gpus", gpus, rule, remedy)
        rule = f"the smallest layout tried needs {least / GIB:.1f} GiB a GPU, {self.options.headroom:.0%} kept free"
        raise ConfigError("gpu_memory", memory, rule, "give more gpus, or a shorter train.sequence_length")


def ordered(plans: list[Plan]) -> list[Plan]:
    """By time; of those that take as long the one that needs less memory first."""
    plans = sorted(plans, key=lambda plan: plan.time.total)
    result = []
    while plans:
        limit = ALIKE * plans[0].time.total
        alike = [plan for plan in plans if plan.time.total <= limit]
        result += sorted(alike, key=lambda plan: plan.memory.total)
        plans = plans[len(alike) :]
    return result


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def as_json(plan: Plan) -> dict[str, Any]:
    work, memory, time = plan.work, plan.memory, plan.time
    return {
        "layout": asdict(work),
        "memory_gib": {name: size / GIB for name, size in asdict(memory).items()} | {"total": memory.total / GIB},
        "seconds": {k: v for k, v in asdict(time).items() if k not in ("traffic", "mfu")} | {"total": time.total},
        "traffic_gib": {axis: sent / GIB for axis, sent in time.traffic.items()},
        "bubble": bubble_fraction(work),
        "mfu": time.mfu,
        "tokens_per_second": work.step_tokens / time.total,
    }


def table(plans: list[Plan], model: str, options: PlanConfig) -> str:
    work = plans[0].work
    title = f"{model} on {options.gpus} x {options.hardware}, {options.gpu_memory:g} GiB each: {len(plans)} layouts fit"
    shown = Table(title=f"{title}; {work.step_tokens:,} tokens a step, {work.optimizer}, {work.precision}")
    for name in ("pipeline", "data", "context", "tensor", "expert", "ZeRO", "rows", "recompute"):
        shown.add_column(name, justify="right")
    for name in ("GiB", "sent GiB", "bubble", "step s", "MFU"):
        shown.add_column(name, justify="right")
    for plan in plans[: options.show]:
        work, time = plan.work, plan.time
        axes = (work.pipeline, work.data, work.context, work.tensor, work.expert, work.zero_stage, work.rows)
        shown.add_row(
            *map(str, axes),
            work.recompute,
            f"{plan.memory.total / GIB:.1f}",
            f"{sum(time.traffic.values()) / GIB:.1f}",
            f"{bubble_fraction(work):.0%}",
            f"{time.total:.2f}",
            f"{time.mfu:.0%}",
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().rstrip("\n")


def write(plan: Plan, config: DictConfig, overrides: list[str], path: Path) -> None:
    """The layout as an option of the config group `parallelism`, and in its head what belongs to it."""
    work, room = plan.work, f"{plan.memory.total / GIB:.1f} GiB a rank by its formulas"
    given = [word for word in overrides if not word.startswith(("parallelism", "train.micro", "train.recompute"))]
    given += [f"parallelism={path.stem}", f"train.micro_batch_size={work.rows}", f"train.recompute={work.recompute}"]
    values = {
        f"data: {work.data}": "data-parallel replicas",
        f"expert: {work.expert}": "ranks that share one set of experts, among data x context",
        f"tensor: {work.tensor}": "ranks that share one matrix",
        f"pipeline: {work.pipeline}": "stages of layers",
        f"context: {work.context}": "ranks that share one sequence",
        f"zero_stage: {work.zero_stage}": "sharded: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters",
    }
    lines = [
        f"# {config.model.name} on {work.world} ranks, by tools/plan.py: {room}.",
        f"#   srun --ntasks={work.world} --kill-on-bad-exit=1 python launch/pretrain.py {' '.join(given)}",
        *("defaults:", "  - auto", "  - _self_"),
        *(f"{value:20}# {meaning}" for value, meaning in values.items()),
    ]
    text = "\n".join(lines) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, text.encode())
    except OSError as error:
        raise ConfigError("write", path, f"it can't be written ({error.strerror})", "name a file that can") from error


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
