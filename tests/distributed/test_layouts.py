"""Tensor, context, pipeline and expert parallelism train as one process does: losses, norms and weights (DESIGN 7)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.training_worker import uneven_bias
from tests.runs import MIXED, STEPS, checkpoint_digests, losses, tiny
from v4train.config import load
from v4train.model import build_model, init
from v4train.optim.param_groups import is_muon_parameter
from v4train.train.checkpoint import Reader, load_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

OPTIMIZERS = ("adamw", "muon")
STREAMS = 4
LOSS = {"adamw": 1e-5, "muon": 1e-4}
COMMON = [
    "train.sample_tokens=6",
    "model.attention.o_groups=4",  # for four shares of everything
    "model.attention.indexer.num_heads=4",
    "model.attention.dsa.num_heads=4",
    "train.grad_clip=0.05",  # below the norm of every step
    "optimizer.eps=1e-6",  # above the rounding of gradients: of mHC's first mixing, for equal streams, there is no more
]
# Muon's rounding is 1e-5 of a weight at its usual rate, as much as some token's two best experts may differ by: here
# updates are small beside the weights, scores are spread, and no choice of this seed is as near as 5e-6 (of experts)
# or, of the largest score, 6e-7 (of entries)
OTHER_KINDS = ["optimizer=muon", *MIXED, "seed=13", "model.init.std=0.1", "optimizer.learning_rate=1e-3"]
SHARD_ALL = "+parallelism.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
TWO = {
    "tensor": ["parallelism=tensor"],
    "context": ["parallelism=context"],
    "pipeline": ["parallelism=pipeline", "train.recompute=block"],
    "expert": ["parallelism=expert"],
}
FOUR = {
    "full4": ["parallelism=full4"],
    "expert_pipeline": ["parallelism=expert_pipeline"],
    "tensor_pipeline": ["parallelism=pipeline", "parallelism.tensor=2", "parallelism.zero_stage=0"],
    "context_pipeline": ["parallelism=pipeline", "parallelism.context=2"],
    "data_pipeline": ["parallelism=pipeline", "parallelism.zero_stage=0"],
    "four_stages": ["parallelism=pipeline", "parallelism.pipeline=4"],
    "tensor_context_expert": ["parallelism=tensor", "parallelism.context=2", "parallelism.expert=2"],
    "tensor_expert": ["parallelism=tensor", "parallelism.expert=2", "parallelism.zero_stage=3", SHARD_ALL],
    "tensor_data": ["parallelism=tensor", "parallelism.zero_stage=2"],
    "four_shares": ["parallelism=tensor", "parallelism.tensor=4"],
    "context_data_expert": ["parallelism=context", "parallelism.expert=4"],
    "context_data": ["parallelism=context", "parallelism.zero_stage=3", SHARD_ALL],
    "four_shards": ["parallelism=context", "parallelism.context=4", "parallelism.expert=2", "parallelism.zero_stage=0"],
    "expert_replicas": ["parallelism=expert", "parallelism.expert=2", "parallelism.zero_stage=2"],
}


SAMPLE = ("pipeline", "tensor_context_expert")  # each dimension once


def cases():
    for ranks, layouts in ((2, TWO), (4, FOUR)):
        for name, layout in layouts.items():
            marks = [] if name in SAMPLE else pytest.mark.exhaustive
            yield pytest.param((ranks, name, layout), id=name, marks=marks)


def train(base: Path, ranks: int, jobs: dict[str, list[str]]) -> None:
    """Run all jobs (name -> further overrides), of one layout, in one launch of `ranks` processes."""
    folder = base / f"launch_{ranks}_{next(iter(jobs))}"
    folder.mkdir(parents=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([tiny(base, name, *COMMON, *overrides) for name, overrides in jobs.items()]))
    launch("tests.distributed.training_worker", ranks, [str(path), str(folder), "uneven"], folder, timeout=240)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Folder with the single-process runs that all others are compared with."""
    base = tmp_path_factory.mktemp("layouts")
    jobs = {f"reference_{name}": [f"optimizer={name}", "parallelism=zero0"] for name in OPTIMIZERS}
    jobs["reference_mixed"] = [*OTHER_KINDS, "parallelism=zero0"]
    jobs["reference_summed_otherwise"] = ["optimizer=muon", "parallelism=zero0", "train.micro_batch_size=1"]
    train(base, 1, jobs)
    return base


