"""The pictures of a run's course, of one run or of several over each other: functions from runs to a figure.

A function returns None where no run has anything to draw.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from v4train.report.loss import SMOOTHING_SHARE, smooth
from v4train.report.runs import Curve, Run
from v4train.report.style import COLORS, REFERENCE, finish, line_style, new_figure
from v4train.train.step_times import PARTS

SHADES = ("#f1f5f9", "#e2e8f0")  # of phases, in turn
NAME_LENGTH = 40
SHORT = 1.0  # hours of a run below which minutes are shown


class Picture(NamedTuple):
    title: str
    caption: str
    draw: Callable[[list[Run]], Figure | None]


def draw_loss(runs: list[Run], by: str) -> Figure | None:
    """Training (smoothed) and validation; of a single run the raw values and the unigram entropy as well."""
    if not any(len(run.curve("loss")[0]) for run in runs):
        return None
    figure, (axes,) = new_figure()
    minutes = by == "hours" and max(run.clock[1].max(initial=0) for run in runs) < SHORT
    for color, run in _colored(runs):
        x, raw = run.curve("lm_loss", by)
        if not len(x):
            x, raw = run.curve("loss", by)
        if not len(x):
            continue
        if len(runs) == 1:
            axes.plot(x, raw, color=color, alpha=0.25, linewidth=0.8)
        smoothed = smooth(raw, SMOOTHING_SHARE * len(raw))
        label = "training" if len(runs) == 1 else short(run.name)
        axes.plot(x, smoothed, color=color, linewidth=1.6, label=label, **line_style(len(x)))
        of_validation = COLORS[1] if len(runs) == 1 else color
        label = "validation" if len(runs) == 1 else None
        axes.plot(*run.curve("val_loss", by), "o:", color=of_validation, markersize=4, linewidth=1, label=label)
        if len(runs) == 1 and run.validations:
            entropy = run.validations[-1].get("unigram_entropy")
            if entropy is not None:
                axes.axhline(entropy, color=REFERENCE, linestyle="--", linewidth=1, label="unigram entropy")
    if minutes:
        axes.xaxis.set_major_formatter(lambda hours, _: f"{60 * hours:.3g}")
    finish([axes], ["nats per token"], "minutes" if minutes else by)
    return figure


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
    finish([axes], ["gradient norm"])
    return drawn


def draw_time_parts(runs: list[Run]) -> Figure | None:
    """Share of each part in a step's time, stacked (one run)."""
    (run,) = runs
    records = [r for r in run.steps if all(f"{part}_seconds" in r for part in PARTS) and r.get("step_seconds")]
    if not records:
        return None
    figure, (axes,) = new_figure()
    shares = [np.array([100 * r[f"{part}_seconds"] / r["step_seconds"] for r in records]) for part in PARTS]
    shares = [smooth(share, SMOOTHING_SHARE * len(share)) for share in shares]
    shares.append(np.maximum(0, 100 - sum(shares)))  # the rest
    steps = [record["step"] for record in records]
    axes.stackplot(steps, shares, labels=[*PARTS, "other"], colors=[*COLORS[: len(PARTS)], "#cbd5e1"], alpha=0.85)
    axes.set_ylim(0, 100)
    finish([axes], ["% of a step"])
    return figure


def draw_lines(runs: list[Run], keys: dict[str, str], label: str, log: bool = False) -> Figure | None:
    """Curves by step of some keys (with their labels, for one run), or of the first one for each of several runs."""
    if len(runs) > 1:
        key = next(iter(keys))
        curves = [(color, short(run.name), run.curve(key)) for color, run in _colored(runs)]
    else:
        curves = [(color, of, runs[0].curve(key)) for color, (key, of) in zip(COLORS, keys.items(), strict=False)]
    curves = [curve for curve in curves if len(curve[2][0])]
    if not curves:
        return None
    figure, (axes,) = new_figure()
    for color, of, curve in curves:
        _line(axes, curve, color, of)
    if log and all((curve[1] > 0).any() for *_, curve in curves):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    finish([axes], [label])
    return figure


def _line(axes: Axes, curve: Curve, color: str, label: str) -> None:
    axes.plot(*curve, color=color, linewidth=1.3, label=label or None, **line_style(len(curve[0])))


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


def _colored(runs: list[Run]) -> Iterable[tuple[str, Run]]:
    return ((COLORS[i % len(COLORS)], run) for i, run in enumerate(runs))


def short(name: str) -> str:
    """The end of a long name tells the runs of a sweep apart."""
    return name if len(name) <= NAME_LENGTH else f"...{name[-NAME_LENGTH:]}"


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
