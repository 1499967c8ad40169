"""The engine in every ZeRO stage against a plain PyTorch loop, its state to the last bit, and refusals.

One launch runs many jobs, since starting the processes is most of the time.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed.engine_worker import INJECTIONS, STEPS, make_model, train_plainly
from tests.distributed.launch import ROOT, launch
from v4train.errors import ConfigError
from v4train.parallel.deepspeed_config import deepspeed_config

pytestmark = pytest.mark.distributed

STAGES = (0, 1, 2, 3)
SAVE_AT = 3
CLIP = 0.05  # the AdamW part of the gradient has a norm of 0.1 to 0.2
WORLDS = [1, 2, pytest.param(3, marks=pytest.mark.exhaustive), pytest.param(4, marks=pytest.mark.exhaustive)]
LOSS_TOLERANCE = {"adamw": 1e-5, "muon": 1e-4}

COMBINATIONS = [(stage, steps, name) for stage in STAGES for steps in (1, 2) for name in ("adamw", "muon")]
EACH_STAGE = [(stage, name) for stage in STAGES for name in ("adamw", "muon")]

oracle = cache(train_plainly)


def key(kind: str, stage: int, steps: int, name: str) -> str:
    return f"{kind}_zero{stage}_accumulation{steps}_{name}"


def train_jobs(world: int, folder: Path) -> dict[str, dict]:
    jobs = {}
    for stage, steps, name in COMBINATIONS:
        job = {"stage": stage, "accumulation": steps, "optimizer": name, "grad_clip": CLIP, "used_from": steps - 1}
        save = {"save_at": SAVE_AT, "save": str(folder / f"{key('train', stage, steps, name)}.pt")}
        jobs[key("train", stage, steps, name)] = job | save
        if steps == 1 and world > 1:
            for injection in INJECTIONS:
                jobs[key(injection, stage, steps, name)] = job | {"inject": 2, "injection": injection, "stop": 4}
            jobs[key("frozen", stage, steps, name)] = job | {"rates": {f"{name}_indexer": 0.0}, "stop": 1}
        if steps == 1 and stage == 3:
            jobs[key("persistent", stage, steps, name)] = job | {"persistence": 100_000}
        if steps == 2 and stage < 3 and world > 1:
            jobs[key("pieces", stage, steps, name)] = job | {"reduced": 100}
    for stage, name in EACH_STAGE if world > 1 else ():  # last: DeepSpeed keeps autocast in a global
        job = {"stage": stage, "accumulation": 2, "optimizer": name, "precision": "bf16", "stop": 4}
        jobs[key("bf16", stage, 2, name)] = job
    return jobs


def load_jobs(world: int, folders: dict[int, Path]) -> dict[str, dict]:
    jobs = {}
    other = 2 if world == 1 else 1
    for stage, steps, name in COMBINATIONS:
        job = {"stage": stage, "accumulation": steps, "optimizer": name, "grad_clip": CLIP, "used_from": steps - 1}
        job |= {"start": SAVE_AT, "load": str(folders[world] / f"{key('train', stage, steps, name)}.pt")}
        jobs[key("train", stage, steps, name)] = job
        if steps == 1:
            elsewhere = str(folders[other] / f"{key('train', 3 - stage, steps, name)}.pt")
            jobs[key("moved", stage, steps, name)] = job | {"load": elsewhere, "stop": SAVE_AT}
        if steps == 1 and stage == 3:
            jobs[key("persistent", stage, steps, name)] = job | {"persistence": 100_000}
    return jobs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(kind, world) -> results of every rank, by job: `train` starts afresh, `load` is a new process."""

    @cache
    def folder(world: int) -> Path:
        return tmp_path_factory.mktemp(f"world_{world}")

    @cache
    def results(kind: str, world: int) -> list[dict[str, dict]]:
        out = tmp_path_factory.mktemp(f"{kind}_{world}")
        if kind == "train":
            jobs = train_jobs(world, folder(world))
        else:
            for size in {world, 2 if world == 1 else 1}:
                results("train", size)
            jobs = load_jobs(world, {size: folder(size) for size in (1, 2, world)})
        spec = json.dumps({"folder": str(out), "jobs": list(jobs.values())})
        launch("tests.distributed.engine_worker", world, [spec], out, timeout=120)
        ranks = [torch.load(out / f"rank_{rank}.pt", weights_only=True) for rank in range(world)]
        return [dict(zip(jobs, rank, strict=True)) for rank in ranks]

    return results


