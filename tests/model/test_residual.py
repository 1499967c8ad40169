"""Residual connections against per-token loops and both descriptions of Sinkhorn (V4.md 0 trap 3, 2.1)."""

import math

import pytest
import torch

from tests.models import tiny_config
from v4train.model import cached
from v4train.model.residual import (
    HyperConnection,
    PlainResidual,
    SingleStream,
    StreamCollapse,
    StreamSum,
    UnconstrainedHyperConnection,
)
from v4train.model.sinkhorn import sinkhorn, sinkhorn_backward

STREAMS, HIDDEN = 4, 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def released_sinkhorn(logits, iterations, eps):
    """The released code's steps on one matrix [source][destination], in plain Python."""
    count = len(logits)
    comb = []
    for row in logits:
        total = sum(math.exp(value) for value in row)
        comb.append([math.exp(value) / total + eps for value in row])

    def by_column(comb):
        sums = [sum(comb[j][k] for j in range(count)) + eps for k in range(count)]
        return [[comb[j][k] / sums[k] for k in range(count)] for j in range(count)]

    def by_row(comb):
        sums = [sum(comb[j]) + eps for j in range(count)]
        return [[comb[j][k] / sums[j] for k in range(count)] for j in range(count)]

    comb = by_column(comb)
    for _ in range(iterations - 1):
        comb = by_column(by_row(comb))
    return torch.tensor(comb, dtype=torch.float64)


def reported_sinkhorn(logits, iterations):
    """Report eq. 8 on B [destination, source]: RowNorm(ColNorm(.)) of exp, `iterations` times."""
    matrix = logits.exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_follows_both_descriptions(count, iterations):
    logits = 2 * random(count, count, 3, 5)
    ours, ours_without_eps = (sinkhorn(logits, iterations, eps)[0] for eps in (1e-3, 0.0))
    for b in range(3):
        for t in range(5):
            one = logits[:, :, b, t]
            expected = released_sinkhorn(one.tolist(), iterations, 1e-3)
            torch.testing.assert_close(ours[:, :, b, t], expected, atol=1e-12, rtol=0)
            expected = reported_sinkhorn(one.T, iterations).T
            torch.testing.assert_close(ours_without_eps[:, :, b, t], expected, atol=1e-12, rtol=0)


