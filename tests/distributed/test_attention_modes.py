"""Three runs in a row: dense, the indexer alone, sparse (V4 report 4.2.2). What is frozen keeps every bit."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.distributed.test_training import train
from v4train.model import build_model
from v4train.train import checkpoint
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

LAYOUTS = [
    (1, ["parallelism=zero1", "optimizer=muon", "train.micro_batch_size=2"]),
    *(
        pytest.param((2, [f"parallelism=zero{stage}", f"optimizer={name}"]), marks=pytest.mark.exhaustive)
        for stage in (0, 1, 2, 3)
        for name in ("adamw", "muon")
    ),
]
MODES = {"dense": 3, "indexer_warmup": 6, "sparse": 9}  # the step at which each run ends


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"{layout[0]} {layout[1][:2]}")
def base(tmp_path_factory, request) -> Path:
    ranks, layout = request.param
    base = tmp_path_factory.mktemp("modes")
    jobs, before = {}, None
    for mode, last in MODES.items():
        jobs[mode] = [*layout, f"train.attention_mode={mode}", f"train.max_steps={last}", "model.mtp.attention=csa"]
        jobs[mode] += [f"checkpoint.resume={base / before}"] if before else []
        before = mode
    train(base, ranks, jobs)
    return base


def state(base: Path, run: str) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint of a run: weights, optimizer states, buffers."""
    reader = checkpoint.Reader(checkpoint.newest(base / run / "checkpoints"))
    tensors = reader.buffers()
    for name in reader.weights():
        tensors |= {f"{name} {key}": tensor for key, tensor in reader.parameter(name).items()}
    return tensors


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_mode_changes_what_it_trains_and_nothing_else(base):
    dense, warm, sparse = (state(base, mode) for mode in MODES)
    indexer = {name for name in dense if "indexer" in name}
    start = build_model(OmegaConf.load(base / "dense" / "config.yaml").model).state_dict()
    for name in indexer:  # "<parameter> <weight or a state>"
        parameter, key = name.split(" ")
        assert torch.equal(dense[name], start[parameter] if key == "weight" else torch.zeros_like(dense[name])), name
    assert any(name.startswith("mtp.") for name in indexer)
    assert changed(dense, warm) == indexer
    assert changed(warm, sparse) == {name for name in dense if not name.endswith("table")}


def test_the_log_tells_the_mode(base):
    for mode, last in MODES.items():
        records = [record for record in read_metrics(base / mode / "metrics.jsonl") if "loss" in record]
        assert [record["step"] for record in records] == [last - 2, last - 1, last]
        assert all(record["attention_mode"] == mode and record["grad_norm"] > 0 for record in records)
        assert all(("indexer_kl" in record) == (mode != "dense") for record in records)


def test_a_checkpoint_is_loaded_in_the_mode_it_was_trained_in(base):
    for mode in MODES:
        assert checkpoint.load_model(checkpoint.newest(base / mode / "checkpoints")).attention_mode == mode
