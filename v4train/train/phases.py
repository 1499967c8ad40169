"""What a run does at each of its steps: phases by token budget, as a pure function of the step (DESIGN 9).

A phase ends with the first step that reaches its tokens. Its batch may grow on the way, in equal increments, each size
for an equal share of the ramp's tokens. `Plan.at` says what a step is; nothing is remembered from step to step, so a
run continues in the middle of any phase. No layout and no micro-batch enters, so that all layouts train the same.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from v4train.errors import ConfigError
from v4train.model.rules import ATTENTION_MODES
from v4train.optim.schedules import ScheduleConfig, decay, decayed, warmup, warmup_steps
from v4train.structured import structured

if TYPE_CHECKING:
    from v4train.config import TrainConfig
    from v4train.model import ModelConfig

OPTIONAL = ("micro_batch_size", "learning_rate", "mtp_weight", "balance_weight", "bias_update_speed")


@dataclass
class RampConfig:
    """A batch that grows from `start` by `increment` to `end` sequences, which it has after `tokens` of its phase."""

    start: int
    end: int
    increment: int
    tokens: int


@dataclass
class PhaseConfig:
    """Values and their meaning: docs/schedules.md. None: what the model and train say."""

    name: str
    tokens: int
    sequence_length: int
    global_batch_size: Any  # a number of sequences, or a RampConfig
    attention_mode: str
    micro_batch_size: int | None
    learning_rate: float | None
    mtp_weight: float | None
    balance_weight: float | None
    bias_update_speed: float | None

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(sequences of a step, tokens of the phase after which the next size comes), in order."""
        ramp = self.global_batch_size
        if not isinstance(ramp, RampConfig):
            return [(ramp, self.tokens)]
        count = (ramp.end - ramp.start) // ramp.increment
        growing = [(ramp.start + i * ramp.increment, -(-ramp.tokens * (i + 1) // count)) for i in range(count)]
        return [*growing, (ramp.end, self.tokens)]


class Stage(NamedTuple):
    """What one step is."""

    index: int  # of its phase
    name: str
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int | None
    attention_mode: str
    learning_rate: float
    mtp_weight: float
    balance_weight: float
    bias_update_speed: float

    @property
    def tokens(self) -> int:
        """Of the step, over all ranks."""
        return self.global_batch_size * self.sequence_length


class Stretch(NamedTuple):
    """Consecutive steps of one phase and batch size."""

    phase: int
    batch: int
    first: int  # step
    steps: int
    tokens: int  # before it
    step_tokens: int


@dataclass(frozen=True)
class Weights:
    """Of a model's losses, and the speed of its selection biases: what phases leave as it is."""

    mtp: float
    balance: float
    bias_speed: float


class Plan:
    """Of a whole run.

    Args:
        weights: of the model.
        max_steps, max_tokens: where the run ends if that is before the phases do. The learning rate stays that of the
            whole plan.

    Attributes:
        total_steps, total_tokens: of the run, cut short or not.
    """

    def __init__(
        self,
        phases: list[PhaseConfig],
        schedule: ScheduleConfig,
        weights: Weights,
        max_steps: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.phases, self.schedule, self.weights = phases, schedule, weights
        self.stretches = _stretches(phases)
        self._firsts = [stretch.first for stretch in self.stretches]
        last = self.stretches[-1]
        self._steps, self._tokens = last.first + last.steps, last.tokens + last.steps * last.step_tokens
        limits = [self._steps] if max_steps is None else [self._steps, max_steps]
        if max_tokens is not None and max_tokens < self._tokens:
            limits.append(self._first_step_after(max_tokens))
        self.total_steps = min(limits)
        self.total_tokens = self.tokens_before(self.total_steps)

    def at(self, step: int) -> Stage:
        """Of step `step`, counted from 0. What lies behind the end is like the last one."""
        stretch = self._stretch(step)
        phase = self.phases[stretch.phase]
        over = decayed(self.tokens_before(step + 1), self._tokens, self.stretches[-1].step_tokens, self.schedule)
        mtp = _given(self.schedule.mtp_weight_in_decay if over > 0 else None, self.weights.mtp)
        return Stage(
            index=stretch.phase,
            name=phase.name,
            sequence_length=phase.sequence_length,
            global_batch_size=stretch.batch,
            micro_batch_size=phase.micro_batch_size,
            attention_mode=phase.attention_mode,
            learning_rate=self._learning_rate(step, stretch.phase, over),
            mtp_weight=_given(phase.mtp_weight, mtp),
            balance_weight=_given(phase.balance_weight, self.weights.balance),
            bias_update_speed=_given(phase.bias_update_speed, self.weights.bias_speed),
        )

    @property
    def last(self) -> Stage:
        """Of the whole plan, cut short or not."""
        return self.at(self._steps - 1)

    def tokens_before(self, step: int) -> int:
        """Tokens that the steps before `step` are trained on, over all ranks, padding included."""
        stretch = self._stretch(step)
        return stretch.tokens + (step - stretch.first) * stretch.step_tokens

    def history(self, step: int) -> list[list[Any]]:
        """[steps, sequence length, global batch size, attention mode] of what lies before `step`: plain values."""
        found: list[list[Any]] = []
        for stretch in self.stretches:
            steps = step - stretch.first if stretch is self.stretches[-1] else min(step - stretch.first, stretch.steps)
            phase = self.phases[stretch.phase]
            what = [phase.sequence_length, stretch.batch, phase.attention_mode]
            if steps > 0 and found and found[-1][1:] == what:
                found[-1][0] += steps
            elif steps > 0:
                found.append([steps, *what])
        return found

    def check_continues(self, step: int, history: list[list[Any]] | None) -> None:
        """Raise ConfigError where a checkpoint of step `step` with that `history` was trained by other phases.

        Phases that have not begun may change. Without phases, batch size and mode may change too: nothing is counted
        from the run's beginning. history: None of a checkpoint older than this.
        """
        own = self.history(step)
        if self.schedule.phases is not None and history is not None and history != own:
            rule = f"the checkpoint's {step} steps [steps, length, batch, mode] were {history}, not {own}"
            remedy = "change only phases that have not begun, or use another run.name"
            raise ConfigError("schedule.phases", [phase.name for phase in self.phases], rule, remedy)

    def lines(self) -> list[tuple[str, str]]:
        """Name and description of each phase that the run gets to."""
        found = []
        for index, phase in enumerate(self.phases):
            own = [of for of in self.stretches if of.phase == index and of.first < self.total_steps]
            if not own:
                continue
            first, last = own[0].first, min(own[-1].first + own[-1].steps, self.total_steps)
            batches = dict.fromkeys(f"{of.batch:,}" for of in (own[0], own[-1]))
            tokens = self.tokens_before(last) - self.tokens_before(first)
            size = f"{' to '.join(batches)} x {phase.sequence_length:,}"
            what = f"steps {first + 1:,} to {last:,}: {tokens:,} tokens, {size} a step, {phase.attention_mode}"
            found.append((phase.name, what))
        return found

    def _learning_rate(self, step: int, index: int, over: float) -> float:
        phase, schedule = self.phases[index], self.schedule
        peak = _given(phase.learning_rate, schedule.learning_rate)
        if phase.attention_mode == "indexer_warmup" and phase.learning_rate is not None:
            first = next(stretch.first for stretch in self.stretches if stretch.phase == index)
            return peak * warmup(step - first, schedule.min_warmup_steps)
        return peak * warmup(step, warmup_steps(self._steps, schedule)) * decay(over, schedule)

    def _stretch(self, step: int) -> Stretch:
        return self.stretches[bisect_right(self._firsts, step) - 1]

    def next_change(self, step: int) -> int:
        """The first step after `step` that has another length, batch or mode; the run's end where none has."""
        stretch = self._stretch(step)
        return self.total_steps if stretch is self.stretches[-1] else stretch.first + stretch.steps

    def _first_step_after(self, tokens: int) -> int:
        """Steps that it takes to reach so many tokens."""
        stretch = next(of for of in reversed(self.stretches) if of.tokens < tokens)
        return stretch.first - (stretch.tokens - tokens) // stretch.step_tokens


def _stretches(phases: list[PhaseConfig]) -> list[Stretch]:
    found, step, tokens = [], 0, 0
    for index, phase in enumerate(phases):
        begun = tokens
        for batch, until in phase.batches:
            step_tokens = batch * phase.sequence_length
            steps = -((tokens - begun - until) // step_tokens)  # rounded up
            if steps > 0:
                found.append(Stretch(index, batch, step, steps, tokens, step_tokens))
                step, tokens = step + steps, tokens + steps * step_tokens
    return found


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def make_plan(schedule: ScheduleConfig, train: "TrainConfig", model: "ModelConfig") -> Plan:
    """Of a run: of `schedule.phases`, or of the one phase that `train` describes. Raises ConfigError."""
    weights = Weights(model.mtp.loss_weight, model.moe.balance_loss_weight, model.moe.bias_update_speed)
    if schedule.phases is not None:
        phases = read_phases(schedule.phases)
        for phase in phases:
            phase.micro_batch_size = phase.micro_batch_size or train.micro_batch_size
        return Plan(phases, schedule, weights, train.max_steps, train.max_tokens)
    step_tokens = train.global_batch_size * train.sequence_length
    limits = [] if train.max_steps is None else [train.max_steps]
    if train.max_tokens is not None:
        limits.append(-(-train.max_tokens // step_tokens))
    sizes = (train.sequence_length, train.global_batch_size)
    others = dict.fromkeys(OPTIONAL) | {"micro_batch_size": train.micro_batch_size}
    phase = PhaseConfig(train.attention_mode, min(limits) * step_tokens, *sizes, train.attention_mode, **others)
    return Plan([phase], schedule, weights)


def read_phases(values: Any) -> list[PhaseConfig]:
    """Typed phases of the list in a configuration.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a value that no layout and no model takes.
    """
    if not isinstance(values, list) or not values:
        raise ConfigError(
            "schedule.phases", values, "it must be a list of phases", "see docs/schedules.md, or use null"
        )
    phases = [_read_phase(value, f"schedule.phases.{number}") for number, value in enumerate(values)]
    names = [phase.name for phase in phases]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(f"schedule.phases.{number}.name", name, "another phase has it", "give each its own")
    return phases


def _read_phase(values: Any, key: str) -> PhaseConfig:
    if not isinstance(values, dict):
        raise ConfigError(key, values, "a phase is a group of keys", "see docs/schedules.md")
    phase = structured(PhaseConfig, dict.fromkeys(OPTIONAL) | values, key)
    batch = phase.global_batch_size
    if isinstance(batch, dict):
        phase.global_batch_size = structured(RampConfig, batch, f"{key}.global_batch_size")

    def refuse(name: str, rule: str, remedy: str) -> None:
        raise ConfigError(f"{key}.{name}", getattr(phase, name), rule, remedy)

    for name in ("tokens", "sequence_length", "micro_batch_size"):
        if getattr(phase, name) is not None and getattr(phase, name) < 1:
            refuse(name, "it must be at least 1", "choose a positive number")
    for name in OPTIONAL[1:]:
        if getattr(phase, name) is not None and not 0 <= getattr(phase, name) < math.inf:
            refuse(name, "it must be a finite number, not negative", "use 0 for none, or leave it out")
    if phase.attention_mode not in ATTENTION_MODES:
        refuse("attention_mode", "unknown mode", f"use one of {', '.join(ATTENTION_MODES)}")
    if isinstance(phase.global_batch_size, RampConfig):
        _check_ramp(phase.global_batch_size, phase.tokens, f"{key}.global_batch_size")
    elif type(batch) is not int or batch < 1:
        refuse("global_batch_size", "it must be a number of sequences, at least 1, or a ramp", "see docs/schedules.md")
    step = phase.batches[-1][0] * phase.sequence_length
    if phase.tokens < step:
        refuse("tokens", f"it is less than the {step:,} of one step", "make it larger, or the step smaller")
    return phase


def _check_ramp(ramp: RampConfig, tokens: int, key: str) -> None:
    def refuse(name: str, rule: str, remedy: str) -> None:
        raise ConfigError(f"{key}.{name}", getattr(ramp, name), rule, remedy)

    if not 1 <= ramp.start < ramp.end:
        refuse("start", f"it must lie between 1 and end={ramp.end}, below it", "a ramp grows")
    if ramp.increment < 1 or (ramp.end - ramp.start) % ramp.increment:
        growth = ramp.end - ramp.start
        refuse("increment", f"end - start = {growth} must be a multiple of it", f"for example {growth}")
    if not 1 <= ramp.tokens <= tokens:
        refuse("tokens", f"it must lie between 1 and the phase's {tokens:,}", "make it smaller")
