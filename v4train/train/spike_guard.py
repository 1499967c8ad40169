"""Loss spikes (V4 report 4.2.3): what counts as one, and what a run does about it. Numbers in, decisions out.

A step is an outlier if its loss, or the logarithm of its gradient norm, lies far above the median of the steps before
it, measured by how much one step usually differs from the next: a median too, which outliers hardly move, nor the fall
of the loss. `patience` of them in a row are a spike, and so is one that lies `severe` times as far out. Of steps whose
gradient is not finite `max_skipped` in a row are one, or more than `max_skipped_share` of a window. A layer makes one
at once whose output is `activation_margin` larger than in any of the last `min_history` steps: a weight is broken.
All ranks decide alike, because all that is looked at has been summed over all of them.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from v4train.errors import ConfigError

CONSISTENT = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution
PLACES = ("auto", "memory", "disk")
TINY = 1e-30  # a limit is never 0, nor the logarithm's argument
ANTICIPATE = ("after_spike", "always", "never")


@dataclass
class GuardConfig:
    """Values and their meaning: conf/guard/default.yaml."""

    enabled: bool
    window: int
    min_history: int
    loss_threshold: float
    loss_margin: float
    gradient_threshold: float
    gradient_margin: float
    activation_margin: float
    patience: int
    severe: float
    max_skipped: int
    max_skipped_share: float
    snapshot: str
    snapshot_every: int
    skip_data: bool
    max_rollbacks: int
    calm_steps: int
    anticipate: str
    anticipation_steps: int
    anticipation_after: int

    def __post_init__(self) -> None:
        for key, known in (("snapshot", PLACES), ("anticipate", ANTICIPATE)):
            if getattr(self, key) not in known:
                raise ConfigError(f"guard.{key}", getattr(self, key), "unknown word", f"use one of {', '.join(known)}")
        for key in ("window", "patience", "max_skipped", "snapshot_every", "anticipation_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"guard.{key}", getattr(self, key), "it must be at least 1", "see conf/guard")
        margins = ("loss_threshold", "loss_margin", "gradient_threshold", "gradient_margin", "activation_margin")
        for key in (*margins, "max_rollbacks", "calm_steps", "anticipation_after"):
            if not getattr(self, key) >= 0:  # NaN too
                raise ConfigError(f"guard.{key}", getattr(self, key), "it can't be negative", "see conf/guard")
        if self.min_history < 2:
            raise ConfigError("guard.min_history", self.min_history, "a spread needs two steps", "see conf/guard")
        if not self.severe >= 1:
            rule = "an outlier lies beyond 1 times its limit"
            raise ConfigError("guard.severe", self.severe, rule, "use 1 to go back for every outlier")
        if not 0 < self.max_skipped_share <= 1:
            rule = "it must lie above 0 and be at most 1"
            raise ConfigError("guard.max_skipped_share", self.max_skipped_share, rule, "use 1 for never")
        if self.min_history > self.window:
            rule = f"the window holds only guard.window={self.window} steps"
            raise ConfigError("guard.min_history", self.min_history, rule, "make it at most as large")


def robust(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the standard deviation of the noise about the trend, by the median absolute deviation of differences.

    Of independent normal values it is theirs, with a linear trend as without. values: two at least.
    """
    changes = [after - before for before, after in pairwise(values)]
    usual = median(changes)
    return median(values), CONSISTENT / math.sqrt(2) * median(abs(change - usual) for change in changes)


def excess(value: float, history: Sequence[float], threshold: float, margin: float) -> float:
    """How far it is above the median of `history`, as a multiple of the limit: an outlier is above 1.

    The limit is `threshold` spreads, and at least `margin`. What is not finite is infinitely far.
    """
    if not math.isfinite(value):
        return math.inf
    middle, spread = robust(history)
    return (value - middle) / max(threshold * spread, margin, TINY)


class Spike(NamedTuple):
    """The last `steps` steps are bad; why, in words."""

    steps: int
    why: str


