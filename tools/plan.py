"""Layouts for a model on so many GPUs: those that fit, best first, from formulas alone; the best as a configuration.

    python tools/plan.py model=flash gpus=256 gpu_memory=80 write=conf/parallelism/mine.yaml
    python tools/plan.py model=pro gpus=1024 hardware=h800 train.global_batch_size=6144 train.recompute=block

Then `parallelism=mine` with the keys that the file's head names. The file lies in a folder `parallelism`, and replaces
none but an earlier one of this program. Keys of conf/plan.yaml describe the machine; all else are overrides of conf/,
as in launch/pretrain.py. Precision, length and batch are those of a large run (`assumed` in conf/plan.yaml) unless the
command line or an experiment gives them; a schedule with phases says the last two itself. What else these give of
`parallelism`, `train.micro_batch_size` and `train.recompute` holds for every layout that is tried. Step times serve to
compare layouts: they rest on the few numbers of conf/plan.yaml. What memory is made of: `tools/estimate.py` with the
layout.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from v4train.analysis.memory import GIB, Memory, least_memory, stage_memory
from v4train.analysis.parameters import Share, stage_shares
from v4train.analysis.step_time import Device, StepTime, Use, bubble_fraction, step_time
from v4train.analysis.work import Work
from v4train.errors import ConfigError, refusing_bad_input
from v4train.estimation import of_step, read_batch, read_layout, read_steps
from v4train.model.config import ModelConfig, model_config
from v4train.model.rules import RECOMPUTE_LEVELS
from v4train.overrides import chosen_option, complete, composed, config_dir, is_said
from v4train.parallel import option_file
from v4train.parallel.rules import check_layout_of
from v4train.parallel.sizes import AXES, ParallelismConfig, Sizes, check_values
from v4train.rules import check_compile
from v4train.structured import structured, wants_help

FORMATS = ("table", "json")
ROWS = (1, 2, 4, 8)  # of a micro-batch that are tried
WIDTH = 140  # of a table that no terminal shows
ALIKE = 1.02  # times within this ratio are taken to be equal: the layout with more memory left is the better one


@dataclass
class Assumed:
    """Values and their meaning: conf/plan.yaml."""

    precision: str
    train: dict[str, Any]


@dataclass
class PlanConfig:
    """Values and their meaning: conf/plan.yaml."""

    gpus: int
    gpu_memory: float | None
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
    assumed: Assumed
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
        for name, device in self.devices.items():
            device.check(f"devices.{name}")
        for key, high in (("gpu_memory", 1e6), ("efficiency", 1)):
            value = getattr(self, key)
            if value is not None and not 0 < value <= high:
                raise ConfigError(key, value, f"it must lie above 0, up to {high:g}", "see conf/plan.yaml")
        for key in ("headroom", "overlap"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "it must lie in [0, 1)", "see conf/plan.yaml")

    @property
    def device(self) -> Device:
        return self.devices[self.hardware]

    @property
    def memory(self) -> float:
        """GiB of a GPU."""
        return self.device.memory if self.gpu_memory is None else self.gpu_memory

    @property
    def room(self) -> float:
        """Bytes of a rank that a layout may use."""
        return self.memory * GIB * (1 - self.headroom)


@dataclass(frozen=True)
class Plan:
    """A layout that fits: what a rank needs at most, and how long a step takes.

    rows: of the micro-batches, where this program chose them; None where the run says so.
    """

    rows: int | None
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
    if options.write is not None:
        option_file.check(Path(options.write))
    overrides = completed(overrides, options.assumed)
    config = composed("pretrain", overrides)
    complete(config, overrides)
    plans = Search(config, overrides, options).best_first()
    if options.write is not None:
        best, path = plans[0], Path(options.write)
        option_file.write(path, str(config.model.name), best.work, best.memory, overrides, best.rows)
    if options.format == "json":
        print(json.dumps([as_json(plan) for plan in plans[: options.show]], indent=1))
    else:
        print(table(plans, str(config.model.name), options))


def completed(overrides: list[str], assumed: Assumed) -> list[str]:
    """With what is assumed of a run and neither the command line, an experiment nor phases say."""
    config = composed("pretrain", overrides)
    values = {"precision": assumed.precision}
    if config.schedule.phases is None:
        values |= {f"train.{key}": value for key, value in assumed.train.items()}
    return [*overrides, *(f"{key}={value}" for key, value in values.items() if not is_said(key, config, overrides))]


class Search:
    """Every layout of the model on the GPUs, within the limits of `options` and what the command line fixes."""

    def __init__(self, config: DictConfig, overrides: list[str], options: PlanConfig) -> None:
        """Raises ConfigError for what no layout could have."""
        self.options, self.batch, self.model = options, read_batch(config), model_config(config.model)
        self.steps = read_steps(config, self.model)
        self.fixed = fixed_sizes(config, overrides)
        check_fixed(self.fixed, self.model, options.gpus)
        check_compile(config.compile, self.fixed.get("tensor", 1))
        self.max_tensor = 1 if config.compile else options.max_tensor
        self.recompute = list(RECOMPUTE_LEVELS)
        if is_said("train.recompute", config, overrides):
            self.recompute = [self.batch.recompute]
        self.words = self._words(config)
        self._shares: dict[tuple[int, ...], list[Share]] = {}
        self._bounds: dict[Work, float] = {}

    def best_first(self) -> list[Plan]:
        """Raises ConfigError where no layout fits."""
        plans, too_large = [], []
        use = Use(self.options.efficiency, self.options.overlap)
        for rows, works in self._works():
            bound = max(self._bound(work) for work in works)
            if bound > self.options.room:  # activations can't help
                too_large.append((bound, works))
                continue
            memory = self._memory(works)
            if memory.total > self.options.room:
                too_large.append((memory.total, works))
                continue
            time = step_time(self.model, works[-1], self.options.device, use, self._of(works[-1]))
            plans.append(Plan(rows, works[-1], memory, time))
        if not plans:
            self._refuse(too_large)
        return ordered(plans)

    def _works(self) -> Iterator[tuple[int | None, list[Work]]]:
        """Rows of a micro-batch that are tried, and what each layout does, one of each phase's kinds of steps after
        another."""
        for sizes in self._sizes():
            axes = {axis: getattr(sizes, axis) for axis in (*AXES, "expert")}
            stages = [self.fixed["zero_stage"]] if "zero_stage" in self.fixed else range(2 if sizes.pipeline > 1 else 4)
            for stage, recompute in itertools.product(stages, self.recompute):
                layout = replace(self.words, **axes, recompute=recompute, zero_stage=stage)
                tried = [None] if all(step.micro_batch_size for step in self.steps) else ROWS
                for rows in tried:
                    steps = [step._replace(micro_batch_size=step.micro_batch_size or rows) for step in self.steps]
                    try:
                        works = [of_step(layout, self.model, step) for step in steps]
                    except ConfigError:
                        continue
                    yield rows, list(dict.fromkeys(works))

    def _sizes(self) -> Iterator[Sizes]:
        limits, gpus = self.options, self.options.gpus
        axes = {"pipeline": limits.max_pipeline, "tensor": self.max_tensor, "context": limits.max_context}
        choices = [
            [self.fixed[axis]] if axis in self.fixed else [n for n in divisors(gpus) if n <= limit]
            for axis, limit in axes.items()
        ]
        for pipeline, tensor, context in itertools.product(*choices):
            replicas, left = divmod(gpus, pipeline * tensor)
            data, rest = divmod(replicas, context)
            if left or rest or self.fixed.get("data", data) != data:
                continue
            experts = divisors(replicas)
            if "expert" in self.fixed:
                experts = [self.fixed["expert"] or replicas]
            for expert in experts:
                if replicas % expert == 0:
                    yield Sizes(pipeline, data, context, tensor, expert)

    def _of(self, work: Work) -> list[Share]:
        key = (work.pipeline, work.tensor, work.expert)
        if key not in self._shares:
            self._shares[key] = stage_shares(self.model, work)
        return self._shares[key]

    def _bound(self, work: Work) -> float:
        """Bytes that the fullest rank can't get below, whatever its micro-batches and recomputation."""
        several = min(work.accumulation, 2)  # or one: all that counts here
        key = replace(work, sequence_length=work.context, rows=1, accumulation=several, recompute="none", mode="sparse")
        if key not in self._bounds:
            self._bounds[key] = max(least_memory(share, key).total for share in self._of(work))
        return self._bounds[key]

    def _memory(self, works: list[Work]) -> Memory:
        """Of the fullest rank, in the phase that needs most."""
        found = (memory for work in works for memory in stage_memory(self.model, work, self._of(work)))
        return max(found, key=lambda memory: memory.total)

    def _words(self, config: DictConfig) -> Work:
        """What every layout shares: optimizer, precision, DeepSpeed's keys; checked as a run's would be, on a rank."""
        alone = config.copy()
        alone.parallelism.update({"data": None, "context": 1, "tensor": 1, "pipeline": 1, "expert": 1, "zero_stage": 1})
        device = "cpu" if self.options.hardware == "cpu" else "cuda"
        return replace(read_layout(alone, self.model, 1), device=device)

    def _refuse(self, too_large: list[tuple[float, list[Work]]]) -> None:
        """too_large: what each layout needs at least, and does."""
        options, least = self.options, math.inf
        for bound, works in sorted(too_large, key=lambda of: of[0]):
            if bound >= least:  # so do the others
                break
            least = min(least, self._memory(works).total)
        if too_large:
            rule = f"the smallest layout tried needs {least / GIB:.1f} GiB a GPU, {options.headroom:.0%} kept free"
            remedy = "give more gpus, a shorter train.sequence_length, or raise max_pipeline, max_tensor, max_context"
            raise ConfigError("gpu_memory", options.memory, rule, remedy)
        rows = " and ".join(dict.fromkeys(str(step.global_batch_size) for step in self.steps))
        rule = f"no layout of {options.gpus} GPUs shares out {rows} rows of a step"
        if self.fixed:
            rule += " with " + ", ".join(
                f"parallelism.{key}={'all' if size is None else size}" for key, size in self.fixed.items()
            )
        remedy = "make train.global_batch_size a multiple of it, raise max_pipeline, max_tensor or max_context"
        raise ConfigError("gpus", options.gpus, rule, remedy + (", or fix less of parallelism" if self.fixed else ""))


