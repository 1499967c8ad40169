"""Runs that differ in their seed only, taken together: means and spread of a comparison."""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from v4train.report.differences import leaves
from v4train.report.runs import Curve, Run
from v4train.train.run_directory import BOOKKEEPING

SEEDS = ("seed", "model.init.seed")
CLOSING = ("max_violation", "indexer_recall", "indexer_captured")  # averaged over a run's last part
LAST_SHARE = 0.1


@dataclass(frozen=True)
class Group:
    """Runs of one configuration. name: of the first run, without its seed."""

    name: str
    runs: list[Run]

    def course(self, key: str, by: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
        """Where all runs that have this key at all have a value: x [n], values [runs, n]."""
        curves = [curve for run in self.runs if len((curve := run.curve(key, by))[0])]
        if not curves:
            return np.empty(0), np.empty((0, 0))
        shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
        return np.array(shared), np.array([y[np.isin(x, shared)] for x, y in curves]).reshape(len(curves), -1)

    @cached_property
    def final_losses(self) -> np.ndarray:
        """Last validation loss of each run that has one."""
        return np.array([run.validations[-1]["val_loss"] for run in self.runs if run.validations])

    def tokens_to(self, loss: float) -> np.ndarray:
        """Tokens until the validation loss of each run that gets there is `loss`."""
        return np.array(
            [t for run in self.runs if (t := first_below(run.curve("val_loss", "tokens"), loss)) is not None]
        )

    @cached_property
    def recall(self) -> dict[int, np.ndarray]:
        """Accuracy of the last evaluation by distance, of each run that has one."""
        found: dict[int, list[float]] = defaultdict(list)
        for run in self.runs:
            for distance, accuracy in run.recall.items():
                found[distance].append(accuracy)
        return {distance: np.array(found[distance]) for distance in sorted(found)}

    def closing(self, key: str) -> np.ndarray:
        """A key of the training steps, averaged over the last tenth of each run that has it."""
        return np.array([of for run in self.runs if (of := closing_mean(run, key)) is not None])

    def last_gains(self, way: str) -> np.ndarray:
        """Of the product of all mixing matrices, as last logged by each run that has it. way: forward | backward."""
        return np.array([list(gains.values())[-1] for run in self.runs if (gains := run.gains(way))])


def groups_of(runs: list[Run]) -> list[Group]:
    """The runs by their configuration but for seeds and what changes no figure, in the order of each one's first.

    Those that have not finished, and have come less far than others of the configuration, are groups of their own.
    """
    found: dict[tuple[str, int | None], list[Run]] = defaultdict(list)
    furthest: dict[str, int] = defaultdict(int)
    for run in runs:
        own = leaves(run.config).items()
        kept = repr([(key, value) for key, value in own if key not in SEEDS and not BOOKKEEPING.match(key)])
        found[kept, None if run.finished else run.end].append(run)
        furthest[kept] = max(furthest[kept], run.end)
    return [Group(_name(of[0], end is not None and end < furthest[kept]), of) for (kept, end), of in found.items()]


def _name(run: Run, unfinished: bool) -> str:
    name = re.sub(r"[_,-]?seed=?\d+", "", run.name) or run.name
    return f"{name}, to step {run.end}" if unfinished else name


def first_below(curve: Curve, level: float) -> float | None:
    """Where a curve first comes down to the level, on a line between its points; None where it doesn't."""
    x, y = curve
    below = np.flatnonzero(y <= level)
    if not below.size:
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - level) / (y[i - 1] - y[i]))


def closing_mean(run: Run, key: str) -> float | None:
    """Mean over the run's last tenth; None where it has no values there, or nothing but zeros."""
    steps, values = run.curve(key)
    values = values[steps > (1 - LAST_SHARE) * run.end]
    return float(values.mean()) if values.any() else None


def group_figures(groups: list[Group]) -> list[dict[str, str]]:
    """Of each group in words by name: mean and, of several runs, standard deviation over their seeds.

    The loss that tokens are counted up to is the mean final one of the group that ends highest: all others get there.
    """
    losses = [group.final_losses.mean() for group in groups if len(group.final_losses)]
    level = max(filter(np.isfinite, losses), default=None)
    return [dict(_figures(group, level)) for group in groups]


def _figures(group: Group, level: float | None):
    yield "runs", str(len(group.runs))
    if len(group.final_losses):
        yield "validation loss", in_words(group.final_losses, "{:.4f}")
    if level is not None and len(group.runs) == len(tokens := group.tokens_to(level)):
        yield f"tokens to {level:.4f}", in_words(tokens, "{:,.0f}")
    for key in CLOSING:
        if len(values := group.closing(key)):
            yield f"{key.replace('_', ' ')}, last tenth", in_words(values, "{:.3f}")
    for way in ("forward", "backward"):
        if len(gains := group.last_gains(way)):
            yield f"gain {way}", in_words(gains.round(4), "{:.3g}")
    for distance, accuracies in group.recall.items():
        yield f"recall at {distance}", in_words(accuracies, "{:.3f}")


def in_words(values: np.ndarray, form: str) -> str:
    text = form.format(values.mean())
    return text if len(values) < 2 else f"{text} ± {form.format(values.std(ddof=1))}"