class SpikeDetector:
    """Looks at one step after the other.

    Attributes:
        reasons: why the last step was an outlier; none where it was none.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.reasons: list[str] = []
        self.losses: deque[float] = deque(maxlen=config.window)  # of steps that were no outliers
        self.gradients: deque[float] = deque(maxlen=config.window)  # logarithms of their gradient norms
        self.scales: deque[dict[str, float]] = deque(maxlen=config.min_history)  # logarithms of their layers' RMS
        self.skips: deque[bool] = deque(maxlen=config.window)  # whether each of the last updates was skipped
        self.bad = self.outliers = self.skipped = 0  # in a row, up to now; bad: skipped or an outlier

    def observe(
        self,
        loss: float,
        grad_norm: float,
        finite: bool,
        last: bool = False,
        activations: Mapping[str, float] | None = None,
    ) -> Spike | None:
        """What a step's figures mean. finite: the gradient was, and so the update was made.

        last: the step after it is of another kind (`settle`), whose figures couldn't confirm a suspicion, so that an
        outlier is a spike already. activations: root mean square of each layer's output.
        """
        limits, self.reasons = self.config, []
        self.skips.append(not finite)
        if not finite:
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
            return self._too_many_skipped()
        self.skipped = 0
        scales = {name: math.log(max(scale, TINY)) for name, scale in (activations or {}).items()}
        broken = self._broken(scales)
        far = math.inf if broken else self._look(loss, math.log(max(grad_norm, TINY)))
        if broken:
            self.reasons.append(broken)
        elif not self.reasons:
            self.scales.append(scales)
        if self.reasons:
            self.bad, self.outliers = self.bad + 1, self.outliers + 1
            at_once = last or far >= limits.severe
            return Spike(self.bad, " and ".join(self.reasons)) if at_once or self.outliers >= limits.patience else None
        self.bad = self.outliers = 0
        return None

    def _broken(self, scales: Mapping[str, float]) -> str:
        """Which layer's output is too large beside the last steps' largest, in words; empty if none is, or while there
        are too few steps: in a run's first ones layers may grow as fast. What is not finite is too large in any."""
        for name, scale in scales.items():
            if not math.isfinite(scale):
                return f"the output of {name} is {scale} (root mean square)"
        if len(self.scales) < self.config.min_history or not self.config.activation_margin:
            return ""
        for name, scale in scales.items():
            before = max(of.get(name, scale) for of in self.scales)
            if scale - before > self.config.activation_margin:
                return f"the output of {name} is {math.exp(scale):.3g} (root mean square) after {math.exp(before):.3g}"
        return ""

    def _too_many_skipped(self) -> Spike | None:
        why = "were skipped for a gradient that is not finite"
        if self.skipped >= self.config.max_skipped:
            return Spike(self.bad, f"{self.skipped} updates in a row {why}")
        if sum(self.skips) > self.config.max_skipped_share * self.config.window:
            return Spike(self.bad, f"{sum(self.skips)} of the last {len(self.skips)} updates {why}")
        return None

    def _look(self, loss: float, gradient: float) -> float:
        """Set `reasons`, or add the step to the history. Returns the larger excess.

        gradient: the logarithm of its norm. Over n steps a median is known to within 1/sqrt(n), so while the window is
        filling the limits are wider.
        """
        limits, far = self.config, [0.0]
        if not math.isfinite(loss):
            self.reasons.append(f"the loss is {loss}")
        if len(self.losses) >= limits.min_history:
            wider = math.sqrt(limits.window / len(self.losses))
            if math.isfinite(loss):
                far.append(excess(loss, self.losses, wider * limits.loss_threshold, wider * limits.loss_margin))
                if far[-1] > 1:
                    self.reasons.append(f"the loss is {loss:.4g} where {median(self.losses):.4g} is usual")
            widened = wider * limits.gradient_threshold, wider * limits.gradient_margin
            far.append(excess(gradient, self.gradients, *widened))
            if far[-1] > 1:
                usual = math.exp(median(self.gradients))
                self.reasons.append(f"the gradient norm is {math.exp(gradient):.3g} where {usual:.3g} is usual")
        if not self.reasons:
            self.losses.append(loss)
            self.gradients.append(gradient)
        return max(far)

    def settle(self) -> None:
        """What comes is not to be held against what was: another sequence length or attention mode.

        What is not finite is bad in any, so the count of skipped updates goes on.
        """
        self.losses.clear()
        self.gradients.clear()
        self.scales.clear()

    def begin_anew(self) -> None:
        """Forget what may have been the beginning of a spike: there is no snapshot from before it."""
        self.bad = self.outliers = self.skipped = 0
        self.skips.clear()

    def state_dict(self) -> dict[str, Any]:
        names = ("losses", "gradients", "scales", "skips")
        counts = {"bad": self.bad, "outliers": self.outliers, "skipped": self.skipped}
        return {name: list(getattr(self, name)) for name in names} | counts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        window = self.config.window
        self.losses, self.gradients = deque(state["losses"], maxlen=window), deque(state["gradients"], maxlen=window)
        # Absent: saved by an older version
        self.skips = deque(state.get("skips", []), maxlen=window)
        self.scales = deque(state.get("scales", []), maxlen=self.config.min_history)
        self.bad, self.outliers, self.skipped = state["bad"], state["outliers"], state["skipped"]


