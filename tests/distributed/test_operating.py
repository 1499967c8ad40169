"""What an operator sees of several ranks: where time goes, who is slow, who hangs, and what the layers do."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.hanging_worker import LAST, SLOW
from tests.distributed.launch import ROOT, launch
from tests.runs import tiny
from v4train.train.layer_statistics import layer_of
from v4train.train.metrics import read_metrics
from v4train.train.step_times import PARTS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def hung(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    base = tmp_path_factory.mktemp("hung")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    overrides = tiny(base, "run", "train.hang_timeout=8", "train.layers_every=2", "train.deterministic=true")
    result = subprocess.run(
        [*torchrun, "-m", "tests.distributed.hanging_worker", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return base / "run", result


def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_all(hung):
    folder, result = hung
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "nothing has moved for 8 s" in said[0], result.stderr
    assert "rank 1 hangs outside of any collective" in said[0]
    stacks = [(folder / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "rank 0" in stacks[0] and "waits for other ranks" in stacks[0] and "distributed_c10d.py" in stacks[0]
    assert "is not waiting" in stacks[1] and "in comes_no_further" in stacks[1]


def test_the_heartbeat_tells_where_it_was(hung):
    beat = json.loads((hung[0] / "heartbeat.json").read_text())
    assert (beat["doing"], beat["world_size"]) == ("training", 2)
    assert LAST - 3 <= beat["step"] <= LAST  # once a second is enough


def test_the_slowest_rank_is_named_and_the_other_waits(hung):
    records = read_metrics(hung[0] / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, LAST + 1))
    for record in records[1:]:
        assert record["slowest_rank"] == 1 and record["slowest_rank_excess"] > 0
        assert record["wait_seconds"] > SLOW / 2 * 0.8  # the mean: rank 0 waits so long, rank 1 hardly
        parts = {part: record[f"{part}_seconds"] for part in PARTS}
        assert min(parts["forward"], parts["backward"], parts["optimizer"]) > 0
        assert sum(parts.values()) <= record["step_seconds"]


def test_the_load_of_the_experts_is_that_of_each_layer(hung):
    records = read_metrics(hung[0] / "metrics.jsonl")
    measured = [record for record in records if "expert_load" in record]
    assert [record["step"] for record in measured] == [2, 4]
    for record in measured:
        loads = record["expert_load"]
        assert all(sum(load) == pytest.approx(len(load), abs=0.01) for load in loads.values())
        worst = [max(load) - 1 for load in loads.values()]
        assert worst == pytest.approx(list(record["max_violation_by_layer"].values()), abs=1e-3)


SHARDED = "+parallelism.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
LAYOUTS = {
    "zero3": ["parallelism=zero3", SHARDED],
    "tensor": ["parallelism=tensor", "parallelism.tensor=2"],
    "pipeline": ["parallelism=pipeline", "parallelism.pipeline=2"],
    "expert": ["parallelism=expert", "parallelism.expert=2"],
}


def weights(folder: Path, step: int) -> dict:
    files = (folder / "checkpoints" / f"step_{step:08d}").glob("weight-*.safetensors")
    return {name: tensor.double() for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("layers")
    train(base, 1, "reference", ["parallelism=zero0"])
    return base


def train(base: Path, ranks: int, name: str, overrides: list[str]) -> None:
    folder = base / f"launch_{name}"
    folder.mkdir()
    every = ["train.layers_every=2", "checkpoint.every=1", "checkpoint.keep=9", "train.max_steps=4"]
    (folder / "jobs.json").write_text(json.dumps([tiny(base, name, *every, *overrides)]))
    arguments = [str(folder / "jobs.json"), str(folder), "even"]
    launch("tests.distributed.training_worker", ranks, arguments, folder, timeout=120)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_layers_are_those_of_the_checkpoints_in_every_layout(layout, reference):
    train(reference, 2, layout, LAYOUTS[layout])
    measured = {}
    for name in ("reference", layout):
        records = [r for r in read_metrics(reference / name / "metrics.jsonl") if "layers" in r]
        assert [record["step"] for record in records] == [2, 4]
        measured[name] = records[0]["layers"]
    before, after = (weights(reference / layout, step) for step in (1, 2))
    updates, totals = defaultdict(float), defaultdict(float)
    for name, weight in after.items():
        updates[layer_of(name)] += float((weight - before[name]).square().sum())
        totals[layer_of(name)] += float(weight.square().sum())
    found = measured[layout]
    assert set(updates) == set(found) == set(measured["reference"])
    for name, figures in found.items():
        assert figures["update_ratio"] == pytest.approx(math.sqrt(updates[name] / totals[name]), rel=1e-3), name
        rms = measured["reference"][name].get("activation_rms")
        assert figures.get("activation_rms") == (None if rms is None else pytest.approx(rms, rel=1e-3)), name
