"""Runs that differ in their seed only, taken together: figures worked out by hand from the records they are made of."""

import math
import re

import numpy as np
import pytest

from tests.report.folders import make_run
from tests.report.test_report import cells
from v4train.report import compare
from v4train.report.figures_of_groups import GROUP_PICTURES
from v4train.report.groups import closing_mean, first_below, group_figures, groups_of
from v4train.report.runs import read_run

OFFSETS = {"muon": (0.0, 0.2), "adamw": (0.4, 0.8)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [
        make_run(base, f"{name}_seed{seed}_short", (f"optimizer={name}", f"seed={seed}"), offset=offset)
        for name, offsets in OFFSETS.items()
        for seed, offset in enumerate(offsets, 1)
    ]


def test_runs_are_grouped_by_all_but_their_seeds(paths):
    groups = groups_of([read_run(path) for path in paths[::2] + paths[1::2]])
    assert [group.name for group in groups] == ["muon_short", "adamw_short"]
    assert [[run.config["seed"] for run in group.runs] for group in groups] == [[1, 2], [1, 2]]


def test_what_changes_no_figure_keeps_no_runs_apart(tmp_path):
    """A sweep that was given again with further seeds, saved elsewhere and stopped at other times."""
    kept = ["tracking.group=one", "train.stop_at_step=7", "checkpoint.every=5", "train.log_every=3"]
    paths = [make_run(tmp_path, f"a_seed{i}", (f"seed={i}", own)) for i, own in enumerate(kept, 1)]
    other = make_run(tmp_path, "b_seed1", ("seed=1", "guard.window=77"))
    assert [len(group.runs) for group in groups_of([read_run(path) for path in [*paths, other]])] == [4, 1]


def test_runs_that_have_not_come_as_far_are_taken_apart(tmp_path):
    """One was paused, one ended before its first validation: no mean has their figures, and the page is drawn."""
    names = {"a_seed1": 60, "a_seed2": 60, "a_seed3": 25, "a_seed4": 0}
    paths = [make_run(tmp_path, name, (f"seed={i}",), steps) for i, (name, steps) in enumerate(names.items(), 1)]
    groups = groups_of([read_run(path) for path in paths])
    assert [(group.name, len(group.runs)) for group in groups] == [("a", 2), ("a, to step 25", 1), ("a, to step 0", 1)]
    assert [figures.get("validation loss", "-").split(" ")[0] for figures in group_figures(groups)][::2] == [
        "3.0000",
        "-",
    ]
    assert compare(paths, tmp_path / "page").is_file()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
def test_a_diverged_group_takes_no_figure_from_the_others(tmp_path, order):
    """Tokens are counted up to the highest loss that is a number."""
    offsets = {"lost": math.nan, "muon": 0.0, "adamw": 0.5}
    paths = [
        make_run(tmp_path, name, (f"optimizer.learning_rate={i}e-3",), offset=offset)
        for i, (name, offset) in enumerate(offsets.items(), 1)
    ]
    groups = groups_of([read_run(paths[i]) for i in order])
    found = {group.name: figures for group, figures in zip(groups, group_figures(groups), strict=True)}
    assert "tokens to 3.5000" in found["muon"] and "tokens to 3.5000" in found["adamw"]
    assert not any(key.startswith("tokens to") for key in found["lost"])


def test_figures_are_mean_and_deviation_over_seeds(paths):
    muon, adamw = group_figures(groups_of([read_run(path) for path in paths]))
    assert (muon["runs"], adamw["runs"]) == ("2", "2")
    assert muon["validation loss"] == f"3.1000 ± {0.2 / math.sqrt(2):.4f}"
    assert adamw["validation loss"] == f"3.6000 ± {0.4 / math.sqrt(2):.4f}"
    # Validated at steps 20, 40, 60, at 3 + offset + 5 exp(-step / 10), at the end without the last term
    at = {step: 5 * math.exp(-step / 10) for step in (20, 40)}
    reached = [(20 + 20 * (at[20] + offset - 0.6) / (at[20] - at[40])) * 2048 for offset in OFFSETS["muon"]]
    deviation = abs(reached[0] - reached[1]) / math.sqrt(2)
    assert muon["tokens to 3.6000"] == f"{sum(reached) / 2:,.0f} ± {deviation:,.0f}"
    assert "tokens to 3.6000" not in adamw  # one of its seeds doesn't get there
    closing = sum(4 / step for step in range(55, 61)) / 6
    assert muon["max violation, last tenth"] == f"{closing:.3f} ± 0.000"
    assert muon["indexer captured, last tenth"] == "0.300 ± 0.000"
    assert (muon["gain forward"], muon["gain backward"]) == ("301 ± 0", "100 ± 0")  # of the last layer, and the first
    assert adamw["recall at 32"] == f"0.960 ± {0.04 / math.sqrt(2):.3f}" and muon["recall at 64"] == "0.600 ± 0.000"
    assert "recall at 128" not in muon


def test_what_is_not_logged_in_a_runs_last_part_has_no_closing_figure(paths):
    """As of indexers, where a schedule ends with dense attention."""
    run = read_run(paths[0])
    for record in run.steps[50:]:
        del record["indexer_recall"]
    assert closing_mean(run, "indexer_recall") is None and closing_mean(run, "indexer_captured") == pytest.approx(0.3)


def test_where_a_curve_comes_down_to_a_level():
    curve = (np.array([10.0, 20.0, 30.0]), np.array([5.0, 3.0, 4.0]))
    levels = {6.0: 10.0, 5.0: 10.0, 4.0: 15.0, 3.0: 20.0, 2.0: None}
    assert {level: first_below(curve, level) for level in levels} == levels


def test_the_page_has_a_row_a_group(paths, tmp_path):
    text = compare(paths, tmp_path).read_text()
    head, *rows = cells(text, "groups")
    assert [row[:3] for row in rows] == [
        ["muon_short", "2", "3.1000 ± 0.1414"],
        ["adamw_short", "2", "3.6000 ± 0.2828"],
    ]
    assert rows[1][head.index("tokens to 3.6000")] == "-"
    assert {"validation_of_seeds.png", "recall.png"} <= {path.name for path in tmp_path.iterdir()}
    assert re.search("deviation over runs that differ in their seed only", text)


def test_pictures_show_means_and_all_between(paths):
    runs = [read_run(path) for path in paths]
    (axes,) = GROUP_PICTURES["recall"].draw(runs).axes
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines[:2]], [[0.91, 0.6], [0.96, 0.6]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["muon", "adamw", "a guess"]
    assert axes.lines[2].get_ydata()[0] == 1 / runs[0].config["evaluation"]["recall_values"]
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.6, 0.98))
    (axes,) = GROUP_PICTURES["violation_of_seeds"].draw(runs).axes
    assert len(axes.lines) == 2 and axes.lines[0].get_xdata()[-1] == 60 * 2048
    (axes,) = GROUP_PICTURES["mixing_gain"].draw(runs[:1]).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [101, 201, 301], rtol=1e-6)  # forward, of the last layer
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [100] * 3)  # backward, of the first


def test_seeds_are_drawn_together_only_where_there_are_several(paths):
    runs = [read_run(path) for path in paths[::2]]
    assert GROUP_PICTURES["validation_of_seeds"].draw(runs) is None
    assert GROUP_PICTURES["recall"].draw(runs) is not None
