"""The chunked loss against torch's cross-entropy of all logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.model.memory import LargestTensor
from v4train.model import cross_entropy
from v4train.model.cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 23, 5, 11


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[[0, 7, 22]] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def reference(x, weight, targets):
    return F.cross_entropy(x @ weight.T, targets, reduction="sum", ignore_index=-100)


def gradients(loss, *of):
    return torch.autograd.grad(3 * loss, of)


@pytest.mark.parametrize("rows", [1, 4, 23, 1000])
def test_value_and_gradients(monkeypatch, rows):
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", rows * 4 * VOCABULARY)
    x, weight, targets = inputs()
    ours, theirs = linear_cross_entropy(x, weight, targets), reference(x, weight, targets)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for mine, other in zip(gradients(ours, x, weight), gradients(theirs, x, weight), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch):
    rows = 20
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", rows * 4 * VOCABULARY)
    x, weight, targets = inputs(torch.float32)
    with LargestTensor() as largest:
        linear_cross_entropy(x, weight, targets).backward()
    assert largest.elements == rows * VOCABULARY


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradient_that_is_needed(frozen):
    pair = list(inputs()[:2])
    pair[frozen] = pair[frozen].detach()
    targets = inputs()[2]
    ours, theirs = linear_cross_entropy(*pair, targets), reference(*pair, targets)
    kept = pair[1 - frozen]
    torch.testing.assert_close(gradients(ours, kept), gradients(theirs, kept), atol=1e-12, rtol=0)


def test_value_without_gradients():
    x, weight, targets = inputs()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            ours = linear_cross_entropy(x, weight, targets)
        torch.testing.assert_close(ours, reference(x, weight, targets))
    assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * VOCABULARY  # the logits, and no gradient


def test_everything_ignored():
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    assert loss == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(loss, x, weight))


def test_large_logits_stay_finite():
    x, weight, targets = inputs(torch.float32)
    loss = linear_cross_entropy(1000 * x, weight, targets)
    torch.testing.assert_close(loss, reference(1000 * x, weight, targets), rtol=1e-6, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, x, weight))


def test_bf16_autocast_is_close_and_keeps_fp32_sums():
    x, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets)
    assert ours.dtype == torch.float32
    theirs = reference(x, weight, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=5e-3) and ours != theirs
    for mine, other in zip(gradients(ours, x, weight), gradients(theirs, x, weight), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() / other.norm() < 0.02


@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_losses_of_each_target(monkeypatch, chunk_rows):
    generator = torch.Generator().manual_seed(11)
    x, weight = torch.randn(10, 6, generator=generator), torch.randn(13, 6, generator=generator)
    targets = torch.randint(13, (10,), generator=generator)
    logits = x @ weight.T
    targets[4], targets[7] = -100, logits[7].argmax()
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 4 * 13 * chunk_rows)
    nats, likeliest = cross_entropy.token_losses(x, weight, targets)
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="none", ignore_index=-100))
    assert likeliest.tolist() == (logits.argmax(-1) == targets).tolist() and likeliest[7] and not likeliest[4]
