"""`indexer_warmup` in training: the indexers alone learn, through `loss` itself; every value is as in training all."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.model.packings import batch_of
from tests.models import random_model, tiny_config
from v4train.model.losses import Losses

BATCH = batch_of([21, -3, 19], [30, 13])
MIXES = ["swa csa hca csa", "dsa gqa dsa"]


def fresh(mix="swa csa hca csa", **changes):
    weights = {"attention__indexer__loss_weight": 0.7, "attention__dsa__loss_weight": 0.7}
    model = random_model(tiny_config(mix, **{**weights, **changes})).double()
    model.attention_mode = "indexer_warmup"
    return model


def recomputed(model):
    for block in model.blocks:
        block.forward = lambda *state, run=block.forward: checkpoint(run, *state, use_reentrant=False)
    return model


def step(model, accumulation=1):
    """(output of the last micro-batch, gradients), as with an engine that divides the loss."""
    model.losses.scale = 1 / accumulation
    for _ in range(accumulation):
        output = model(*BATCH)
        (output.loss / accumulation).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def attached(monkeypatch, model, accumulation=1):
    """What the indexers learn where everything is trained, their losses attached to the output of attention."""
    with monkeypatch.context() as patch:
        patch.setattr(Losses, "indexers_only", lambda self: nullcontext())
        return step(model, accumulation)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("mix", MIXES)
def test_only_indexers_get_gradients_and_they_are_those_of_training_all(mix, accumulation, monkeypatch):
    expected, theirs = attached(monkeypatch, fresh(mix), accumulation)
    output, ours = step(fresh(mix), accumulation)
    for name, gradient in ours.items():
        if "indexer" in name:
            assert gradient.abs().max() > 1e-6, name
            torch.testing.assert_close(gradient, theirs[name], atol=1e-12, rtol=0)
        else:
            assert gradient is None, name
            assert theirs[name] is not None  # so the comparison is with a backward through everything
    assert output.loss == expected.loss and output.losses == expected.losses
    assert output.loss == output.losses["lm_loss"] + 0.3 * output.losses["mtp_loss"]


@pytest.mark.parametrize("mix", MIXES)
def test_gradients_are_those_of_the_explicit_sum(mix, monkeypatch):
    kept, attach = [], Losses.attach

    def keep(self, activation, name, value, weight):
        kept.append((name, weight, value))
        return attach(self, activation, name, value, weight)

    monkeypatch.setattr(Losses, "attach", keep)
    model = fresh(mix)
    output = model(*BATCH)
    indexer = [parameter for name, parameter in model.named_parameters() if "indexer" in name]
    explicit = sum(weight * value for name, weight, value in kept if name == "indexer_kl")
    expected = torch.autograd.grad(explicit, indexer, retain_graph=True)
    assert [name for name, *_ in kept].count("indexer_kl") == 2
    assert all(not value.requires_grad for name, _, value in kept if name != "indexer_kl")
    for ours, theirs in zip(torch.autograd.grad(output.loss, indexer), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mix", MIXES)
def test_activation_checkpointing_changes_nothing(mix):
    output, expected = step(fresh(mix))
    model = recomputed(fresh(mix))
    again, ours = step(model)
    assert again.losses == output.losses and model.losses.collect() == {}
    for name, gradient in ours.items():
        assert gradient is expected[name] is None or torch.equal(gradient, expected[name]), name


def test_an_indexer_in_the_mtp_block_learns_too():
    _, gradients = step(fresh("swa csa", mtp__attention="csa"))
    assert {name.split(".")[0] for name, gradient in gradients.items() if gradient is not None} == {"blocks", "mtp"}


def test_nothing_is_kept_where_gradients_are_off_or_in_evaluation():
    model = fresh()
    with torch.no_grad():
        assert not model(*BATCH).loss.requires_grad
    values = model(*BATCH).losses
    model.eval()
    output = model(*BATCH)
    assert output.losses == {name: values[name] for name in ("lm_loss", "mtp_loss")}
    output.loss.backward()  # evaluation has the language model's gradient, as in every mode
    assert model.embedding.lookup.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "indexer" in name)


def test_a_failed_forward_leaves_no_trace():
    model = fresh()
    hook = model.blocks[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*BATCH)
    hook.remove()
    model.losses.collect()
    model.attention_mode = "sparse"
    _, gradients = step(model)
    assert gradients["embedding.lookup.weight"] is not None and torch.is_grad_enabled()
