"""Experts, shared experts and their products against loops over tokens and experts."""

import math

import pytest
import torch

from tests.model.mixtures import EXPERTS, HIDDEN, TOP_K, config_of, filled, random
from v4train.model import cached
from v4train.model.ffn import ACTIVATIONS, Activation
from v4train.model.linear import GroupedLinear, StackedLinear
from v4train.model.losses import Losses
from v4train.model.moe import MoE
from v4train.model.moe import experts as implementation
from v4train.model.moe.experts import Experts, grouped_product, grouped_weight_gradient


def naive_expert(x, gate, up, down, limit):
    """One SwiGLU of one token [M], number by number."""
    hidden = []
    for g, u in zip(gate @ x, up @ x, strict=True):
        g, u = (
            torch.minimum(g, g.new_tensor(limit)),
            torch.maximum(torch.minimum(u, u.new_tensor(limit)), -u.new_tensor(limit)),
        )
        hidden.append(g / (1 + (-g).exp()) * u)
    return down @ torch.stack(hidden)


def swiglu(gate, up, limit):
    return Activation(*ACTIVATIONS["swiglu"], limit)(torch.cat([gate, up], -1))


def test_experts_token_by_token():
    """Values and gradients, with experts that get nothing and a clamp that bites."""
    config = config_of(moe__swiglu_limit=1.5)
    experts = filled(Experts(config))
    x, weights = random(9, HIDDEN).requires_grad_(), random(9, TOP_K, seed=1).requires_grad_()
    chosen = torch.tensor([[0, 3], [3, 0], [4, 3], [3, 4], [0, 4], [0, 3], [4, 0], [3, 0], [4, 3]])  # not 1, not 2
    ours = experts(x, chosen, weights)
    rows = []
    for token in range(9):
        parts = [(weights[token, k], chosen[token, k]) for k in range(TOP_K)]
        rows.append(sum(w * naive_expert(x[token], *experts.gate_up[e], experts.down[e], 1.5) for w, e in parts))
    theirs = torch.stack(rows)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    inputs, cotangent = (x, weights, *experts.parameters()), random(9, HIDDEN, seed=2)
    gradients = [torch.autograd.grad(output, inputs, cotangent) for output in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)
    assert gradients[0][2][1:3].abs().sum() == 0 and gradients[0][2][0].abs().sum() > 0


@pytest.mark.parametrize("shared", [1, 2])
def test_shared_expert_token_by_token(shared):
    expert = filled(MoE(config_of(moe__num_shared_experts=shared, moe__swiglu_limit=1.5), Losses(), True).shared)
    assert expert.gate_up.weight.shape == (2, 3 * shared, HIDDEN)
    x = random(2, 4, HIDDEN)
    expected = torch.stack([naive_expert(t, *expert.gate_up.weight, expert.down.weight, 1.5) for t in x.flatten(0, 1)])
    torch.testing.assert_close(expert(x).flatten(0, 1), expected, atol=1e-12, rtol=0)


def test_swiglu_clamps_gate_above_and_up_on_both_sides():
    gate, up = torch.tensor([-50.0, 2.0, 50.0, 50.0, 2.0]), torch.tensor([3.0, 50.0, 3.0, -50.0, -3.0])

    def silu(x):
        return x / (1 + math.exp(-x))

    expected = [silu(-50) * 3, silu(2) * 10, silu(10) * 3, silu(10) * -10, silu(2) * -3]
    assert swiglu(gate, up, 10.0).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_of_the_activation(name, limit):
    """Against autograd on the formula, where the clamp bites and where it does not."""
    gate_up, cotangent = random(7, 12).requires_grad_(), random(7, 6, seed=1)
    activation = Activation(*ACTIVATIONS[name], limit)
    gate, up = gate_up.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    slope, shift = {"swiglu": (1, 0), "swiglu_oai": (1.702, 1)}[name]
    formula = gate * torch.sigmoid(slope * gate) * (up + shift)
    torch.testing.assert_close(activation(gate_up.detach()), formula.detach(), atol=1e-12, rtol=0)
    expected = torch.autograd.grad(formula, gate_up, cotangent)[0]
    torch.testing.assert_close(activation.backward(gate_up.detach(), cotangent), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(8, 16), (5, 3), (7, 8), (1, 1)])
@pytest.mark.parametrize("rows", [[3, 0, 4, 1], [0, 0, 0, 8], [1, 0, 0, 0], [0, 0, 0, 0]])
def test_grouped_products(rows, sizes, dtype):
    """Odd widths, groups without rows, no rows at all; the product, the one back, and the weight's gradient."""
    width, outputs = sizes
    x, weight = random(sum(rows), width).to(dtype), random(len(rows), outputs, width, seed=1).to(dtype)
    gradient = random(sum(rows), outputs, seed=2).to(dtype)
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    exact_x, exact_weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    product = torch.cat([part @ exact_weight[group].T for group, part in enumerate(exact_x.split(rows))])
    expected = [product.detach(), *torch.autograd.grad(product, (exact_x, exact_weight), gradient.double())]
    ours = [
        grouped_product(x, weight, ends),
        grouped_product(gradient, weight.mT, ends),
        grouped_weight_gradient(gradient, x, ends),
    ]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for mine, other in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), other, atol=tolerance, rtol=tolerance)


def test_autocast_multiplies_in_bf16():
    """Values and gradients are those of fp32 to bf16's rounding, and come back in the inputs' own dtypes."""
    experts = filled(Experts(config_of()), 0.5, torch.float32)
    x, weights = random(9, HIDDEN, dtype=torch.float32).requires_grad_(), random(9, TOP_K, dtype=torch.float32, seed=1)
    chosen, inputs = torch.arange(9)[:, None].add(torch.tensor([0, 1])) % EXPERTS, (x, *experts.parameters())
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = experts(x, chosen, weights)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append([output.float(), *torch.autograd.grad(output.float().square().sum(), inputs)])
    for rounded, exact in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() / exact.norm() < 0.03


