"""How all pictures look: narrow enough to be read on a phone, two beside each other on a desk."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

SIZE, DPI = (5.4, 3.4), 170  # inches; the text is legible at a third of the 918 pixels
COLORS = ("#1f5fa8", "#d1495b", "#3a7d44", "#b7791f", "#6b4fa0", "#0f766e", "#9d174d", "#475569")
DASHES = ("-", "--", ":", "-.")  # one for each round of the colours
MOST_INSIDE = 6  # names in a legend within the axes; more have their place below
REFERENCE = "#6b7280"
BOTTOM = 0.5  # inches below the axes, for their numbers and name
LEGEND_ROW = 0.15  # inches
X_LABELS = {"step": "step", "tokens": "tokens", "hours": "hours in steps", "minutes": "minutes in steps"}


def new_figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """height: in inches."""
    figure = Figure(figsize=(SIZE[0], height))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.17, right=0.97, top=0.93, bottom=BOTTOM / height)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def finish(axes: Axes, label: str, by: str = "step") -> None:
    """Names of the axes, and a legend where something has a name."""
    axes.set_ylabel(label, fontsize=9)
    axes.set_xlabel(X_LABELS[by], fontsize=9)
    if by == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > MOST_INSIDE:
        _legend_below(axes, len(handles))
    elif handles:
        axes.legend(fontsize=8, loc="best", edgecolor="none", framealpha=0.8)


def _legend_below(axes: Axes, names: int) -> None:
    """The figure grows for it, so that the axes keep their size."""
    figure = axes.figure
    height, room = figure.get_figheight(), 0.1 + LEGEND_ROW * -(-names // 2)
    figure.set_figheight(height + room)
    box = figure.subplotpars
    top, bottom = (room + share * height for share in (box.top, box.bottom))
    figure.subplots_adjust(top=top / (height + room), bottom=bottom / (height + room))
    below = -(bottom - 0.05) / (top - bottom)  # in heights of the axes
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.42, below), ncols=2, frameon=False)


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of a run among several, by its place."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number // len(COLORS) % len(DASHES)]}


def marker_style(count: int) -> dict:
    """A single point makes no line."""
    return {"marker": "o", "markersize": 4} if count == 1 else {}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
