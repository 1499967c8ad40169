"""Pictures that take runs together which differ in their seed only: a line for the mean, shade from least to most."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from v4train.report.figures import Picture
from v4train.report.groups import Group, groups_of
from v4train.report.names import short_names
from v4train.report.runs import Run
from v4train.report.smoothing import SMOOTHING_SHARE, smooth
from v4train.report.style import COLORS, REFERENCE, finish, marker_style, new_figure


def draw_recall(runs: list[Run]) -> Figure | None:
    """Accuracy by distance, at the last evaluation, and that of a guess."""
    groups = [group for group in groups_of(runs) if group.recall]
    if not groups:
        return None
    figure, axes = new_figure()
    for color, name, group in _named(groups):
        distances = np.array(list(group.recall))
        means, least, most = (np.array([f(of) for of in group.recall.values()]) for f in (np.mean, np.min, np.max))
        axes.plot(distances, means, "o-", color=color, linewidth=1.4, markersize=4, label=name)
        axes.fill_between(distances, least, most, color=color, alpha=0.15, linewidth=0)
    chances = {1 / run.config["evaluation"]["recall_values"] for run in runs}
    for chance in chances:
        axes.axhline(chance, color=REFERENCE, linestyle="--", linewidth=1, label="a guess")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 1.03)
    finish(axes, "accuracy")
    axes.set_xlabel("tokens between value and repetition", fontsize=9)
    return figure


def draw_together(runs: list[Run], keys: tuple[str, ...], label: str, log: bool = False) -> Figure | None:
    """Keys by tokens, the second one dashed; only where some runs differ in their seed alone."""
    runs = [run for run in runs if run.steps]
    groups = groups_of(runs)
    if len(groups) == len(runs):
        return None
    figure, axes = new_figure()
    for color, name, group in _named(groups):
        for key, style in zip(keys, ("-", "--"), strict=False):
            _band(axes, *group.course(key), color, style, name if style == "-" else None)
    if not axes.lines:
        return None
    if log:
        axes.set_yscale("log")
    finish(axes, label, "tokens")
    return figure


def draw_gain(runs: list[Run]) -> Figure | None:
    """Of all sites together, by step: forward of the last layer, dashed backward of the first."""
    figure, axes = new_figure()
    for color, name, group in _named(groups_of([run for run in runs if run.steps])):
        for way, style in (("forward", "-"), ("backward", "--")):
            curves = [run.gains(way) for run in group.runs]
            steps = sorted(set.intersection(*map(set, curves)))
            values = np.array([[curve[step] for step in steps] for curve in curves])
            _band(axes, np.array(steps), values, color, style, name if style == "-" else None)
    if not axes.lines:
        return None
    axes.axhline(1, color=REFERENCE, linestyle=":", linewidth=1, label="plain residual")
    axes.set_yscale("log")
    finish(axes, "largest absolute sum")
    return figure


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, color: str, style: str, label: str | None) -> None:
    if not len(x):
        return
    values = np.array([smooth(row, SMOOTHING_SHARE * len(row)) for row in values])
    axes.plot(x, values.mean(0), style, color=color, linewidth=1.4, label=label, **marker_style(len(x)))
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _named(groups: list[Group]) -> Iterator[tuple[str, str, Group]]:
    """(colour, name for the legend, group)"""
    names = short_names([group.name for group in groups])
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        yield COLORS[number % len(COLORS)], name, group


def _together(*keys: str, label: str, log: bool = False) -> Callable[[list[Run]], Figure | None]:
    return partial(draw_together, keys=keys, label=label, log=log)


GROUP_PICTURES = {
    "validation_of_seeds": Picture(
        "Validation loss, seeds together",
        "mean; shaded from least to most",
        _together("val_loss", label="nats per token"),
    ),
    "violation_of_seeds": Picture(
        "Expert balance, seeds together",
        "max violation of the worst layer; shaded from least to most",
        _together("max_violation", label="max violation"),
    ),
    "recall": Picture("Recall by distance", "accuracy at the end; shaded: all seeds", draw_recall),
    "mixing_gain": Picture(
        "Gain of the streams",
        "of the product of all mixing matrices: row sum forward, dashed: column sum backward",
        draw_gain,
    ),
}