def test_sinkhorn_is_doubly_stochastic():
    """What arrives at each stream sums to exactly 1 (the last step), what leaves each nearly so."""
    mixing, *_ = sinkhorn(random(4, 4, 50), 20, 0.0)
    torch.testing.assert_close(mixing.sum(0), torch.ones(4, 50, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(mixing.sum(1), torch.ones(4, 50, dtype=torch.float64), atol=1e-3, rtol=0)
    assert mixing.min() > 0 and mixing.std() > 0.05


def weight_like(logits):
    return random(*logits.shape, seed=4).to(logits.dtype)


def gradient_of_sinkhorn(logits, eps):
    """Of the matrices' sum weighted by `weight_like`."""
    return sinkhorn_backward(weight_like(logits), eps, *sinkhorn(logits, 20, eps)[1:])


def test_gradient_of_sinkhorn():
    logits = 2 * random(4, 4)
    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad((reported_sinkhorn(leaf.T, 20).T * weight_like(logits)).sum(), leaf)[0]
    torch.testing.assert_close(gradient_of_sinkhorn(logits, 0.0), expected, atol=1e-12, rtol=0)
    assert expected.abs().max() > 0.1


def test_one_thread_for_small_tensors_only(monkeypatch):
    before, seen, softmax = torch.get_num_threads(), [], torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda *a, **k: seen.append(torch.get_num_threads()) or softmax(*a, **k)
    )
    torch.set_num_threads(2)
    try:
        results = [sinkhorn(logits, 3, 1e-6)[0] for logits in (torch.zeros(4, 4, 5), torch.zeros(4, 4, 5000))]
        assert all(torch.allclose(result, torch.tensor(0.25)) for result in results) and torch.get_num_threads() == 2
        with pytest.raises(RuntimeError):
            sinkhorn(torch.zeros(4, 4, 5, dtype=torch.int32), 3, 1e-6)
        assert torch.get_num_threads() == 2 and seen == [1, 2, 1]
    finally:
        torch.set_num_threads(before)


def test_gradient_of_sinkhorn_survives_fp32_and_large_logits():
    logits = 15 * random(4, 4, 200)
    exact, ours = gradient_of_sinkhorn(logits, 1e-6), gradient_of_sinkhorn(logits.float(), 1e-6)
    assert (ours - exact).norm() / exact.norm() < 1e-4


def module_of(kind, **changes):
    config = tiny_config("swa", hidden_size=HIDDEN, residual__num_streams=STREAMS, **changes)
    module = kind(config).double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return module, config


def normalised(token, eps):
    """Stream-major vector of one token's streams [C, M] over its root mean square."""
    flat = torch.cat([token[stream] for stream in range(STREAMS)])
    return flat / (flat.square().mean() + eps).sqrt()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def naive_hyper_connection(module, config, token, f):
    """B X + C f(A X) of one token's streams [C, M], and A X."""
    eps = config.residual.eps
    x = normalised(token, config.norm_eps)
    weight, bias, (alpha_pre, alpha_post, alpha_mix) = module.projection, module.static_bias, module.gates
    pre = sigmoid(alpha_pre * (weight[:4] @ x) + bias[:4]) + eps
    post = 2 * sigmoid(alpha_post * (weight[4:8] @ x) + bias[4:8])
    logits = [[alpha_mix * (weight[8 + 4 * j + k] @ x) + bias[8 + 4 * j + k] for k in range(4)] for j in range(4)]
    comb = released_sinkhorn([[value.item() for value in row] for row in logits], 20, eps)
    collapsed = sum(pre[i] * token[i] for i in range(4))
    output = f(collapsed)
    return collapsed, torch.stack([sum(comb[j, k] * token[j] for j in range(4)) + post[k] * output for k in range(4)])


def test_hyper_connection_token_by_token():
    module, config = module_of(HyperConnection)
    streams = random(2, 5, STREAMS, HIDDEN, seed=9)
    with torch.no_grad():
        x, streams, coefficients = module(streams)
        merged = module.merge(streams, x.sin(), coefficients)
        for b in range(2):
            for t in range(5):
                collapsed, expected = naive_hyper_connection(module, config, streams[b, t], torch.sin)
                torch.testing.assert_close(x[b, t], collapsed, atol=1e-12, rtol=0)
                torch.testing.assert_close(merged[b, t], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cached_tokens", [1, 2, 100])
@pytest.mark.parametrize("kind", [HyperConnection, UnconstrainedHyperConnection])
def test_gradient_of_hyper_connection(kind, cached_tokens, monkeypatch):
    """Passes over tokens that a cache doesn't hold all are made in blocks."""
    monkeypatch.setattr(cached, "CACHED", cached_tokens * STREAMS * HIDDEN)
    module, _ = module_of(kind, residual__sinkhorn_iterations=5)
    streams = random(1, 3, STREAMS, HIDDEN, seed=9).requires_grad_()

    def residual(streams, *_):
        x, streams, coefficients = module(streams)
        return module.merge(streams, x.sin(), coefficients)

    assert torch.autograd.gradcheck(residual, (streams, *module.parameters()))


@pytest.mark.parametrize("kind", [HyperConnection, UnconstrainedHyperConnection])
def test_tensors_of_any_layout(kind):
    module, _ = module_of(kind)
    streams, output = random(3, 2, STREAMS, HIDDEN).transpose(0, 1), random(3, 2, HIDDEN, seed=1).transpose(0, 1)
    results = []
    for inputs in ((streams, output), (streams.contiguous(), output.contiguous())):
        inputs = [x.detach().requires_grad_() for x in inputs]
        x, unmixed, coefficients = module(inputs[0])
        merged = module.merge(unmixed, x.sin() + inputs[1], coefficients)
        loss = merged.transpose(0, 1).contiguous().sin().sum()
        gradients = torch.autograd.grad(loss, [*inputs, *module.parameters()])
        results.append([merged, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_tokens_at_all():
    module, _ = module_of(HyperConnection)
    x, streams, coefficients = module(random(1, 0, STREAMS, HIDDEN))
    assert x.shape == (1, 0, HIDDEN)
    assert module.merge(streams, x, coefficients).shape == (1, 0, STREAMS, HIDDEN)


def test_collapse_token_by_token():
    module, config = module_of(StreamCollapse)
    streams = random(2, 5, STREAMS, HIDDEN, seed=9)
    with torch.no_grad():
        ours = module(streams)
        for b in range(2):
            for t in range(5):
                x = normalised(streams[b, t], config.norm_eps)
                pre = sigmoid(module.gates[0] * (module.projection @ x) + module.static_bias) + config.residual.eps
                expected = sum(pre[i] * streams[b, t, i] for i in range(STREAMS))
                torch.testing.assert_close(ours[b, t], expected, atol=1e-12, rtol=0)


def test_initial_coefficients():
    """With zero biases and closed gates A = 1/2, C = 1 and B = 1/4: streams are averaged at every site."""
    module, _ = module_of(HyperConnection)
    streams = random(2, 3, STREAMS, HIDDEN, seed=9)
    with torch.no_grad():
        module.gates.zero_()
        module.static_bias.zero_()
        x, streams, coefficients = module(streams)
        merged = module.merge(streams, x, coefficients)
    torch.testing.assert_close(x, streams.sum(2) / 2, atol=1e-5, rtol=0)  # eps = 1e-6 is added to A
    expected = (streams.mean(2) + x)[:, :, None].expand_as(streams)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)


def test_streams_of_bf16_keep_fp32_coefficients():
    module, _ = module_of(HyperConnection)
    streams = random(2, 5, STREAMS, HIDDEN, seed=9).bfloat16()
    exact, *_ = module(streams.double())
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        x, streams, coefficients = module(streams)
        merged = module.merge(streams, x, coefficients)
    assert x.dtype == merged.dtype == torch.bfloat16
    assert coefficients.mixing.dtype == coefficients.post.dtype == torch.float32
    torch.testing.assert_close(x.double(), exact, atol=0.05, rtol=0)


def test_gradients_of_bf16_streams():
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        module, _ = module_of(HyperConnection)
        module = module if dtype == torch.float64 else module.float()
        streams = random(2, 5, STREAMS, HIDDEN, seed=9).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            x, unmixed, coefficients = module(streams)
            loss = module.merge(unmixed, x.sin(), coefficients).double().square().sum()
        gradients.append(torch.autograd.grad(loss, [streams, *module.parameters()]))
    for exact, ours in zip(*gradients, strict=True):
        assert (ours.double() - exact).norm() <= 0.05 * exact.norm()


def test_plain_residual():
    streams, output = random(2, 5, 1, HIDDEN), random(2, 5, HIDDEN, seed=1)
    config = tiny_config("swa", residual__kind="plain")
    x, streams, coefficients = PlainResidual(config)(streams)
    assert torch.equal(x, streams[:, :, 0])
    assert torch.equal(PlainResidual(config).merge(streams, output, coefficients)[:, :, 0], streams[:, :, 0] + output)
    assert torch.equal(SingleStream(config)(streams), streams[:, :, 0])


def test_unconstrained_hyper_connection_token_by_token():
    """mHC paper eq. 5: H = gate * tanh(theta . norm(x_j)) + bias for each stream x_j."""
    config = tiny_config(hidden_size=HIDDEN, residual__kind="hc")
    module = UnconstrainedHyperConnection(config).double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    streams, output = random(2, 3, STREAMS, HIDDEN, seed=7), random(2, 3, HIDDEN, seed=8)
    collapsed, streams, coefficients = module(streams)
    merged = module.merge(streams, output, coefficients)
    pre_bias, post_bias, mixing_bias = module.static_bias.split([STREAMS, STREAMS, STREAMS**2])
    mixing_bias = mixing_bias.view(STREAMS, STREAMS)  # [source, destination]
    for b in range(2):
        for t in range(3):
            x = streams[b, t]
            unit = [x[j] / (x[j].square().mean() + config.norm_eps).sqrt() for j in range(STREAMS)]

            def dynamic(row, gate, stream, unit=unit):
                return module.gates[gate] * torch.tanh(module.projection[row] @ unit[stream])

            read = sum((dynamic(0, 0, j) + pre_bias[j]) * x[j] for j in range(STREAMS))
            torch.testing.assert_close(collapsed[b, t], read, atol=1e-12, rtol=0)
            for k in range(STREAMS):
                mixed = sum((dynamic(2 + k, 2, j) + mixing_bias[j, k]) * x[j] for j in range(STREAMS))
                written = (dynamic(1, 1, k) + post_bias[k]) * output[b, t]
                torch.testing.assert_close(merged[b, t, k], mixed + written, atol=1e-12, rtol=0)


def test_hyper_connections_end_in_a_sum():
    streams = random(2, 3, STREAMS, HIDDEN)
    torch.testing.assert_close(StreamSum(tiny_config())(streams), sum(streams[:, :, j] for j in range(STREAMS)))