@pytest.fixture(scope="module", params=cases())
def layout(base, request) -> tuple[Path, str]:
    """One layout with both optimizers, accumulation 1 and 2, and the other kinds of layers."""
    ranks, name, overrides = request.param
    jobs = {
        f"{name}_adamw": ["optimizer=adamw", *overrides],
        f"{name}_muon": ["optimizer=muon", *overrides, "train.micro_batch_size=1"],
        f"{name}_mixed": [*OTHER_KINDS, *overrides],
    }
    train(base, ranks, jobs)
    return base, name


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "mixed"])
def test_losses_are_those_of_one_process(layout, optimizer):
    base, name = layout
    expected, tolerance = f"reference_{optimizer}", LOSS.get(optimizer, 1e-4)
    for key in ("loss", "lm_loss", "mtp_loss", "balance_loss", "indexer_kl"):
        got = losses(base, f"{name}_{optimizer}", key)
        assert len(got) == STEPS
        assert got == pytest.approx(losses(base, expected, key), abs=tolerance, rel=0), key
    for key in ("grad_norm", "max_violation", "lr", "tokens", "indexer_recall"):
        got, own = losses(base, f"{name}_{optimizer}", key), losses(base, expected, key)
        assert got[:2] == pytest.approx(own[:2], rel=1e-4), key
    texts = [(base / run / "samples.txt").read_text() for run in (f"{name}_{optimizer}", expected)]
    assert texts[0] == texts[1]
    validated = [json.loads((base / run / "summary.json").read_text()) for run in (f"{name}_{optimizer}", expected)]
    assert validated[0]["val_loss"] == pytest.approx(validated[1]["val_loss"], abs=tolerance)
    assert validated[0]["val_tokens"] == validated[1]["val_tokens"]


@pytest.mark.exhaustive
def test_heads_apart_and_groups_joined_train_the_same_in_tensor_parallelism(base):
    """The options of what is one matrix; the updates themselves are held in test_muon.py."""
    options = ["optimizer=muon", "optimizer.per_head=true", "optimizer.per_group=false"]
    train(base, 1, {"heads_single": [*options, "parallelism=zero0"]})
    train(base, 2, {"heads_tensor": [*options, "parallelism=tensor", "parallelism.zero_stage=2"]})
    expected = losses(base, "heads_single")
    assert losses(base, "heads_tensor") == pytest.approx(expected, abs=LOSS["muon"], rel=0)
    assert abs(losses(base, "reference_muon")[-1] - expected[-1]) > 5 * LOSS["muon"]


def test_a_tied_model_comes_back_from_its_checkpoint(base):
    path = base / "reference_mixed" / "checkpoints" / f"step_{STEPS:08d}"
    model = load_model(path)
    assert model.head.lm_head.weight is model.embedding.lookup.weight
    assert torch.equal(model.head.lm_head.weight, Reader(path).weights()["embedding.lookup.weight"])


def weights(base: Path, run: str) -> dict[str, torch.Tensor]:
    return Reader(base / run / "checkpoints" / f"step_{STEPS:08d}").weights()