def fixed_sizes(config: DictConfig, overrides: list[str]) -> dict[str, int | None]:
    """Of `parallelism` what the command line or an experiment says, by single keys or by an option; None of expert: all
    ranks."""
    options = config_dir() / "parallelism"
    auto, option = OmegaConf.load(options / "auto.yaml"), options / f"{chosen_option('parallelism', overrides)}.yaml"
    words = [word.lstrip("+").partition("=")[0] for word in overrides]
    given = {word.removeprefix("parallelism.") for word in words if word.startswith("parallelism.")}
    given |= {key for key, value in config.parallelism.items() if value != auto.get(key)}
    if option.stem != "auto" and option.exists():  # auto has every key, and decides none
        given |= set(OmegaConf.load(option))
    parallelism = structured(ParallelismConfig, config.parallelism, "parallelism")
    check_values(parallelism)
    known = {key: getattr(parallelism, key) for key in (*AXES, "expert", "zero_stage") if key in given}
    return {key: size for key, size in known.items() if size is not None or key == "expert"}


def check_fixed(fixed: dict[str, int | None], model: ModelConfig, gpus: int) -> None:
    """Raise ConfigError, by its key, for a size that so many GPUs or the model don't divide into."""
    sizes = {axis: fixed[axis] for axis in (*AXES, "expert") if fixed.get(axis)}
    left = gpus
    for axis in AXES:
        size = sizes.get(axis, 1)
        if left % size:
            others = " x ".join(f"{name} {sizes[name]}" for name in AXES[: AXES.index(axis)] if name in sizes)
            rule = f"it must divide {gpus} GPUs" + (f" over {others}" if others else "")
            raise ConfigError(f"parallelism.{axis}", size, rule, f"for example {math.gcd(size, left)}")
        left //= size
    expert, replicas = sizes.get("expert", 1), gpus // (sizes.get("pipeline", 1) * sizes.get("tensor", 1))
    if replicas % expert:
        rule = f"it must divide {gpus} GPUs over pipeline x tensor, {replicas}"
        raise ConfigError("parallelism.expert", expert, rule, f"for example {math.gcd(expert, replicas)}")
    check_layout_of(model, Sizes(**sizes), sizes.get("context", 1))


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
        "memory_gib": {name: size / GIB for name, size in memory.parts.items()} | {"total": memory.total / GIB},
        "memory_phase": memory.phase,
        "seconds": {k: v for k, v in asdict(time).items() if k not in ("traffic", "mfu")} | {"total": time.total},
        "traffic_gib": {axis: sent / GIB for axis, sent in time.traffic.items()},
        "bubble": bubble_fraction(work),
        "mfu": time.mfu,
        "tokens_per_second": work.step_tokens / time.total,
    }


def table(plans: list[Plan], model: str, options: PlanConfig) -> str:
    work = plans[0].work
    title = f"{model} on {options.gpus} x {options.hardware}, {options.memory:g} GiB each: {len(plans)} layouts fit"
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


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
