"""Curves of a run's figures, of one run or of several over each other: functions from runs to a figure.

A function returns None where no run has anything to draw.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from v4train.report.names import short_names
from v4train.report.runs import Curve, Run
from v4train.report.smoothing import SMOOTHING_SHARE, smooth
from v4train.report.style import COLORS, REFERENCE, finish, line_style, marker_style, new_figure

SHADES = ("#f1f5f9", "#e2e8f0")  # of phases, in turn
SHORT = 1.0  # hours of a run below which minutes are shown


class Picture(NamedTuple):
    title: str
    caption: str
    draw: Callable[[list[Run]], Figure | None]


def draw_loss(runs: list[Run], by: str) -> Figure | None:
    """Training (smoothed) and validation; of a single run the raw values and the unigram entropy as well."""
    if not any(len(run.training_loss(by)[0]) for run in runs):
        return None
    figure, axes = new_figure()
    if len(runs) == 1:
        _draw_losses_of_one(axes, runs[0], by)
    else:
        for number, (run, name) in enumerate(zip(runs, short_names([run.name for run in runs]), strict=True)):
            x, smoothed = _smoothed(run.training_loss(by))
            axes.plot(
                x, smoothed, linewidth=1.6, label=name if len(x) else None, **line_style(number), **marker_style(len(x))
            )
            axes.plot(*run.curve("val_loss", by), marker="o", markersize=4, linewidth=0.8, **line_style(number))
    if by == "hours" and max(run.clock[1].max(initial=0) for run in runs) < SHORT:
        by = "minutes"
        axes.xaxis.set_major_formatter(lambda hours, _: f"{60 * hours:.3g}")
    finish(axes, "nats per token", by)
    return figure


def _draw_losses_of_one(axes: Axes, run: Run, by: str) -> None:
    x, raw = run.training_loss(by)
    _, smoothed = _smoothed((x, raw))
    axes.plot(x, raw, color=COLORS[0], alpha=0.25, linewidth=0.8)
    label = f"training (last {raw[-1]:.3f}, smoothed {smoothed[-1]:.3f})"
    axes.plot(x, smoothed, color=COLORS[0], linewidth=1.6, label=label, **marker_style(len(x)))
    x, losses = run.curve("val_loss", by)
    if len(x):
        label = f"validation (last {losses[-1]:.3f})"
        axes.plot(x, losses, "o:", color=COLORS[1], markersize=4, linewidth=1, label=label)
    entropy = run.validations[-1].get("unigram_entropy") if run.validations else None
    if entropy is not None:
        label = f"unigram entropy ({entropy:.3f})"
        axes.axhline(entropy, color=REFERENCE, linestyle="--", linewidth=1, label=label)


def _smoothed(curve: Curve) -> Curve:
    return curve[0], smooth(curve[1], SMOOTHING_SHARE * len(curve[1]))


def draw_schedule(runs: list[Run]) -> Figure | None:
    """Learning rate; of a single run the stretches of equal phase, attention mode, length and batch are shaded."""
    drawn = draw_lines(runs, {"lr": ""}, "learning rate")
    if drawn is None or len(runs) > 1:
        return drawn
    (axes,) = drawn.axes
    for number, (start, stop, label) in enumerate(_stretches(runs[0])):
        axes.axvspan(start, stop, color=SHADES[number % 2], zorder=0)
        axes.text(start, 1.0, f" {label}", transform=axes.get_xaxis_transform(), fontsize=7, va="top", color=REFERENCE)
    return drawn


def draw_gradient_norm(runs: list[Run]) -> Figure | None:
    """On a logarithmic scale; of a single run with its events."""
    drawn = draw_lines(runs, {"grad_norm": ""}, "gradient norm", log=True)
    if drawn is None or len(runs) > 1:
        return drawn
    (axes,) = drawn.axes
    kinds = list(dict.fromkeys(what for _, what in runs[0].events))
    for color, what in zip(COLORS[1:], kinds, strict=False):
        steps = [step for step, name in runs[0].events if name == what]
        axes.plot(steps, [0.02] * len(steps), "^", color=color, label=what, transform=axes.get_xaxis_transform())
    finish(axes, "gradient norm")
    return drawn


def draw_lines(runs: list[Run], keys: dict[str, str], label: str, log: bool = False) -> Figure | None:
    """Curves by step of some keys (with their labels, for one run), or of the first one for each of several runs."""
    if len(runs) > 1:
        key = next(iter(keys))
        named = zip(short_names([run.name for run in runs]), [run.curve(key) for run in runs], strict=True)
    else:
        named = ((of, runs[0].curve(key)) for key, of in keys.items())
    curves = [(number, name, curve) for number, (name, curve) in enumerate(named) if len(curve[0])]
    if not curves:
        return None
    figure, axes = new_figure()
    for number, name, (x, values) in curves:
        axes.plot(x, values, linewidth=1.3, label=name or None, **line_style(number), **marker_style(len(x)))
    if log and all((curve[1] > 0).any() for *_, curve in curves):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    finish(axes, label)
    return figure


def _stretches(run: Run) -> list[tuple[float, float, str]]:
    """(first step, last step, what is trained on) of consecutive records that agree in it."""
    found: list[list] = []
    for record in run.steps:
        words = [str(record.get("attention_mode", "")), f"{record.get('global_batch_size')}"]
        label = f"{words[0]}, {words[1]} x {record.get('sequence_length')}"
        if found and found[-1][2] == label and found[-1][3] == record.get("phase"):
            found[-1][1] = record["step"]
        else:
            found.append([record["step"], record["step"], label, record.get("phase")])
    ends = [of[0] for of in found[1:]] + [of[1] for of in found[-1:]]
    return [(of[0], end, of[2]) for of, end in zip(found, ends, strict=True)]


def _lines(keys: dict[str, str], label: str) -> Callable[[list[Run]], Figure | None]:
    return partial(draw_lines, keys=keys, label=label)


PICTURES = {
    "loss_by_step": Picture("Loss by step", "language modelling loss, smoothed", partial(draw_loss, by="step")),
    "loss_by_tokens": Picture("Loss by tokens", "the same by tokens read", partial(draw_loss, by="tokens")),
    "loss_by_time": Picture("Loss by time", "the same by hours spent in steps", partial(draw_loss, by="hours")),
    "learning_rate": Picture("Learning rate and phases", "shaded: attention mode, batch x length", draw_schedule),
    "gradient_norm": Picture("Gradient norm", "of all raw gradients; triangles: events", draw_gradient_norm),
    "other_losses": Picture(
        "Other losses",
        "unweighted: of the second next token, and of the routers' balance (1 is even)",
        _lines({"mtp_loss": "MTP", "balance_loss": "balance"}, "loss"),
    ),
    "tokens_per_second": Picture("Speed", "over all ranks", _lines({"tokens_per_second": ""}, "tokens per second")),
    "memory": Picture("Memory", "peak of the rank that has most", _lines({"memory_gib": ""}, "GiB")),
    "expert_balance": Picture(
        "Expert balance",
        "of the worst layer: load of its busiest expert over the mean, minus 1",
        _lines({"max_violation": ""}, "max violation"),
    ),
    "indexer": Picture(
        "Indexer",
        "recall: weight of dense attention on the chosen entries; captured: how much of it the scores explain",
        _lines({"indexer_recall": "recall", "indexer_captured": "captured"}, "share"),
    ),
    "indexer_kl": Picture(
        "Indexer loss", "KL to the main attention's weights", _lines({"indexer_kl": ""}, "nats per token")
    ),
}