def effective(key: str, update: torch.Tensor) -> list[torch.Tensor]:
    """What of an update changes the model.

    Of mHC's mixing, constants for each source and destination go in Sinkhorn's divisions. At the first site, where all
    streams are equal, no mixing does anything, and reading them only by its sum.
    """
    if not key.endswith("residual.projection"):
        return [update]
    pre, post, mixing = update.split([STREAMS, STREAMS, STREAMS**2])
    if key.startswith("blocks.0.attention_residual"):
        return [pre.sum(0), post]
    mixing = mixing.unflatten(0, (STREAMS, STREAMS))
    mixing = mixing - mixing.mean(0, keepdim=True)
    return [pre, post, mixing - mixing.mean(1, keepdim=True)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_those_of_one_process(layout, optimizer, monkeypatch):
    """Muon makes a whole update of each direction of a gradient, however small: mHC's projections have some near
    rounding. They may differ ten times as much as two runs of one process that sum in another order."""
    base, name = layout
    got, expected = weights(base, f"{name}_{optimizer}"), weights(base, f"reference_{optimizer}")
    assert got.keys() == expected.keys()
    if optimizer == "adamw":
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, atol=2e-5, rtol=0, msg=key)
        return
    monkeypatch.setattr(init, "_static_bias", uneven_bias)
    start = build_model(load(tiny(base, "start", *COMMON)).model).state_dict()
    otherwise = weights(base, "reference_summed_otherwise")
    for key, value in expected.items():
        changes = (effective(key, x - value) for x in (start[key], got[key], otherwise[key]))
        for update, difference, order in zip(*changes, strict=True):
            norm = torch.linalg.vector_norm(difference)
            close = norm <= 1e-3 * torch.linalg.vector_norm(update)
            if key.endswith(("residual.projection", "collapse.projection")):
                most = min(10 * torch.linalg.vector_norm(order), 0.5 * torch.linalg.vector_norm(update))
                close = close or norm <= most
            assert close or (difference.abs().max() <= 2e-5 and not is_muon_parameter(key, value)), key


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TWO)
def test_bf16_stays_close(base, name):
    train(base, 2, {f"{name}_bf16": ["optimizer=adamw", *TWO[name], "precision=bf16", "train.stop_at_step=4"]})
    got = losses(base, f"{name}_bf16")
    assert got == pytest.approx(losses(base, "reference_adamw")[:4], abs=2e-2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["pipeline", "full4"])
def test_a_checkpoint_says_its_layout_and_fits_another(base, name):
    """Saved by many ranks, continued by one."""
    run = f"{name}_moved"
    ranks, overrides = (2, TWO[name]) if name in TWO else (4, FOUR[name])
    train(base, ranks, {run: ["optimizer=muon", *overrides, "train.stop_at_step=5"]})
    manifest = json.loads((base / run / "checkpoints" / "step_00000005" / "manifest.json").read_text())
    assert manifest["state"]["layout"]["pipeline"] == 2
    train(base, 1, {run: ["optimizer=muon", "parallelism=zero1"]})
    assert losses(base, run) == pytest.approx(losses(base, "reference_muon"), abs=LOSS["muon"], rel=0)


@pytest.mark.exhaustive
def test_a_run_that_was_interrupted_ends_bitwise_as_one_that_was_not(layout):
    base, name = layout
    ranks, overrides = (2, TWO[name]) if name in TWO else (4, FOUR[name])
    run = [f"{name}_cut", ["optimizer=muon", *overrides, "train.micro_batch_size=1"]]
    train(base, ranks, {run[0]: [*run[1], "train.stop_at_step=5"]})
    shutil.rmtree(base / f"launch_{ranks}_{run[0]}")
    train(base, ranks, dict([run]))
    assert losses(base, run[0]) == losses(base, f"{name}_muon")
    assert checkpoint_digests(base, run[0], STEPS) == checkpoint_digests(base, f"{name}_muon", STEPS)


INDEXED = "model.attention_mix=[swa,csa,dsa]"


@pytest.fixture(scope="module")
def modes(tmp_path_factory) -> Path:
    """Runs of one process in the modes that V4 comes to sparse attention by."""
    base = tmp_path_factory.mktemp("modes")
    train(base, 1, {f"reference_{mode}": of_mode(mode) for mode in ("dense", "indexer_warmup")})
    return base


def of_mode(mode: str) -> list[str]:
    return ["optimizer=adamw", INDEXED, f"train.attention_mode={mode}", "train.stop_at_step=5"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TWO)
def test_attention_modes_train_the_same(modes, name):
    """In the warm-up nothing but the indexers has a gradient."""
    train(modes, 2, {f"{name}_{mode}": [*of_mode(mode), *TWO[name]] for mode in ("dense", "indexer_warmup")})
    for mode in ("dense", "indexer_warmup"):
        for key in ("loss", "lm_loss", "grad_norm", *["indexer_kl"] * (mode == "indexer_warmup")):
            expected = losses(modes, f"reference_{mode}", key)
            assert losses(modes, f"{name}_{mode}", key) == pytest.approx(expected, abs=1e-5, rel=1e-5), (mode, key)
        runs = (f"{name}_{mode}", f"reference_{mode}")
        got, own = (Reader(modes / run / "checkpoints" / "step_00000005").weights() for run in runs)
        for key, value in own.items():
            torch.testing.assert_close(got[key], value, atol=2e-5, rtol=0, msg=f"{mode} {key}")
