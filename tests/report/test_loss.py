"""The numbers that are drawn are checked on the figure's own lines; the file by its format and its content."""

import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from v4train.report.loss import loss_plot, smooth


def fake_run(steps=300, tokens_per_step=16_384, seed=0):
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        loss = 3.2 + 5 * math.exp(-step / 60) + 0.12 * rng.standard_normal()
        lr = 3e-3 * min(1, step / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tokens = step * tokens_per_step
        records.append({"step": step, "tokens": tokens, "loss": loss + 0.4, "lm_loss": loss, "lr": lr})
        if step % 50 == 0:
            records.append({"step": step, "tokens": tokens, "val_loss": 3.3 + 5 * math.exp(-step / 60)})
    return records


@pytest.fixture
def figures(monkeypatch):
    """Figures as they were when saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


def test_the_curves_hold_the_records(tmp_path, figures):
    records = fake_run()
    records[10]["lm_loss"] = math.nan
    records[20]["tokens"] = None
    loss_plot(records, tmp_path / "report" / "loss.png", title="small", unigram_entropy=6.0)
    losses, rate = figures[0].axes
    raw, smoothed, validation, unigram = losses.lines
    kept = [r for i, r in enumerate(records) if "lm_loss" in r and i not in (10, 20)]
    np.testing.assert_array_equal(raw.get_xydata(), [(r["tokens"], r["lm_loss"]) for r in kept])
    assert len(smoothed.get_xdata()) == len(kept) == 298
    np.testing.assert_array_equal(
        validation.get_xydata(), [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    )
    assert list(unigram.get_ydata()) == [6.0, 6.0]
    assert rate.lines[0].get_ydata().max() == max(r["lr"] for r in records if "lr" in r)
    assert "nats" in losses.get_ylabel() and "tokens" in rate.get_xlabel() and losses.get_title(loc="left") == "small"
    picture = matplotlib.image.imread(tmp_path / "report" / "loss.png")
    assert picture.shape[:2] == (825, 1200) and picture.std() > 0.02


def test_a_run_of_one_step_without_validation(tmp_path, figures):
    loss_plot([{"step": 1, "tokens": 512, "loss": 9.0, "lr": 1e-3}], tmp_path / "loss.png")
    assert len(figures[0].axes[0].lines) == 2 and figures[0].axes[0].lines[0].get_ydata() == [9.0]


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no record with 'tokens'"):
        loss_plot([{"step": 1, "loss": math.nan, "tokens": 1}], tmp_path / "loss.png")


@pytest.mark.parametrize("time_constant", [0, 0.5, 7.0])
def test_smoothing_is_a_weighted_mean_around_each_value(time_constant):
    values = np.random.default_rng(0).normal(size=40)
    decay = math.exp(-1 / time_constant) if time_constant else 0.0
    positions = np.arange(len(values))
    expected = [np.average(values, weights=decay ** np.abs(positions - t)) for t in positions]
    np.testing.assert_allclose(smooth(values, time_constant), expected, rtol=1e-12)
