"""Routers, balance and loads against loops over tokens and experts."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.model.mixtures import EXPERTS, HIDDEN, TOP_K, config_of, filled, random
from tests.model.packings import batch_of
from tests.models import random_model, random_tokens, tiny_config
from v4train.model.losses import Losses
from v4train.model.moe.balance import max_violation, relative_loads, sequence_balance_loss
from v4train.model.moe.router import HashRouter, ScoreRouter, affinities, balanced_table


def route(router, batch=2, length=7, seed=3, ids=None):
    x = random(batch, length, HIDDEN, seed=seed).requires_grad_()
    tokens = random_tokens(batch, length)
    ids = torch.zeros_like(tokens) if ids is None else ids
    chosen, weights = router(x, tokens, ids)
    return x, tokens, chosen, weights


def expected_affinity(x, row):
    return math.sqrt(math.log1p(math.exp((x @ row).item())))


@pytest.mark.parametrize("training", [True, False])
def test_scored_tokens_one_by_one(training):
    """The bias decides who is chosen, the bare affinities what they weigh; weights sum to the scaling factor."""
    router = filled(ScoreRouter(config_of(moe__routed_scaling_factor=2.5), Losses(), 1)).train(training)
    x, _, chosen, weights = route(router)
    moved = 0
    for b in range(2):
        for t in range(7):
            scores = [expected_affinity(x[b, t], row) for row in router.weight]
            biased = [score + bias.item() for score, bias in zip(scores, router.bias, strict=True)]
            best = sorted(range(EXPERTS), key=lambda e: -biased[e])[:TOP_K]
            assert chosen[b, t].tolist() == best
            total = sum(scores[e] for e in best)
            assert weights[b, t].tolist() == pytest.approx([2.5 * scores[e] / total for e in best], rel=1e-9)
            moved += set(best) != set(sorted(range(EXPERTS), key=lambda e: -scores[e])[:TOP_K])
    assert moved >= 3  # the bias did change choices
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 7), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_v3_routing_token_by_token(groups):
    """Sigmoid affinities; experts from the groups whose two best biased affinities sum highest (V3 report 2.1.2)."""
    kept = max(1, groups // 2)
    changes = {"moe__scoring": "sigmoid", "moe__num_groups": groups, "moe__top_k_groups": kept, "moe__num_experts": 8}
    router = filled(ScoreRouter(config_of(**changes), Losses(), 1))
    router.bias.mul_(0.1)  # or it decides alone
    x, _, chosen, weights = route(router, length=40)
    limited = 0
    for b in range(2):
        for t in range(40):
            scores = [1 / (1 + math.exp(-(x[b, t] @ row).item())) for row in router.weight]
            biased = [score + bias.item() for score, bias in zip(scores, router.bias, strict=True)]
            size = 8 // groups
            members = [range(g * size, (g + 1) * size) for g in range(groups)]
            best_groups = sorted(members, key=lambda m: -sum(sorted((biased[e] for e in m), reverse=True)[:2]))[:kept]
            allowed = [e for m in best_groups for e in m]
            best = sorted(allowed, key=lambda e: -biased[e])[:TOP_K]
            assert chosen[b, t].tolist() == best
            total = sum(scores[e] for e in best)
            assert weights[b, t].tolist() == pytest.approx([1.5 * scores[e] / total for e in best], rel=1e-9)
            limited += best != sorted(range(8), key=lambda e: -biased[e])[:TOP_K]
    assert (limited > 0) == (groups > 1)


def test_gpt_oss_routing_is_a_softmax_over_the_chosen_logits():
    changes = {"moe__scoring": "softmax", "moe__router_bias": True, "moe__routed_scaling_factor": 1.0}
    router = filled(ScoreRouter(config_of(**changes), Losses(), 1))
    router.bias.zero_()
    x, _, chosen, weights = route(router)
    logits = x @ router.weight.T + router.logit_bias
    best = logits.topk(TOP_K, dim=-1)
    assert torch.equal(chosen, best.indices)
    torch.testing.assert_close(weights, best.values.softmax(-1))
    weights[..., 0].sum().backward()
    assert router.logit_bias.grad.abs().sum() > 0


def test_hashed_tokens_take_their_row_of_the_table():
    router = filled(HashRouter(config_of(), Losses()))
    router.table.copy_(balanced_table(64, EXPERTS, TOP_K, torch.Generator().manual_seed(0)))
    x, tokens, chosen, weights = route(router)
    for b in range(2):
        for t in range(7):
            row = router.table[tokens[b, t]]
            assert torch.equal(chosen[b, t], row)
            scores = [expected_affinity(x[b, t], router.weight[e]) for e in row]
            assert weights[b, t].tolist() == pytest.approx([1.5 * s / sum(scores) for s in scores], rel=1e-9)
    weights[..., 0].sum().backward()
    assert router.weight.grad.norm() > 0.1  # its gate values are learned


@pytest.mark.parametrize(
    ("vocabulary", "experts", "top_k"), [(64, 8, 2), (100, 7, 3), (97, 16, 6), (5, 16, 4), (50, 4, 4), (33, 5, 1)]
)
def test_balanced_table(vocabulary, experts, top_k):
    table = balanced_table(vocabulary, experts, top_k, torch.Generator().manual_seed(1))
    assert table.shape == (vocabulary, top_k) and table.dtype == torch.int64
    assert all(len(set(row)) == top_k for row in table.tolist())
    counts = Counter({expert: 0 for expert in range(experts)})
    counts.update(table.flatten().tolist())
    assert len(counts) == experts and max(counts.values()) - min(counts.values()) <= 1
    assert torch.equal(table, balanced_table(vocabulary, experts, top_k, torch.Generator().manual_seed(1)))
    if 1 < top_k < experts:
        assert not torch.equal(table, balanced_table(vocabulary, experts, top_k, torch.Generator().manual_seed(2)))
        assert len({tuple(sorted(row)) for row in table.tolist()}) > vocabulary // top_k // 4  # no few fixed teams


def test_affinities_and_their_gradient():
    logits = torch.tensor([-110.0, -80.0, -5.0, 0.0, 3.0, 50.0], requires_grad=True)
    ours = affinities(logits, "sqrtsoftplus")
    expected = [math.sqrt(math.log1p(math.exp(value))) for value in logits.tolist()]
    assert ours.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    ours.sum().backward()
    assert logits.grad.isfinite().all()
    slopes = [math.exp(v) / (1 + math.exp(v)) / (2 * e) for v, e in zip(logits.tolist(), expected, strict=True)]
    assert logits.grad[2:].tolist() == pytest.approx(slopes[2:], rel=1e-5)


def test_gates_stay_finite_when_all_affinities_vanish():
    router = filled(ScoreRouter(config_of(), Losses(), 1), dtype=torch.float32)
    with torch.no_grad():
        router.weight.copy_(torch.full((EXPERTS, HIDDEN), -40.0))
    x = torch.ones(1, 2, HIDDEN, requires_grad=True)
    _, weights = router(x, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))
    weights.square().sum().backward()
    assert weights.isfinite().all() and x.grad.isfinite().all() and router.weight.grad.isfinite().all()


# -- balance ----------------------------------------------------------------------------------------------------------


def naive_balance(scores, top_k, valid):
    """V4.md 2.5, row by row and expert by expert; a row's padding doesn't exist."""
    rows = []
    for b in range(len(scores)):
        tokens = [scores[b, t] for t in range(scores.shape[1]) if valid[b, t]]
        experts = scores.shape[-1]
        total = scores.new_zeros(())
        for e in range(experts):
            hits = sum(e in sorted(range(experts), key=lambda i: -token[i].item())[:top_k] for token in tokens)
            share = sum(token[e] / token.sum() for token in tokens) / len(tokens)
            total = total + experts / (top_k * len(tokens)) * hits * share
        rows.append(total)
    return sum(rows) / len(rows)


def test_balance_loss():
    scores = random(3, 8, EXPERTS).exp().requires_grad_()
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[0, 5:] = False
    valid[1, 2] = False
    ours, theirs = sequence_balance_loss(scores, TOP_K, valid), naive_balance(scores, TOP_K, valid)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    assert gradients[0][0, 5:].abs().sum() == 0 and gradients[0][1].abs().sum() > 0


def test_balance_loss_of_perfect_balance_and_of_collapse():
    turns = torch.eye(4, dtype=torch.float64).repeat(1, 3, 1) + 1e-9  # each expert in turn, certain of itself
    valid = torch.ones(1, 12, dtype=torch.bool)
    assert sequence_balance_loss(turns, 1, valid).item() == pytest.approx(1, abs=1e-6)
    assert sequence_balance_loss(turns[:, :1].repeat(1, 12, 1), 1, valid).item() == pytest.approx(4, abs=1e-6)


def test_unbiased_affinities_decide_the_balance_loss():
    router = filled(ScoreRouter(config_of(), Losses(), 1))
    x, *_ = route(router)
    value = router.losses.collect()["balance_loss"]
    with torch.no_grad():
        scores = affinities(x @ router.weight.T, "sqrtsoftplus")
    valid = torch.ones(2, 7, dtype=torch.bool)
    assert value.item() == pytest.approx(naive_balance(scores, TOP_K, valid).item(), abs=1e-12)
    assert value.item() != pytest.approx(naive_balance(scores + router.bias, TOP_K, valid).item(), abs=1e-3)


def test_max_violation():
    assert max_violation(torch.tensor([4, 4, 4, 4])).item() == 0
    assert max_violation(torch.tensor([8, 2, 3, 3])).item() == pytest.approx(1)
    assert max_violation(torch.tensor([0, 0, 0, 12])).item() == pytest.approx(3)
    assert max_violation(torch.tensor([1, 0, 0, 0])).item() == 3  # fewer than a token an expert
    assert max_violation(torch.tensor([0.7, 0.1, 0.1, 0.1])).item() == pytest.approx(1.8)
    assert max_violation(torch.tensor([0, 0])).item() == 0  # nothing counted
    loads = {"a": torch.tensor([1, 0, 0, 0]), "b": torch.tensor([0, 0])}
    assert relative_loads(loads) == {"a": [4.0, 0.0, 0.0, 0.0], "b": [0.0, 0.0]}


# -- loads and bias ---------------------------------------------------------------------------------------------------


def loads_by_choice(chosen, valid):
    counts = [0] * EXPERTS
    for token, used in zip(chosen.flatten(0, 1).tolist(), valid.flatten().tolist(), strict=True):
        for expert in token if used else []:
            counts[expert] += 1
    return counts


def test_loads_leave_out_padding_and_validation_and_add_up():
    router = filled(ScoreRouter(config_of(), Losses(), 1))
    ids = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [2, 2, 2, -1, 3, 3, 3]])
    *_, chosen, _ = route(router, ids=ids)
    first = loads_by_choice(chosen, ids >= 0)
    router.eval()
    route(router)
    router.train()
    *_, chosen, _ = route(router, seed=5)
    second = loads_by_choice(chosen, torch.ones_like(ids))
    assert router.take_load().tolist() == [a + b for a, b in zip(first, second, strict=True)]
    assert sum(first) == 11 * TOP_K and router.take_load().tolist() == [0] * EXPERTS


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_nothing_twice(reentrant):
    router = filled(ScoreRouter(config_of(), Losses(), 1))
    x, tokens, ids = random(2, 7, HIDDEN).requires_grad_(), random_tokens(2, 7), torch.zeros(2, 7, dtype=torch.long)
    runs = []
    chosen, weights = checkpoint(lambda *a: (runs.append(1), router(*a))[1], x, tokens, ids, use_reentrant=reentrant)
    values = router.losses.collect()
    weights.square().sum().backward()
    assert len(runs) == 2  # it did recompute
    assert router.take_load().tolist() == loads_by_choice(chosen, torch.ones_like(ids))
    assert list(values) == ["balance_loss"] and router.losses.collect() == {}


def test_bias_moves_against_the_load():
    router = filled(ScoreRouter(config_of(), Losses(), 1))
    before = router.bias.clone()
    router.update_bias(torch.tensor([10, 2, 6, 6, 6]), 0.25)  # mean 6
    torch.testing.assert_close(router.bias - before, torch.tensor([-0.25, 0.25, 0, 0, 0], dtype=torch.float64))


def test_repeated_updates_balance_a_router():
    router = filled(ScoreRouter(config_of(), Losses(), 1)).eval()
    x, ids = random(4, 200, HIDDEN), torch.zeros(4, 200, dtype=torch.long)

    def violation():
        chosen, _ = router(x, ids, ids)
        load = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        router.update_bias(load, 0.02)
        return max_violation(load).item()

    violations = [violation() for _ in range(150)]
    assert violations[0] > 0.4 and max(violations[-20:]) < 0.1


def test_routers_of_a_model():
    """One of each score-routed layer and one of MTP; those of hash-routed layers are apart, and count too."""
    model = random_model(tiny_config("swa csa hca", moe__num_hash_layers=2))
    assert list(model.routers()) == ["blocks.2.ffn.router", "mtp.block.ffn.router"]
    tokens, ids, targets = batch_of([9, -3, 14], [26])
    model(tokens, ids, targets)
    loads = [router.take_load() for router in model.routers().values()]
    assert [load.sum().item() for load in loads] == [49 * 2, (8 + 13 + 25) * 2]  # MTP: tokens whose next is known
    assert list(model.hash_routers()) == ["blocks.0.ffn.router", "blocks.1.ffn.router"]
    for router in model.hash_routers().values():
        expected = torch.bincount(router.table[tokens[ids >= 0]].flatten(), minlength=EXPERTS)
        assert torch.equal(router.take_load(), expected) and router.take_load().sum() == 0


def test_experts_that_were_chosen_beforehand():
    """Their weights, the load, the balance loss and the gradients are those that the scores of now give them."""
    router = filled(ScoreRouter(config_of(), Losses(), 1))
    x, ids = random(2, 7, HIDDEN).requires_grad_(), torch.zeros(2, 7, dtype=torch.long)
    given = torch.stack(
        [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(i))[:TOP_K] for i in range(14)]
    )
    given = given.view(2, 7, TOP_K)
    own, _ = router(x, ids, ids)
    balance, _ = router.losses.collect()["balance_loss"], router.take_load()
    chosen, weights = router(x, ids, ids, given)
    assert torch.equal(chosen, given) and not torch.equal(own.sort(-1).values, given.sort(-1).values)
    scores = torch.sqrt(F.softplus(x @ router.weight.T)).gather(-1, given)
    expected = scores / scores.sum(-1, keepdim=True) * router.options.routed_scaling_factor
    torch.testing.assert_close(weights.double(), expected.double())
    assert router.take_load().tolist() == loads_by_choice(given, torch.ones_like(ids))
    assert torch.equal(router.losses.collect()["balance_loss"], balance)
    router.options.balance_loss_weight = 0.0
    _, weights = router(x, ids, ids, given)
    mine, theirs = (torch.autograd.grad(y.double().square().sum(), x, retain_graph=True) for y in (weights, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_model_takes_one_choice_for_each_forward_pass(recompute):
    """In every score-routed layer, MTP's too; with recomputation as without; and then chooses for itself again."""
    model = random_model(tiny_config("swa csa hca", moe__num_hash_layers=1))
    tokens, ids, targets = batch_of([9, -3, 14], [26])
    plain = model(tokens, ids, targets).loss
    model.recompute = recompute
    taken, generator = {}, torch.Generator().manual_seed(1)
    for name, router in model.routers().items():
        scores = torch.rand(2, *tokens.shape, 8, generator=generator)
        router.coming.extend(scores.topk(2, dim=-1).indices)
        router.register_forward_hook(lambda *args, name=name: taken.setdefault(name, []).append(args[-1][0]))
    expected = {name: list(router.coming) for name, router in model.routers().items()}
    losses = []
    for _ in range(2):
        loss = model(tokens, ids, targets).loss
        model.zero_grad()
        loss.backward()
        losses.append(loss)
    assert losses[0] != losses[1] and plain not in losses
    again = 2 if recompute == "block" else 1
    for name, router in model.routers().items():
        assert not router.coming
        for number in range(2):
            passes = taken[name][number * again : (number + 1) * again]
            assert len(passes) == again and all(torch.equal(own, expected[name][number]) for own in passes), name
    assert torch.equal(model(tokens, ids, targets).loss, plain)
