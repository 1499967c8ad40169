"""The picture of a run: its losses and its learning rate by tokens seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

TRAIN_COLOR, VALIDATION_COLOR, REFERENCE_COLOR, RATE_COLOR = "#1f5fa8", "#d1495b", "#6b7280", "#3a7d44"
SMOOTHING_SHARE = 0.01  # of the run's steps: the time constant of the smoothed curve


def loss_plot(
    metrics: Sequence[dict[str, Any]],
    path: str | Path,
    title: str | None = None,
    unigram_entropy: float | None = None,
) -> None:
    """Write a PNG: training and validation loss above, the learning rate below, both by tokens seen.

    Args:
        metrics: records as `read_metrics` returns them. Used keys: `tokens` with `lm_loss` (or `loss`), `val_loss` and
            `lr`; records without `tokens` and non-finite values are left out.
        path: the file, replaced if it exists; its folder is created.
        title: shown above, for instance the run's name.
        unigram_entropy: nats a token; the loss of a model that knows only how frequent each token is, drawn as a line.

    Raises:
        ValueError: no record has a finite training loss.
    """
    train_tokens, train_loss = _series(metrics, "lm_loss")
    if not len(train_loss):
        train_tokens, train_loss = _series(metrics, "loss")
    if not len(train_loss):
        raise ValueError(f"{path}: no record with 'tokens' and a finite 'lm_loss' or 'loss' to plot")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(loss_axes, train_tokens, train_loss, *_series(metrics, "val_loss"), unigram_entropy)
    rate_axes.plot(*_series(metrics, "lr"), color=RATE_COLOR, linewidth=1.5)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    rate_axes.set_xlabel("tokens seen")
    rate_axes.set_xlim(0, 1.01 * train_tokens.max())
    rate_axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    for axes in (loss_axes, rate_axes):
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        loss_axes.set_title(title, loc="left", fontweight="bold")
    figure.align_ylabels()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def smooth(values: np.ndarray, time_constant: float) -> np.ndarray:
    """Centred exponential mean y_t = sum_i d^|t-i| x_i / sum_i d^|t-i|, which has no lag, unlike a running mean.

    Args:
        values: [n], float.
        time_constant: steps; d = exp(-1 / time_constant). 0 returns the values.
    """
    decay = np.exp(-1 / time_constant) if time_constant > 0 else 0.0
    table = np.stack([values, np.ones(len(values))])  # the sums above and below the line, together
    past, future = table.copy(), table.copy()
    for i in range(1, len(values)):
        past[:, i] += decay * past[:, i - 1]
        future[:, -1 - i] += decay * future[:, -i]
    above, below = past + future - table
    return above / below


def _draw_losses(
    axes: Axes,
    train_tokens: np.ndarray,
    train_loss: np.ndarray,
    validation_tokens: np.ndarray,
    validation_loss: np.ndarray,
    unigram_entropy: float | None,
) -> None:
    axes.plot(train_tokens, train_loss, color=TRAIN_COLOR, alpha=0.25, linewidth=0.8)
    smoothed = smooth(train_loss, SMOOTHING_SHARE * len(train_loss))
    marker = "o" if len(train_loss) == 1 else None  # a single point makes no line
    label = f"training (last {train_loss[-1]:.3f}, smoothed {smoothed[-1]:.3f})"
    axes.plot(train_tokens, smoothed, color=TRAIN_COLOR, linewidth=1.8, marker=marker, label=label)
    if len(validation_loss):
        label = f"validation (last {validation_loss[-1]:.3f})"
        axes.plot(validation_tokens, validation_loss, "o-", color=VALIDATION_COLOR, markersize=4, label=label)
    if unigram_entropy is not None:
        label = f"unigram entropy ({unigram_entropy:.3f})"
        axes.axhline(unigram_entropy, color=REFERENCE_COLOR, linestyle="--", linewidth=1.2, label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, loc="upper right")


def _series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of a key, where both are there and finite."""
    pairs = [(r["tokens"], r[key]) for r in metrics if r.get("tokens") is not None and r.get(key) is not None]
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    table = table[np.isfinite(table).all(axis=1)]
    return table[:, 0], table[:, 1]
