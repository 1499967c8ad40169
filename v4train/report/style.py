"""How all pictures look: narrow enough to be read on a phone, two beside each other on a desk."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

SIZE, DPI = (5.4, 3.4), 170  # inches; the text is legible at a third of the 918 pixels
COLORS = ("#1f5fa8", "#d1495b", "#3a7d44", "#b7791f", "#6b4fa0", "#0f766e", "#9d174d", "#475569")
REFERENCE = "#6b7280"
X_LABELS = {"step": "step", "tokens": "tokens", "hours": "hours in steps", "minutes": "minutes in steps"}


def new_figure(rows: int = 1, height: float = SIZE[1]) -> tuple[Figure, list[Axes]]:
    """Figure and its axes, one above the other with a common x."""
    figure = Figure(figsize=(SIZE[0], height))
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    figure.subplots_adjust(left=0.17, right=0.97, top=0.93, bottom=0.5 / height, hspace=0.12)
    for each in axes:
        each.grid(color="#e5e7eb", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
    return figure, axes


def finish(axes: list[Axes], labels: list[str], by: str = "step") -> None:
    """Names of the axes, and legends where something has a name."""
    for each, label in zip(axes, labels, strict=True):
        each.set_ylabel(label, fontsize=9)
        handles, _ = each.get_legend_handles_labels()
        if handles:
            each.legend(fontsize=8, loc="best", edgecolor="none", framealpha=0.8)
    axes[-1].set_xlabel(X_LABELS[by], fontsize=9)
    if by == "tokens":
        axes[-1].xaxis.set_major_formatter(EngFormatter(sep=" "))


def line_style(count: int) -> dict:
    """A single point makes no line."""
    return {"marker": "o", "markersize": 4} if count == 1 else {}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
