"""The pictures of one run's inside: where a step's time goes, its layers, the load of its experts."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from v4train.model.mix import expand_mix
from v4train.report.figures import Picture
from v4train.report.runs import Run
from v4train.report.smoothing import SMOOTHING_SHARE, smooth
from v4train.report.style import COLORS, finish, new_figure
from v4train.train.step_times import PARTS

ROW = 16  # layers in a row of the attention mix
KIND_COLORS = dict(zip(("swa", "csa", "hca", "dsa", "mla", "gqa", "mha", "mqa"), COLORS, strict=True))


def draw_time_parts(runs: list[Run]) -> Figure | None:
    """Share of each part in a step's time, stacked (one run)."""
    (run,) = runs
    records = [r for r in run.steps if all(f"{part}_seconds" in r for part in PARTS) and r.get("step_seconds")]
    if not records:
        return None
    figure, axes = new_figure()
    shares = [np.array([100 * r[f"{part}_seconds"] / r["step_seconds"] for r in records]) for part in PARTS]
    shares = [smooth(share, SMOOTHING_SHARE * len(share)) for share in shares]
    shares.append(np.maximum(0, 100 - sum(shares)))  # the rest
    steps = [record["step"] for record in records]
    axes.stackplot(steps, shares, labels=[*PARTS, "other"], colors=[*COLORS[: len(PARTS)], "#cbd5e1"], alpha=0.85)
    axes.set_ylim(0, 100)
    finish(axes, "% of a step")
    return figure


def draw_attention_mix(runs: list[Run]) -> Figure | None:
    """One square a layer, in the colour of its attention; read like text."""
    (run,) = runs
    words = expand_mix(run.config["model"]["attention_mix"])
    kinds = [word.partition(":")[0] for word in words]
    rows = -(-len(kinds) // ROW)
    figure, axes = new_figure(height=0.9 + 0.34 * rows)
    for layer, kind in enumerate(kinds):
        place = (layer % ROW, rows - 1 - layer // ROW)
        axes.add_patch(Rectangle(place, 0.92, 0.88, color=KIND_COLORS[kind]))
        axes.text(place[0] + 0.46, place[1] + 0.44, str(layer), color="white", fontsize=7, ha="center", va="center")
    axes.set(xlim=(0, min(ROW, len(kinds))), ylim=(0, rows), aspect="equal", anchor="NW")
    axes.axis("off")
    figure.subplots_adjust(left=0.02, top=0.97, bottom=0.45 / (0.9 + 0.34 * rows))
    named = [Patch(color=KIND_COLORS[kind], label=f"{kind} x {kinds.count(kind)}") for kind in dict.fromkeys(kinds)]
    figure.legend(handles=named, loc="lower left", ncols=len(named), frameon=False, fontsize=9)
    return figure


def draw_expert_load(runs: list[Run]) -> Figure | None:
    """Load of each expert (across) of each layer (down) over the layer's mean, as last recorded."""
    loads = runs[0].last("expert_load")
    if not loads:
        return None
    table = np.array(list(loads.values()), dtype=float)
    figure, axes = new_figure(height=1.6 + 0.22 * min(len(table), 20))
    axes.grid(False)
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, table.max()))
    image = axes.imshow(table, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    names = [name.removesuffix(".ffn.router").removesuffix(".block") for name in loads]
    every = -(-len(names) // 20)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    figure.subplots_adjust(left=0.2)
    figure.colorbar(image, ax=axes, label="load / mean")
    finish(axes, "")
    axes.set_xlabel("expert", fontsize=9)
    return figure


def draw_layers(runs: list[Run], figure_of_layer: str, label: str) -> Figure | None:
    """A line a layer, from the first (light) to the last (dark)."""
    records = [record for record in runs[0].steps if "layers" in record]
    names = list(dict.fromkeys(name for record in records for name in record["layers"]))
    curves = {}
    for name in names:
        rows = [(r["step"], r["layers"].get(name, {}).get(figure_of_layer)) for r in records]
        curves[name] = [row for row in rows if row[1] is not None and np.isfinite(row[1])]
    curves = {name: rows for name, rows in curves.items() if rows}
    if not curves:
        return None
    figure, axes = new_figure()
    for number, (name, rows) in enumerate(curves.items()):
        shade = 0.25 + 0.75 * number / max(1, len(curves) - 1)
        shown = name if number in (0, len(curves) - 1) or len(curves) <= 5 else None
        axes.plot(*zip(*rows, strict=True), "o-", color=COLORS[0], alpha=shade, linewidth=1, markersize=2, label=shown)
    if all(value > 0 for rows in curves.values() for _, value in rows):
        axes.set_yscale("log")
    finish(axes, label)
    return figure


def draw_violations(runs: list[Run]) -> Figure | None:
    """Max violation by step (across) and layer (down), so that one layer that collapses is seen among many.

    The scale is that of the score-routed layers: hash-routed ones, whose loads the text gives them, may lie beyond.
    """
    records = [record for record in runs[0].steps if record.get("max_violation_by_layer")]
    if not records:
        return None
    names = list(dict.fromkeys(name for record in records for name in record["max_violation_by_layer"]))
    table = np.array([[record["max_violation_by_layer"].get(name, np.nan) for record in records] for name in names])
    figure, axes = new_figure(height=1.6 + 0.22 * min(len(names), 20))
    axes.grid(False)
    steps = [record["step"] for record in records]
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(names) - 0.5, -0.5)
    most = max((record["max_violation"] for record in records if "max_violation" in record), default=np.nanmax(table))
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest", extent=extent)
    every = -(-len(names) // 20)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    figure.subplots_adjust(left=0.2)
    beyond = "max" if np.nanmax(table) > most else "neither"
    figure.colorbar(image, ax=axes, label="max violation", extend=beyond)
    finish(axes, "")
    return figure


def _of_layers(key: str, label: str) -> Callable[[list[Run]], Figure | None]:
    return partial(draw_layers, figure_of_layer=key, label=label)


LAYER_PICTURES = {
    "step_time": Picture("Where a step's time goes", "mean of all ranks; wait: for other ranks", draw_time_parts),
    "attention_mix": Picture("Attention mix", "kind of each layer, in reading order", draw_attention_mix),
    "expert_load": Picture("Expert load", "tokens of each expert over the layer's mean, at the end", draw_expert_load),
    "violation_by_layer": Picture(
        "Expert balance by layer", "load of each layer's busiest expert over the mean, minus 1", draw_violations
    ),
    "activation_rms": Picture("Activations", "RMS of each layer's output", _of_layers("activation_rms", "RMS")),
    "update_ratio": Picture(
        "Updates", "RMS of a step's update over that of the weights", _of_layers("update_ratio", "update / weight")
    ),
    "gain_forward": Picture(
        "Gain forward", "of the streams' mixing from the embedding to each layer", _of_layers("gain_forward", "row sum")
    ),
    "gain_backward": Picture(
        "Gain backward", "of the streams' mixing from the end to each layer", _of_layers("gain_backward", "column sum")
    ),
}