def assert_same_state(left: dict, right: dict) -> None:
    """Equal to the last bit, names and keys included."""
    assert list(left) == list(right)
    for name in left:
        assert left[name].keys() == right[name].keys()
        for state_key, tensor in left[name].items():
            other = right[name][state_key]
            assert tensor.dtype == other.dtype == torch.float32
            assert torch.equal(tensor.view(torch.int32), other.view(torch.int32)), (name, state_key)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage, steps, name", COMBINATIONS)
def test_training_equals_plain_pytorch(run, world, stage, steps, name):
    expected = oracle(name, CLIP, steps - 1)
    for rank in run("train", world):
        result = rank[key("train", stage, steps, name)]
        assert result["losses"] == pytest.approx(expected["losses"], abs=LOSS_TOLERANCE[name], rel=0)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert all(result["finite"])
        for parameter, weight in expected["weights"].items():
            torch.testing.assert_close(result["state"][parameter]["weight"], weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipping_is_active_and_the_batch_order_matters(name):
    """The oracle would notice clipping that is off, and `sometimes` used in the wrong half."""
    clipped, free, other_half = oracle(name, CLIP, 0), oracle(name, 0.0, 0), oracle(name, CLIP, 1)
    embedding = "embed.weight"
    assert (clipped["weights"][embedding] - free["weights"][embedding]).abs().max() > 1e-4
    assert (clipped["weights"]["sometimes.weight"] - other_half["weights"]["sometimes.weight"]).abs().max() > 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_small_parameters_kept_whole_in_zero_3(run, world, name):
    """DeepSpeed keeps small parameters gathered on every rank; the engine's other runs forbid it."""
    result = run("train", world)[0][key("persistent", 3, 1, name)]
    assert result["losses"] == pytest.approx(oracle(name, CLIP, 0)["losses"], abs=LOSS_TOLERANCE[name], rel=0)
    resumed = run("load", world)[0][key("persistent", 3, 1, name)]
    assert resumed["losses"] == result["losses"][SAVE_AT:]


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("stage, name", EACH_STAGE[:6])
def test_gradients_reduced_in_pieces(run, world, stage, name):
    """The largest tensor has 480 numbers, and the bucket of ZeRO 1-2 no more."""
    expected = oracle(name, CLIP, 1)
    for rank in run("train", world):
        result = rank[key("pieces", stage, 2, name)]
        assert result["losses"] == pytest.approx(expected["losses"], abs=LOSS_TOLERANCE[name], rel=0)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage, steps, name", COMBINATIONS)
def test_loading_in_a_new_process_continues_bitwise(run, world, stage, steps, name):
    job = key("train", stage, steps, name)
    for rank, resumed in zip(run("train", world), run("load", world), strict=True):
        assert resumed[job]["losses"] == rank[job]["losses"][SAVE_AT:]
        assert resumed[job]["norms"] == rank[job]["norms"][SAVE_AT:]
        assert_same_state(resumed[job]["state"], rank[job]["state"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage, name", EACH_STAGE)
def test_state_moves_between_layouts_bitwise(run, world, stage, name):
    """From another stage and another number of ranks; the model computes with the moved weights."""
    moved = run("load", world)[-1][key("moved", stage, 1, name)]
    source = run("train", 2 if world == 1 else 1)[0][key("train", 3 - stage, 1, name)]
    saved = torch.load(source["saved"], weights_only=True)
    assert_same_state(moved["state"], saved)
    assert moved["validation"] == pytest.approx(source["saved_validation"], abs=1e-6)
    steps = {tensors["step"].item() for tensors in saved.values() if "step" in tensors}
    assert steps == {float(SAVE_AT)}


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("stage, name", EACH_STAGE)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_infinite_gradients_change_nothing(run, world, stage, name, injection):
    expected = oracle(name, CLIP, 0, skip=2, stop=4)
    for rank in run("train", world):
        result = rank[key(injection, stage, 1, name)]
        assert result["finite"] == [True, True, False, True]
        assert_same_state(result["after"], result["before"])
        for parameter, weight in expected["weights"].items():
            torch.testing.assert_close(result["state"][parameter]["weight"], weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("stage, name", EACH_STAGE)
def test_a_group_with_learning_rate_zero_is_frozen(run, world, stage, name):
    state = run("train", world)[-1][key("frozen", stage, 1, name)]["state"]
    before = make_model().state_dict()
    assert torch.equal(state["indexer.weight"]["weight"], before["indexer.weight"])
    assert not torch.equal(state["fused.weight"]["weight"], before["fused.weight"])


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bf16_sums_gradients_in_float32(run, world, name):
    """Stage 0 reduces in float32 by construction; gradients reduced in bfloat16 elsewhere would differ by 1e-3."""
    results = [run("train", world)[0][key("bf16", stage, 2, name)] for stage in STAGES]
    for result in results:
        assert result["losses"] == pytest.approx(oracle(name, precision="bf16", stop=4)["losses"], abs=5e-3, rel=0)
        assert result["norms"][0] == pytest.approx(results[0]["norms"][0], rel=1e-6)
        assert result["losses"] == pytest.approx(results[0]["losses"], abs=1e-3, rel=0)
    assert results[0]["losses"][0] != oracle(name)["losses"][0]  # autocast was on


@pytest.mark.parametrize("world", WORLDS)
def test_muon_runs_once_a_step(run, world):
    """Whatever the micro-batches: 6 shapes of matrices in three groups of parameters, 8 steps, each shape at most once
    a rank and step (in ZeRO 3 each tensor on one rank)."""
    for stage in STAGES:
        calls = [
            [rank[key("train", stage, steps, "muon")]["muon_calls"] for rank in run("train", world)] for steps in (1, 2)
        ]
        assert calls[0] == calls[1] and max(calls[0]) <= 6 * STEPS
        assert stage == 0 or sum(calls[0]) >= 6 * STEPS


def test_counts(run):
    counts = run("train", 1)[0][key("train", 3, 1, "muon")]["counts"]
    assert counts == {"muon": 3 * 10 * 16 + 24 * 16 + 16 * 16 + 16 * 16 + 7 * 16, "adamw": 29 * (16 + 7) + 12 * 16 + 40}


def plain_python(folder: Path, jobs: list[dict]) -> tuple[list[dict], str]:
    """Run jobs under plain `python`, as a world of one; (results, everything it printed)."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    command = [sys.executable, "-m", "tests.distributed.engine_worker"]
    command += [json.dumps({"folder": str(folder), "jobs": jobs})]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return torch.load(folder / "rank_0.pt", weights_only=True), done.stdout + done.stderr


def test_plain_python_is_a_quiet_world_of_one(tmp_path):
    job = {"stage": 3, "accumulation": 1, "optimizer": "muon", "grad_clip": CLIP, "misuse": True}
    (result,), printed = plain_python(tmp_path, [job])
    assert result["losses"] == pytest.approx(oracle("muon", CLIP, 0)["losses"], abs=1e-4, rel=0)
    assert printed == ""
    assert result["errors"] == [
        "micro-batches of this step are missing: call forward_backward() first",
        "all micro-batches of this step are done: call step() first",
        "micro-batches of a step are under way: freeze between steps",
        "no parameter group ['nonsense']; there are ['adamw', 'muon', 'muon_rows_4_4_16', 'muon_indexer']",
        "state of embed.weight does not fit: expected {'exp_avg': [29, 16], 'exp_avg_sq': [29, 16], 'step': [], "
        "'weight': [29, 16]}, found {'weight': [29, 16]}",
    ]


def test_deepspeed_json():
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    settings = {"data_size": 4, "micro_batch_size": 2, "accumulation_steps": 3, "use_muon": True}
    config = deepspeed_config(extra, zero_stage=3, precision="bf16", **settings)
    assert config["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 3, "reduce_scatter": False}
    assert (config["train_batch_size"], config["gradient_clipping"], config["wall_clock_breakdown"]) == (24, 0.0, True)
    assert config["torch_autocast"]["lower_precision_safe_modules"] == []
    assert "torch_autocast" not in deepspeed_config(extra, zero_stage=1, precision="fp32", **settings)
    assert extra == {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    for given, stage, expected in ((extra, 1, 1000), ({}, 1, 7), ({}, 2, 7), ({}, 3, None)):
        config = deepspeed_config(given, zero_stage=stage, precision="fp32", bucket=7, **settings)
        assert config["zero_optimization"].get("reduce_bucket_size") == expected
    with pytest.raises(ConfigError, match="precision=fp16"):
        deepspeed_config(extra, zero_stage=1, precision="fp16", **settings)