def test_stacked_and_grouped_projections():
    x, stacked = random(2, 3, 4), filled(StackedLinear(3, 4, 5))
    torch.testing.assert_close(stacked(x), torch.cat([x @ matrix.T for matrix in stacked.weight], -1))
    x, grouped = random(2, 3, 6, 4), filled(GroupedLinear(6, 4, 5))
    expected = torch.stack([x[:, :, group] @ grouped.weight[group].T for group in range(6)], 2)
    torch.testing.assert_close(grouped(x), expected)


def test_gpt_oss_experts_token_by_token():
    """Biases, and (up + 1) * gate * sigmoid(1.702 gate) with its clamps."""
    experts = filled(Experts(config_of(moe__expert_bias=True, moe__activation="swiglu_oai", moe__swiglu_limit=1.5)))
    x, chosen = random(9, HIDDEN), torch.randint(0, EXPERTS, (9, TOP_K), generator=torch.Generator().manual_seed(0))
    weights = random(9, TOP_K, seed=1)
    ours = experts(x, chosen, weights)
    for token in range(9):
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for k in range(TOP_K):
            e = chosen[token, k]
            gate, up = (experts.gate_up[e, part] @ x[token] + experts.gate_up_bias[e, part] for part in (0, 1))
            gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            expected = expected + weights[token, k] * (experts.down[e] @ inner + experts.down_bias[e])
        torch.testing.assert_close(ours[token], expected, atol=1e-12, rtol=0)


def test_no_limit_is_no_clamp():
    gate, up = torch.tensor([-50.0, 2.0, 50.0]), torch.tensor([3.0, 50.0, -50.0])
    assert swiglu(gate, up, None).tolist() == pytest.approx((torch.nn.functional.silu(gate) * up).tolist())


@pytest.mark.parametrize("bias", [False, True])
def test_ranges_of_experts_are_computed_as_one(bias, monkeypatch):
    """As many rows at a time as a cache holds, or the rows of one expert; some experts have none."""
    experts = filled(Experts(config_of(moe__num_experts=9, moe__expert_bias=bias)))
    chosen = torch.randint(0, 7, (40, TOP_K), generator=torch.Generator().manual_seed(0))
    chosen[chosen == 2] = 5
    results = {}
    for limit in (1, 20 * HIDDEN, 2**20):
        monkeypatch.setattr(implementation, "CACHED", limit)
        groups = implementation.groups_of(chosen, 9)
        blocks = implementation.ranges_of(groups, HIDDEN)
        assert (len(blocks) == 1) == (limit == 2**20)
        assert blocks[-1].rows.stop == chosen.numel() and blocks[-1].experts.stop == 9
        x, weights = random(40, HIDDEN).requires_grad_(), random(40, TOP_K, seed=1).requires_grad_()
        experts.zero_grad()
        output = experts(x, chosen, weights)
        output.sin().sum().backward()
        results[limit] = [output, x.grad, weights.grad, *(p.grad for p in experts.parameters())]
    for other in (1, 20 * HIDDEN):
        for ours, expected in zip(results[other], results[2**20], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_rows_of_no_token_change_nothing(tokens, monkeypatch):
    """What fills each expert's rows up to a multiple, as in bf16 on the CPU."""
    experts = filled(Experts(config_of(moe__num_experts=9, moe__expert_bias=True)))
    chosen = torch.randint(0, 7, (tokens, TOP_K), generator=torch.Generator().manual_seed(0))
    results = []
    for multiple in (1, 4):
        groups = implementation.groups_of(chosen, 9, multiple)
        counts = torch.diff(groups.ends, prepend=groups.ends.new_zeros(1))
        assert not (counts % multiple).any() and counts.sum() == len(groups.token) == len(groups.expert)
        assert torch.equal(groups.expert[groups.row], chosen)
        monkeypatch.setattr(implementation, "groups_of", lambda *_, made=groups, **__: made)
        x, weights = random(tokens, HIDDEN).requires_grad_(), random(tokens, TOP_K, seed=1).requires_grad_()
        experts.zero_grad()
        output = experts(x, chosen, weights)
        output.sin().sum().backward()
        results.append([output, x.grad, weights.grad, *(p.grad for p in experts.parameters())])
        monkeypatch.undo()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_gradients_of_the_experts():
    experts = filled(Experts(config_of(moe__expert_bias=True, moe__activation="swiglu_oai", moe__swiglu_limit=1.5)))
    chosen = torch.randint(0, EXPERTS, (5, TOP_K), generator=torch.Generator().manual_seed(0))
    inputs = (random(5, HIDDEN).requires_grad_(), random(5, TOP_K, seed=1).requires_grad_(), *experts.parameters())

    def compute(x, weights, *parameters):
        names = [name for name, _ in experts.named_parameters()]
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (x, chosen, weights))

    assert torch.autograd.gradcheck(compute, inputs)


def test_slices_cover_all_rows(monkeypatch):
    monkeypatch.setattr(cached, "CACHED", 12)
    for rows, width in [(0, 3), (1, 3), (4, 3), (5, 3), (9, 3), (3, 100)]:
        x = torch.arange(rows * width).view(rows, width)
        parts = [x[part] for part in cached.blocks(x)]
        assert torch.equal(torch.cat(parts), x)
        assert all(part.numel() <= 12 or part.shape[0] == 1 for part in parts)
