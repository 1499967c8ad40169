"""Checkpoints by several ranks: each writes its part; if one can't, all know why, and nothing is left behind."""

import json

import pytest
import torch

from tests.distributed.launch import launch
from v4train.train import checkpoint

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    launch("tests.distributed.checkpoint_worker", request.param, [str(folder)], folder, timeout=90)
    return folder, request.param


def test_all_ranks_learn_why_one_could_not_write(written):
    folder, ranks = written
    problems = [json.loads((folder / f"problems_{rank}.json").read_text()) for rank in range(ranks)]
    assert all(own == problems[0] for own in problems)
    for key, problem in problems[0].items():
        failing = {"2": "rank 1", "3": "rank 0"}.get(key[-1])
        assert problem is None if failing is None else (failing in problem and "No space left" in problem)


@pytest.mark.parametrize("stages", [1, 2])
def test_whole_ones_are_there_and_nothing_else(written, stages):
    folder, ranks = written
    folder /= f"stages_{stages}"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000004"]
    newest = checkpoint.newest(folder)
    assert newest.name == "step_00000004"
    reader = checkpoint.Reader(newest)
    assert reader.manifest["state"] == {"rank": 0} and reader.manifest["world_size"] == ranks
    weights = reader.weights()
    assert weights.keys() == {f"stage_{stage}.{i}" for stage in range(stages) for i in range(5)}
    assert all(torch.equal(weight, torch.full((2,), 4.0)) for weight in weights.values())
    assert reader.buffers().keys() == {f"stage_{stage}.bias" for stage in range(stages)}
    assert len([name for name in reader.manifest["files"] if name.startswith("weight")]) == min(ranks, 5 * stages)
