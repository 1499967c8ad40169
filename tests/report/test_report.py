"""Curves are compared with the records they were made of, the page with what it must say."""

import base64
import html
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from tests.report.folders import SAMPLE, make_run
from v4train.errors import ConfigError
from v4train.report import compare, report
from v4train.report.differences import differences
from v4train.report.figures import PICTURES
from v4train.report.figures_of_groups import GROUP_PICTURES
from v4train.report.figures_of_layers import LAYER_PICTURES
from v4train.report.page import final_figures
from v4train.report.runs import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    make_run(base, "low")
    make_run(base, "high", ("optimizer=adamw", "seed=2"), steps=40, offset=0.5)
    make_run(base, "unstarted", steps=0)
    return base


def cells(page: str, table: str) -> list[list[str]]:
    rows = re.findall(r"<tr.*?</tr>", re.search(f'<table id="{table}".*?</table>', page, re.S)[0], re.S)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


def names_in(out: Path) -> set[str]:
    return {path.stem for path in out.glob("*.png")}


def change_metrics(run: Path, change: Callable[[dict], dict]) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in lines))


def pictures_of(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_curves_hold_the_records(folder):
    run = read_run(folder / "low")
    steps, losses = run.curve("lm_loss")
    np.testing.assert_array_equal(steps, np.arange(1, 61))
    np.testing.assert_allclose(losses, 3 + 5 * np.exp(-np.arange(1, 61) / 10), rtol=1e-12)
    np.testing.assert_array_equal(run.curve("lm_loss", "tokens")[0], 2048 * np.arange(1, 61))
    np.testing.assert_allclose(run.curve("lm_loss", "hours")[0], 0.5 * np.arange(1, 61) / 3600)
    np.testing.assert_allclose(run.curve("val_loss", "hours")[0], [10 / 3600, 20 / 3600, 30 / 3600])
    assert run.events == [(7, "update skipped"), (31, "another attention mode"), (31, "another phase")]


def test_spikes_are_events_of_the_run(folder, tmp_path):
    shutil.copytree(folder / "high", tmp_path / "high")
    (tmp_path / "high" / "events.jsonl").write_text(
        '{"step": 7, "event": "update skipped", "seen_at": 7}\n{"step": 9, "event": "went back", "seen_at": 12}\n'
    )
    run = read_run(tmp_path / "high")
    expected = [(7, "update skipped"), (12, "went back"), (31, "another attention mode"), (31, "another phase")]
    assert run.events == expected
    assert final_figures(run)["spikes gone back for"] == "1"
    assert "spikes gone back for" not in final_figures(read_run(folder / "high"))


def test_hours_count_the_steps_that_were_not_logged(folder):
    run = read_run(folder / "low")
    config = run.config | {"train": run.config["train"] | {"log_every": 5}}
    every_fifth = replace(run, config=config, steps=run.steps[4::5])
    np.testing.assert_allclose(every_fifth.clock[1], 2.5 * np.arange(1, 13) / 3600)


@pytest.mark.parametrize(("log_every", "first"), [(1, 31), (10, 40)])
def test_hours_of_a_run_that_started_from_another_one_are_its_own(log_every, first, folder):
    """It has the steps 31 to 60."""
    run = read_run(folder / "low")
    config = run.config | {"train": run.config["train"] | {"log_every": log_every}}
    later = replace(run, config=config, steps=run.steps[first - 1 :: log_every])
    np.testing.assert_allclose(later.clock[1][[0, -1]], np.array([first - 30, 30]) * 0.5 / 3600)


def test_losses_that_are_no_numbers_are_events_and_said(folder, tmp_path):
    path = make_run(tmp_path, "some")
    change_metrics(path, lambda record: record | {"loss": "nan"} if record["step"] in (7, 9) else record)
    assert read_run(path).events[:3] == [(7, "loss not finite"), (7, "update skipped"), (9, "loss not finite")]
    text = report(path, tmp_path / "some").read_text()
    assert dict(cells(text, "final"))["loss not finite"] == "in 2 of 60 steps, first in 7"
    assert "some: not every training" in text and "loss_by_step" in names_in(tmp_path / "some")


def test_a_run_without_a_single_finite_loss_has_a_page_that_says_so(folder, tmp_path):
    path = make_run(tmp_path, "lost")
    change_metrics(path, lambda record: {key: "nan" if "loss" in key else x for key, x in record.items()})
    text = report(path, tmp_path / "one").read_text()
    assert "lost: no training" in text and "No step was logged" not in text
    assert not {"loss_by_step", "loss_by_tokens", "loss_by_time"} & names_in(tmp_path / "one")
    both = compare([path, folder / "low"], tmp_path / "both").read_text()
    assert "lost: no training" in both and "low: " not in both


def test_lines_without_tokens_have_a_page(tmp_path):
    path = make_run(tmp_path, "bare")
    change_metrics(path, lambda record: {key: x for key, x in record.items() if key != "tokens"})
    final = dict(cells(report(path, tmp_path / "out").read_text(), "final"))
    assert "tokens" not in final and final["steps"] == "60" and final["tokens/s (median)"] == "4,096"
    drawn = names_in(tmp_path / "out")
    assert {"loss_by_step", "loss_by_time", "memory"} < drawn and "loss_by_tokens" not in drawn


def test_the_page_of_a_run(folder, tmp_path):
    page = report(folder / "low", tmp_path)
    assert page == tmp_path / "index.html"
    text = page.read_text()
    final = dict(cells(text, "final"))
    assert final == {
        "validation loss (nats/token)": "3.0000",
        "bits/byte": "1.5000",
        "below unigram entropy": "3.0000",
        "training loss": f"{3 + 5 * math.exp(-6):.4f}",
        "steps": "60",
        "tokens": "122,880",
        "time in steps": "0:30",
        "tokens/s (median)": "4,096",
        "MFU (median)": "25.0%",
        "peak memory (GiB)": "2.00",
        "updates skipped": "1",
        "time of a step": "data 2%, forward 30%, backward 50%, optimizer 10%, wait 6%",
        "slowest rank": "0 (75% of steps)",
    }
    assert html.escape(SAMPLE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    assert "attention_mix" in text and "<script" not in text and "http:" not in text and "https:" not in text
    files = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    of_several = {"validation_of_seeds", "violation_of_seeds"}
    assert files.keys() == (PICTURES.keys() | LAYER_PICTURES.keys() | GROUP_PICTURES.keys()) - of_several
    assert sorted(pictures_of(text)) == sorted(files.values())
    for name in files:
        assert image.imread(tmp_path / f"{name}.png").std() > 0.02, name


def test_a_page_of_several_runs(folder, tmp_path):
    names = ["low", "high", "unstarted"]
    text = compare([folder / name for name in names], tmp_path).read_text()
    head, *rows = cells(text, "final")
    assert [row[0] for row in rows] == names
    loss = head.index("validation loss (nats/token)")
    assert [row[loss] for row in rows] == ["3.0000", "3.5000", "-"]
    assert re.findall(r'<tr class="best"><th scope="row">(.*?)</th>', text) == ["low"]
    different = {key: values for key, *values in cells(text, "differences")[1:]}
    assert different["seed"] == ["1", "2", "1"]
    assert different["optimizer.name"] == ["muon", "adamw", "muon"]
    assert "run.name" not in different and "model.hidden_size" not in different
    assert len(pictures_of(text)) == len(PICTURES) + 2  # recall and gain: no two runs differ in their seed only


def test_every_run_of_a_comparison_has_its_curve(folder):
    runs = [read_run(folder / name) for name in ("low", "high", "unstarted")]
    for name in ("gradient_norm", "loss_by_time", "memory"):
        (axes,) = PICTURES[name].draw(runs).axes
        assert {text.get_text() for text in axes.get_legend().get_texts()} == {"low", "high"}, name
    assert list(PICTURES["memory"].draw(runs).axes[0].lines[0].get_ydata()) == [1 + n / 60 for n in range(1, 61)]


def test_the_loss_of_a_run_holds_the_records(folder):
    (axes,) = PICTURES["loss_by_tokens"].draw([read_run(folder / "low")]).axes
    raw, smoothed, validation, unigram = axes.lines
    steps = np.arange(1, 61)
    np.testing.assert_allclose(raw.get_xydata(), np.stack([2048 * steps, 3 + 5 * np.exp(-steps / 10)], 1))
    assert list(validation.get_xdata()) == [2048 * n for n in (20, 40, 60)] and list(unigram.get_ydata()) == [6.0] * 2
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    last = f"training (last {raw.get_ydata()[-1]:.3f}, smoothed {smoothed.get_ydata()[-1]:.3f})"
    assert labels == [last, "validation (last 3.000)", "unigram entropy (6.000)"]


@pytest.mark.parametrize("name", ["loss_by_step", "memory"])
def test_the_runs_of_a_sweep_can_be_told_apart(name, folder):
    """3 x 4 runs whose names share a head and a tail longer than what a legend has room for."""
    swept = [(optimizer, seed) for optimizer in ("adamw", "lion", "muon") for seed in range(1, 5)]
    tail = "train.max_steps=100000_train.validation_tokens=96"
    low = read_run(folder / "low")
    runs = [replace(low, name=f"flash_small_optimizer={what}_seed={seed}_{tail}") for what, seed in swept]
    figure = PICTURES[name].draw(runs)
    figure.canvas.draw()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert {text.get_text() for text in legend.get_texts()} == {f"optimizer={what}_seed={n}" for what, n in swept}
    assert len({(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}) == 12
    box, below = legend.get_window_extent(), axes.get_tightbbox(for_layout_only=True)
    assert box.y1 <= axes.xaxis.get_tightbbox().y0 and box.y0 >= 0  # below the axes, inside the picture
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and below.y0 >= 0
    few = PICTURES[name].draw(runs[:6])
    few.canvas.draw()
    heights = [each.axes[0].get_window_extent().height for each in (few, figure)]
    assert heights[0] == pytest.approx(heights[1]) and few.axes[0].get_legend().get_window_extent().y0 > 0


def test_events_and_phases_are_drawn(folder):
    run = read_run(folder / "low")
    (axes,) = PICTURES["gradient_norm"].draw([run]).axes
    marks = {line.get_label(): list(line.get_xdata()) for line in axes.lines if line.get_marker() == "^"}
    assert marks == {"update skipped": [7], "another attention mode": [31], "another phase": [31]}
    (axes,) = PICTURES["learning_rate"].draw([run]).axes
    assert [text.get_text().strip() for text in axes.texts] == ["dense, 4 x 512", "sparse, 4 x 512"]


def test_hash_routed_layers_do_not_set_the_scale_of_violations(folder):
    run = read_run(folder / "low")
    for record in run.steps:
        record["max_violation_by_layer"]["blocks.0"] = 30.0
    figure = LAYER_PICTURES["violation_by_layer"].draw([run])
    assert figure.axes[0].images[0].get_clim() == (0, 4)


def test_parts_of_the_time_and_layers_are_drawn(folder):
    run = read_run(folder / "low")
    (axes,) = LAYER_PICTURES["step_time"].draw([run]).axes
    tops = [polygon.get_paths()[0].vertices[:, 1].max() for polygon in axes.collections]
    np.testing.assert_allclose(tops, [2, 32, 82, 92, 98, 100])
    names = ("activation_rms", "expert_load", "violation_by_layer", "gain_forward")
    rms, load, violation, gain = (LAYER_PICTURES[name].draw([run]).axes for name in names)
    assert [list(line.get_ydata()) for line in rms[0].lines] == [[1.0 + i] * 3 for i in range(6)]
    assert [list(line.get_ydata()) for line in gain[0].lines] == [[1.0 + i * n for n in (20, 40, 60)] for i in range(6)]
    steps = np.arange(1, 61)
    np.testing.assert_allclose(violation[0].images[0].get_array(), [2 / steps, 4 / steps])
    assert [label.get_text() for label in violation[0].get_yticklabels()] == ["blocks.3", "mtp"]
    assert violation[0].images[0].get_clim() == (0, 4)
    np.testing.assert_array_equal(load[0].images[0].get_array(), [[0.5, 1.0, 1.5, 1.0]] * 3)
    mix = LAYER_PICTURES["attention_mix"].draw([run])
    words = [text.get_text() for text in mix.legends[0].get_texts()]
    kinds = [word for word in run.config["model"]["attention_mix"]]
    assert len(mix.axes[0].patches) == run.config["model"]["num_layers"] and len(words) == len(set(kinds))


def test_a_run_without_steps_has_a_page(folder, tmp_path):
    text = report(folder / "unstarted", tmp_path / "one").read_text()
    assert dict(cells(text, "final")) == {"steps": "0"} and len(pictures_of(text)) == 1  # the attention mix
    compared = compare([folder / "unstarted"], tmp_path / "two").read_text()
    assert "No step was logged" in compared and "<title>1 run</title>" in compared


def test_pictures_of_an_earlier_report_go(folder, tmp_path):
    report(folder / "low", tmp_path)
    report(folder / "unstarted", tmp_path)
    assert [path.stem for path in tmp_path.glob("*.png")] == ["attention_mix"]


def test_differences_are_those_of_the_leaves():
    configs = [{"a": {"b": 1, "c": [1, 2]}, "d": 3}, {"a": {"b": 2, "c": [1, 2]}, "d": 3, "e": {}}]
    assert differences(configs) == {"a.b": [1, 2], "e": ["-", {}]}
    assert differences(configs[:1] * 2) == {}


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="run=.*holds no run"):
        report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
