"""Activation checkpointing: the same to the last bit, recorded once, in less memory."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.model.memory import LiveBytes
from tests.model.packings import batch_of
from tests.models import random_model, tiny_config
from v4train.errors import ConfigError
from v4train.model import recompute
from v4train.parallel.deepspeed_fixes import sum_gradients_by_module

LEVELS = ["block", "attention"]
MODES = ["dense", "indexer_warmup", "sparse"]
BATCH = batch_of([21, -3, 19], [30, 13])


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    monkeypatch.setattr(recompute, "FORGET_FROM", 0)


def fresh(recompute="none", mode="sparse", mix="swa csa hca dsa gqa mla", **changes):
    """MoE with a hash-routed layer, mHC and MTP; attached losses that weigh enough to be seen."""
    changes = {"moe__balance_loss_weight": 0.5, "attention__indexer__loss_weight": 0.7, **changes}
    model = random_model(tiny_config(mix, **changes))
    model.attention_mode, model.recompute = mode, recompute
    return model


def step(model):
    """(everything that a step logs and learns from) of one forward and backward pass."""
    output = model(*BATCH)
    shares = dict(model.losses.shares)
    output.loss.backward()
    assert model.losses.collect() == {}  # recomputation recorded nothing more
    results = {"loss": output.loss, **output.losses}
    results |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    results |= {f"load of {name}": router.take_load() for name, router in model.routers().items()}
    results |= {f"{name} {i}": part for name, pair in shares.items() for i, part in enumerate(pair)}
    return results


def forward_passes(model):
    """How often each attention and feed-forward module ran in a step, MTP's included."""
    counts = {"attention": 0, "ffn": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for block in [*model.blocks, model.mtp.block]:
        for name in counts:
            getattr(block, name).register_forward_hook(count(name))
    step(model)
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
def test_results_are_bitwise_those_without(level, mode):
    expected, got = step(fresh(mode=mode)), step(fresh(level, mode))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (got[name] is None), name
        assert value is None or torch.equal(got[name], value), name


@pytest.mark.parametrize(("level", "attention", "ffn"), [("none", 7, 7), ("block", 14, 14), ("attention", 14, 7)])
def test_what_runs_twice(level, attention, ffn):
    assert forward_passes(fresh(level)) == {"attention": attention, "ffn": ffn}


def live_after_forward(level, layers, prepare=lambda model: None):
    """Bytes that a forward pass leaves for backward."""
    model = fresh(level, mix="csa " * layers).double()
    prepare(model)
    with LiveBytes() as live:
        loss = model(*BATCH).loss
        gc.collect()
        kept = live.count(besides=[*model.parameters(), *model.buffers()])
    loss.backward()
    return kept


def test_a_block_costs_its_input_streams_and_no_more():
    config = tiny_config("csa")
    streams = BATCH[0].numel() * config.residual.num_streams * config.hidden_size * 8
    growth = {level: (live_after_forward(level, 4) - live_after_forward(level, 2)) / 2 for level in ("none", *LEVELS)}
    assert streams <= growth["block"] < 1.05 * streams  # and a few values for the log
    assert growth["block"] < 0.5 * growth["attention"] < 0.4 * growth["none"]


@pytest.mark.parametrize("level", LEVELS)
def test_without_gradients_nothing_is_kept_or_changed(level):
    model, plain = fresh(level), fresh()
    with torch.no_grad():
        assert torch.equal(model(*BATCH).loss, plain(*BATCH).loss)
    model.eval(), plain.eval()
    assert torch.equal(model(*BATCH).loss, plain(*BATCH).loss)
    for network in (model, plain):
        network.train()
    caches = [network.new_cache(1, 8) for network in (model, plain)]
    ours, theirs = (
        network(BATCH[0][:1, :5], cache=cache) for network, cache in zip((model, plain), caches, strict=True)
    )
    assert torch.equal(ours.logits, theirs.logits)


def test_unknown_levels_are_refused():
    model = fresh("block")
    assert model.recompute == "block" == model.mtp.block.recompute
    with pytest.raises(ConfigError, match="recompute=all.*none, block, attention"):
        model.recompute = "all"


def test_what_is_forgotten_comes_back_to_the_last_bit(monkeypatch):
    got = step(fresh())
    monkeypatch.setattr(recompute, "_watched", lambda module: True)
    expected = step(fresh())
    for name, value in expected.items():
        assert (value is None) == (got[name] is None), name
        assert value is None or torch.equal(got[name], value), name


def test_forgetting_frees_memory_until_backward():
    x, module = torch.randn(5, 7, requires_grad=True), torch.nn.Identity()
    middle = x.exp()
    output = (middle * middle).sum()
    recompute.forget(middle, again=lambda into: into.copy_(x.exp()), needed_by=output, inside=module, hidden=x)
    assert middle.untyped_storage().nbytes() == 0
    (gradient,) = torch.autograd.grad(output, x, retain_graph=True)
    (again,) = torch.autograd.grad(output, x)  # what came back stays
    torch.testing.assert_close(gradient, 2 * (2 * x.detach()).exp())
    assert torch.equal(again, gradient)


def test_what_is_small_is_kept(monkeypatch):
    monkeypatch.setattr(recompute, "FORGET_FROM", 36)
    x, module = torch.randn(5, 7, requires_grad=True), torch.nn.Identity()
    middle = x.exp()
    recompute.forget(middle, again=None, needed_by=middle.square(), inside=module, hidden=x)
    assert torch.equal(middle, x.exp())


def test_what_comes_back_may_be_laid_out_otherwise():
    x = torch.randn(5, 7, requires_grad=True)
    middle = x.mT.contiguous().exp()
    output = (middle * middle).sum()
    module = torch.nn.Identity()
    recompute.forget(middle, again=lambda into: into.copy_(x.exp().mT), needed_by=output, inside=module, hidden=x)
    output.backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
def test_what_is_forgotten_comes_back_in_any_residual_and_dtype(residual, monkeypatch):
    results = {}
    for kept in (False, True):
        monkeypatch.setattr(recompute, "_watched", lambda module, kept=kept: kept)
        for dtype in (torch.float32, torch.bfloat16):
            model = fresh(residual__kind=residual)
            model.blocks[1].attention.requires_grad_(False)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                model(*BATCH).loss.backward()
            results[kept, dtype] = [parameter.grad for parameter in model.parameters()]
    for dtype in (torch.float32, torch.bfloat16):
        for ours, expected in zip(results[False, dtype], results[True, dtype], strict=True):
            assert (ours is None) == (expected is None) and (ours is None or torch.equal(ours, expected))


def test_what_a_hook_was_given_stays_readable():
    model, seen = fresh(), []
    model.blocks[0].ffn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    loss = model(*BATCH).loss
    assert seen[0].isfinite().all()
    loss.backward()


def test_hooks_that_only_pass_tensors_on_are_no_obstacle(monkeypatch):
    """ZeRO 0-2 have one on every module."""
    kept, results = [], []
    for watched in (recompute._watched, lambda module: True):
        monkeypatch.setattr(recompute, "_watched", watched)
        kept.append(live_after_forward("none", 2, sum_gradients_by_module))
        model = fresh()
        sum_gradients_by_module(model)
        results.append(step(model))
    assert kept[0] < 0.88 * kept[1]
    for name, value in results[1].items():
        assert value is None or torch.equal(results[0][name], value), name


def test_nothing_is_forgotten_without_gradients_or_inside_a_recomputed_function(monkeypatch):
    forgotten = []
    monkeypatch.setattr(
        recompute, "_Refill", lambda tensors, again: forgotten.extend(tensors) or (lambda gradient: None)
    )
    with torch.no_grad():
        fresh()(*BATCH)
    fresh().eval()(*BATCH)
    step(fresh("block"))
    model = fresh()
    checkpoint(lambda *batch: model(*batch).loss, *BATCH, use_reentrant=False).backward()
    assert not forgotten
    step(fresh())
    assert len(forgotten) == 7 * 5 + 4  # blocks with MTP's: streams and two inputs, twice; outputs of swa, csa and hca


def test_what_is_forgotten_is_less_to_keep(monkeypatch):
    kept = live_after_forward("none", 2)
    monkeypatch.setattr(recompute, "_watched", lambda module: True)
    assert kept < 0.88 * live_after_forward("none", 2)
