"""Attached losses against one explicit sum `lm + w mtp + w_b balance + w_i indexer_kl` (DESIGN 5).

The explicit route: `Losses.attach` is replaced by one that hands the activation on untouched and keeps
`weight * value`, which the test adds to the loss itself.
"""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.model.packings import batch_of
from tests.models import random_model, tiny_config
from v4train.errors import ConfigError
from v4train.model.losses import Losses, share

MODES = ["dense", "indexer_warmup", "sparse"]
BATCH = batch_of([21, -3, 19], [30, 13])


def fresh(mode="sparse", mix="swa csa hca csa", **changes):
    """fp64, so that equal means equal; weights of the attached losses large enough to be seen."""
    weights = {"moe__balance_loss_weight": 0.5, "attention__indexer__loss_weight": 0.7}
    model = random_model(tiny_config(mix, **{**weights, **changes})).double()
    model.attention_mode = mode
    return model


def recomputed(model, reentrant):
    """Whole blocks under activation checkpointing, MTP's included."""
    for block in [*model.blocks, model.mtp.block]:
        forward = block.forward
        block.forward = lambda *state, forward=forward: checkpoint(forward, *state, use_reentrant=reentrant)
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def explicit(model, monkeypatch, factors=None):
    """(gradients of the explicit sum, unweighted values by name); `factors` multiply the attached losses by name."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Losses, "attach", lambda self, x, name, value, weight: kept.append((name, value, weight * value)) or x
        )
        output = model(*BATCH)
    loss = output.loss + sum((factors or {}).get(name, 1.0) * weighted for name, _, weighted in kept)
    values = {}
    for name in {name for name, *_ in kept}:
        values[name] = torch.stack([value.detach() for other, value, _ in kept if other == name]).mean()
    for router in model.routers().values():
        router.take_load()
    return gradients(model, loss), values


def assert_same(ours, theirs, tolerance=1e-11):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mix", ["swa csa hca csa", "dsa gqa dsa"])
@pytest.mark.parametrize("recompute", [None, False, True], ids=["stored", "recomputed", "recomputed, reentrant"])
def test_attached_gradients_equal_those_of_the_explicit_sum(mode, mix, recompute, monkeypatch):
    expected, values = explicit(fresh(mode, mix), monkeypatch)
    model = fresh(mode, mix)
    if recompute is not None:
        recomputed(model, recompute)
    output = model(*BATCH)
    assert_same(gradients(model, output.loss), expected)
    names = {"balance_loss"} if mode == "dense" else {"balance_loss", "indexer_kl"}
    shares = set() if mode == "dense" else {"indexer_captured", "indexer_recall"}
    assert values.keys() == names and output.losses.keys() == names | shares | {"lm_loss", "mtp_loss"}
    for name, value in values.items():
        torch.testing.assert_close(output.losses[name].double(), value, atol=1e-12, rtol=0)
    assert model.losses.collect() == {}  # recomputation recorded nothing more
    tokens = (BATCH[1] >= 0).sum().item()
    loads = [router.take_load().sum().item() for router in model.routers().values()]
    routers = len(mix.split()) - 1  # one layer is hash-routed
    assert loads == [2 * tokens] * routers + [2 * (tokens - 4)]  # MTP: no next token at four documents' ends


def test_the_sum_counts_what_it_says(monkeypatch):
    """The oracle itself: without an attached loss gradients differ, so the test above can fail."""
    full, _ = explicit(fresh(), monkeypatch)
    for name in ("balance_loss", "indexer_kl"):
        without, _ = explicit(fresh(), monkeypatch, {name: 0.0})
        assert max((full[key] - without[key]).abs().max() for key in full) > 1e-4


def test_scale_multiplies_attached_gradients_only(monkeypatch):
    none, _ = explicit(fresh(), monkeypatch, {"balance_loss": 0.0, "indexer_kl": 0.0})
    once, _ = explicit(fresh(), monkeypatch)
    model = fresh()
    model.losses.scale = 2.0
    output = model(*BATCH)
    assert_same(gradients(model, output.loss), {name: 2 * once[name] - none[name] for name in none})
    plain = fresh()(*BATCH)
    assert output.loss == plain.loss and output.losses["indexer_kl"] == plain.losses["indexer_kl"]  # values stay


@pytest.mark.parametrize("reentrant", [False, True])
def test_accumulation_of_two_halves_with_scale_and_denominators(reentrant):
    """Two micro-batches, their losses halved as an engine does, equal one batch of both (DESIGN 7)."""
    rows = [tuple(field[row : row + 1] for field in BATCH) for row in (0, 1)]
    whole = fresh()
    expected = gradients(whole, whole(*BATCH).loss)
    model = recomputed(fresh(), reentrant)
    model.losses.scale = 0.5
    model.losses.denominators = {name: count / 2 for name, count in model.count(*BATCH).items()}
    total = 0
    for row in rows:
        loss = model(*row).loss / 2
        total = total + loss.detach()
        loss.backward()
    summed = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_same(summed, expected)
    torch.testing.assert_close(total, whole(*BATCH).loss.detach())


@pytest.mark.parametrize(
    ("name", "count", "mix"),
    [
        ("lm_loss", "lm_loss", "csa"),
        ("mtp_loss", "mtp_loss", "csa"),
        ("indexer_kl", "indexer_kl_csa", "swa csa"),
        ("indexer_kl", "indexer_kl_dsa", "dsa mla"),
    ],
)
def test_a_denominator_replaces_the_own_count(name, count, mix):
    model = fresh(mix=mix)
    own = model(*BATCH).losses
    model.losses.denominators = {count: 4 * model.count(*BATCH)[count]}
    ours = model(*BATCH).losses
    for other in own:
        torch.testing.assert_close(ours[other], own[other] / (4 if other == name else 1))


def test_counts():
    """21 + 19 + 30 + 13 tokens, ratio 4: a document's first three see nothing; its last is no target."""
    counts = {name: count.item() for name, count in fresh().count(*BATCH).items()}
    assert counts == {"lm_loss": 83 - 4, "mtp_loss": 83 - 8, "indexer_kl_csa": 83 - 12}
    assert fresh(mix="dsa csa").count(*BATCH)["indexer_kl_dsa"] == 83
    # MTP: a document's last token has no next one, which is padding to it
    for kind, expected in (("dsa", 83 - 4), ("csa", 83 - 12 - 4)):
        model = fresh(mix="swa dsa", mtp__attention=kind)
        own, model.losses.denominators = model(*BATCH).losses, model.count(*BATCH)
        assert model.losses.denominators["indexer_kl_mtp"] == expected
        torch.testing.assert_close(model(*BATCH).losses["indexer_kl"], own["indexer_kl"])
    assert list(fresh(mix="swa hca", mtp__num_layers=0).count(*BATCH)) == ["lm_loss"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mix", "tensors"), [("swa csa hca csa", 6), ("dsa gqa dsa", 5)])
def test_indexer_learns_by_its_own_loss_alone(mode, mix, tensors, monkeypatch):
    """And its own loss teaches nothing else."""
    changed = explicit(fresh(mode, mix), monkeypatch, {"indexer_kl": 3.0})[0]
    without = explicit(fresh(mode, mix), monkeypatch, {"indexer_kl": 0.0})[0]
    indexer = [name for name in changed if "indexer" in name]
    # csa: kv, gate, bias and norm of the compressor, query, head weight; dsa: key, its norm and bias, and those two
    assert len(indexer) == 2 * tensors
    for name in changed:
        if name not in indexer:
            assert torch.equal(changed[name], without[name]), name
            continue
        assert without[name].abs().max() == 0, name
        assert (changed[name].abs().max() > 1e-6) == (mode != "dense"), name


def test_a_share_of_what_is_no_number_is_none():
    assert share(0.0, 0.0) == share(2e-9, -1e-9) == 1 and share(1.0, 4.0) == 0.25
    assert share(torch.nan, torch.nan).isnan()


def test_loss_shares_are_means_over_layers(monkeypatch):
    """`balance_loss` over score-routed layers (MTP's too), `indexer_kl` over csa layers, as weighted in the sum."""
    model, kept = fresh(), []
    monkeypatch.setattr(Losses, "attach", lambda self, x, name, value, weight: kept.append((name, value, weight)) or x)
    model(*BATCH)
    for name, weight, layers in (("balance_loss", 0.5, 4), ("indexer_kl", 0.7, 2)):
        weights = [w for other, _, w in kept if other == name]
        assert weights == pytest.approx([weight / layers] * layers)
        assert len({value.item() for other, value, _ in kept if other == name}) == layers


def test_evaluation_attaches_and_counts_nothing(monkeypatch):
    model = fresh().eval()
    output = model(*BATCH)
    assert output.losses.keys() == {"lm_loss", "mtp_loss"}
    ours = gradients(model, output.loss)
    assert_same(ours, explicit(fresh(), monkeypatch, {"balance_loss": 0.0, "indexer_kl": 0.0})[0])
    assert all(router.take_load().sum() == 0 for router in model.routers().values())
    model.losses.scale = 100.0
    assert_same(gradients(model, model(*BATCH).loss), ours)


def test_logits_leave_no_values_behind():
    model = fresh()
    assert model(*BATCH[:2]).losses == {}
    once = model(*BATCH).losses
    assert once["balance_loss"] == fresh()(*BATCH).losses["balance_loss"]


def test_recomputed_blocks_free_what_they_computed():
    """Activation checkpointing keeps no output of a module inside a block alive until backward."""
    model, made = recomputed(fresh(), False), []

    def remember(name):
        def hook(module, inputs, output):
            tensors = output if isinstance(output, tuple) else (output,)
            made.extend((name, weakref.ref(x)) for x in tensors if isinstance(x, torch.Tensor))

        return hook

    for block in model.blocks:
        for name, module in block.named_modules():
            if name:
                module.register_forward_hook(remember(name))
    loss = model(*BATCH).loss
    gc.collect()
    assert len(made) > 50
    assert {name for name, reference in made if reference() is not None} == set()
    loss.backward()


def test_modes():
    model = fresh()
    assert model.attention_mode == "sparse"
    losses = {}
    for mode in MODES:
        model.attention_mode = mode
        assert model.attention_mode == mode
        losses[mode] = model(*BATCH).losses
    assert losses["dense"]["lm_loss"] == losses["indexer_warmup"]["lm_loss"]  # both attend to all visible entries
    assert losses["sparse"]["lm_loss"] != losses["dense"]["lm_loss"]
    assert losses["sparse"]["indexer_kl"] < losses["indexer_warmup"]["indexer_kl"]  # over fewer entries
    with pytest.raises(ConfigError, match="attention_mode=full.*dense, indexer_warmup, sparse"):
        model.attention_mode = "full"
    assert fresh(mix="swa hca").attention_mode == "sparse"


def test_dense_equals_sparse_when_every_entry_is_selected():
    model = fresh(attention__indexer__top_k=100)
    sparse = model(*BATCH).losses
    model.attention_mode = "indexer_warmup"
    assert all(model(*BATCH).losses[name] == value for name, value in sparse.items())
