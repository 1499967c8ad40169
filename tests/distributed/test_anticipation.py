"""Anticipatory routing (V4.md 2.9) is training with a twin some steps old that chooses the experts; in every layout."""

import copy
import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.test_layouts import COMMON, FOUR, LOSS, SHARD_ALL, TWO
from tests.runs import STEPS, checkpoint_digests, losses, tiny
from v4train.config import load, settings
from v4train.data import BatchConfig, Loader, load_data
from v4train.model import build_model
from v4train.model.moe import router as router_module
from v4train.train.checkpoint import newest
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

AGE = 3
MIDDLE = 4
# Few steps must change many choices; rounding must change none (test_layouts.py)
FAST = ["schedule.warmup_steps=0", "schedule.learning_rate=1e-2", "model.init.std=0.1"]
ALWAYS = ["guard.anticipate=always", f"guard.anticipation_steps={AGE}"]
ADAMW = ["optimizer=adamw", *FAST]
MUON = ["optimizer=muon", "optimizer.learning_rate=3e-3", *FAST[2:]]
ZERO3 = ["parallelism=zero3", SHARD_ALL, "train.micro_batch_size=1", "train.recompute=block"]
ZERO = {"zero0": ["parallelism=zero0"], "zero2": ["parallelism=zero2"], "zero3": ZERO3}
LAYOUTS = [
    pytest.param((ranks, {name: layout}), marks=pytest.mark.exhaustive)
    for ranks, layouts in ((2, TWO | ZERO), (4, FOUR))
    for name, layout in layouts.items()
]


def train(base: Path, ranks: int, jobs: list[tuple[str, list[str]]]) -> None:
    """Run jobs, (name, further overrides), one after another in one launch."""
    folder = base / f"launch_{ranks}_{jobs[0][0]}"
    folder.mkdir(parents=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([tiny(base, name, *COMMON, "train.sample_tokens=0", *how) for name, how in jobs]))
    launch("tests.distributed.training_worker", ranks, [str(path), str(folder), "even"], folder, timeout=240)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Runs of one process: whole ones, and one that stops in the middle, with experts chosen for steps to come."""
    base = tmp_path_factory.mktemp("anticipation")
    single = ["parallelism=zero0"]
    half = [*single, *MUON, *ALWAYS, f"train.stop_at_step={MIDDLE}"]
    jobs = [("twin", [*single, *ADAMW, *ALWAYS]), ("normal", [*single, *ADAMW]), ("half", half)]
    resumed = f"checkpoint.resume={base / 'half' / 'checkpoints' / f'step_{MIDDLE:08d}'}"
    jobs.append(("half_never", [*single, *MUON, "guard.anticipate=never", resumed]))
    train(base, 1, [*jobs, ("muon", [*single, *MUON, *ALWAYS]), ("muon_normal", [*single, *MUON])])
    return base


def choices_of(model, batch) -> list[torch.Tensor]:
    """What each score router of a model chooses, in the order of the forward pass."""
    found = []
    hooks = [
        router.register_forward_hook(lambda *args: found.append(args[-1][0])) for router in model.routers().values()
    ]
    with torch.no_grad():
        model.eval()(batch.input_ids, batch.document_ids, batch.targets)
    for hook in hooks:
        hook.remove()
    return found


def twin_losses(base: Path, age: int, monkeypatch) -> list[float]:
    """Plain PyTorch: a copy of the model for each step, of which the one `age` steps old chooses."""
    made = settings(load(tiny(base, "oracle", *COMMON, *ADAMW, "parallelism=zero0")))
    tokenizer, corpus = load_data(made.data, made.tokenizer, made.train.validation_tokens)
    batches = BatchConfig(4, 4, 0, 1)
    loader = Loader(corpus, made.data, tokenizer, made.train.sequence_length, batches, made.seed)
    model = build_model(made.model)
    options = {"betas": made.optimizer.betas, "eps": made.optimizer.eps}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=made.optimizer.weight_decay, **options)
    found, before = [], []
    for step in range(STEPS):
        before.append(copy.deepcopy(model))
        (batch,) = loader.next_step()
        chosen = iter(choices_of(before[max(0, step - age)], batch))
        with monkeypatch.context() as patch:
            patch.setattr(router_module, "select", lambda *args, chosen=chosen: next(chosen))
            loss = model.train()(batch.input_ids, batch.document_ids, batch.targets).loss
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), made.train.grad_clip)
        optimizer.param_groups[0]["lr"] = made.plan.at(step).learning_rate
        optimizer.step()
        for router in model.routers().values():
            router.update_bias(router.take_load(), made.model.moe.bias_update_speed)
    return found


@pytest.mark.usefixtures("one_thread")
def test_it_is_training_with_an_older_twin_that_chooses(base, monkeypatch):
    got = losses(base, "twin")
    assert got == pytest.approx(twin_losses(base, AGE, monkeypatch), abs=LOSS["adamw"], rel=0)
    other = twin_losses(base, AGE - 1, monkeypatch)
    assert max(abs(a - b) for a, b in zip(got, other, strict=True)) > 20 * LOSS["adamw"]  # one step more would show
    assert losses(base, "normal") == pytest.approx(twin_losses(base, 0, monkeypatch), abs=LOSS["adamw"], rel=0)


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda case: next(iter(case[1])))
def layout(base, request) -> tuple[Path, str]:
    """A run; one that stops and goes on; and the half of the single process, moved here."""
    ranks, layouts = request.param
    ((name, overrides),) = layouts.items()
    how = [*overrides, *MUON, *ALWAYS]
    moved = [*how, f"checkpoint.resume={newest(base / 'half' / 'checkpoints')}"]
    jobs = [(name, how), (f"{name}_again", [*how, f"train.stop_at_step={MIDDLE}"]), (f"{name}_again", how)]
    train(base, ranks, [*jobs, (f"{name}_moved", moved)])
    return base, name


def test_a_layout_changes_nothing(layout):
    base, name = layout
    for key in ("loss", "mtp_loss", "balance_loss"):
        expected = losses(base, "muon", key)
        assert losses(base, name, key) == pytest.approx(expected, abs=LOSS["muon"], rel=0), key
    pairs = zip(losses(base, "muon"), losses(base, "muon_normal"), strict=True)
    assert max(abs(a - b) for a, b in pairs) > 5 * LOSS["muon"]  # it isn't what happens anyhow


def test_a_run_stopped_within_goes_on_bitwise(layout):
    base, name = layout
    assert any(base.glob(f"{name}_again/checkpoints/step_{MIDDLE:08d}/routing-*"))
    for key in ("loss", "grad_norm", "max_violation"):
        assert losses(base, f"{name}_again", key) == losses(base, name, key)
    assert checkpoint_digests(base, f"{name}_again", STEPS) == checkpoint_digests(base, name, STEPS)


def test_never_forgets_what_was_chosen(base):
    got = [record for record in read_metrics(base / "half_never" / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in got] == list(range(MIDDLE + 1, STEPS + 1))
    assert not any(record["anticipatory"] for record in got)
    assert losses(base, "half", "anticipatory") == [True] * MIDDLE


def test_another_layout_goes_on_with_the_experts_that_were_chosen(layout):
    base, name = layout
    got = [record["loss"] for record in read_metrics(base / f"{name}_moved" / "metrics.jsonl") if "loss" in record]
    assert got == pytest.approx(losses(base, "muon")[MIDDLE:], abs=LOSS["muon"], rel=0)