class SpikeGuard:
    """How often a run has gone back, where to, and how long its routing is anticipatory. Steps are those done.

    Attributes:
        rollbacks: since the last calm stretch.
        skipped, outliers: such steps so far, those that were gone back from too.
        anticipate_until: the step up to which routing is anticipatory.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config, self.detector = config, SpikeDetector(config)
        self.rollbacks = self.skipped = self.outliers = self.anticipate_until = 0
        self._last_spike = 0  # step
        self._first_row = 0  # of the first step that is bad
        self._used: set[int] = set()  # steps gone back to since the last calm stretch

    def observe(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        finite: bool,
        first_row: int,
        last: bool = False,
        activations: Mapping[str, float] | None = None,
    ) -> Spike | None:
        """What the figures of step number `step`, which began with row `first_row`, mean. See `SpikeDetector`."""
        self.skipped += not finite
        if not self.config.enabled:
            return None
        if self.rollbacks and step > self._last_spike + self.config.calm_steps:
            self.rollbacks, self._used = 0, set()
        good_before = self.detector.bad == 0
        spike = self.detector.observe(loss, grad_norm, finite, last, activations)
        self.outliers += bool(self.detector.reasons)
        if self.detector.bad and good_before:
            self._first_row = first_row
        return spike

    def choose(self, steps: Iterable[int], first_bad: int) -> int | None:
        """Which of the steps that can be gone back to; None if there is none before step `first_bad`.

        The newest one; but what spikes again after that may have been broken already there, so none that was gone
        back to already.
        """
        return max((step for step in steps if step < first_bad and step not in self._used), default=None)

    def went_back(self, seen_at: int, to: int) -> None:
        """A spike was seen at a step, and the run is at step `to` again."""
        self.rollbacks, self._last_spike = self.rollbacks + 1, max(self._last_spike, seen_at)
        self._used = {step for step in self._used if step < to} | {to}  # what lay behind it is made anew
        self.detector.begin_anew()  # nor do the updates count any more that were skipped before
        if self.config.anticipate == "after_spike":
            self.anticipate_until = seen_at + self.config.anticipation_after

    def gave_up(self) -> None:
        """Whoever starts the run again has thought of something: count anew."""
        self.rollbacks, self._used = 0, set()

    @property
    def exhausted(self) -> bool:
        """Whether the next spike ends the run."""
        return self.rollbacks >= self.config.max_rollbacks

    @property
    def first_row(self) -> int:
        """Row that the first of the bad steps began with."""
        return self._first_row

    def anticipates(self, step: int) -> bool:
        """Whether the step after `step` is to be routed by older parameters."""
        word = self.config.anticipate
        return word == "always" or word == "after_spike" and step < self.anticipate_until

    def state_dict(self) -> dict[str, Any]:
        names = ("rollbacks", "skipped", "outliers", "anticipate_until", "_last_spike", "_first_row")
        plain = {name.removeprefix("_"): getattr(self, name) for name in names}
        return {**plain, "used": sorted(self._used), "detector": self.detector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollbacks, self.skipped = state["rollbacks"], state["skipped"]
        self.outliers = state.get("outliers", 0)  # absent: saved by an older version
        self.anticipate_until, self._last_spike = state["anticipate_until"], state["last_spike"]
        self._first_row, self._used = state["first_row"], set(state["used"])
        self.detector.load_state_dict(state["detector"])
