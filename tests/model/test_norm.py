"""Norms against their formulas, differentiated by autograd."""

import pytest
import torch

from v4train.model.norm import RMSNorm, rms_norm

EPS = 1e-2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 1), (1, 2, 3, 4)])
def test_values_and_gradients(shape):
    norm, x = RMSNorm(shape[-1], EPS).double(), random(*shape).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(random(shape[-1], seed=1))
    cotangent = random(*shape, seed=2)
    torch.testing.assert_close(norm(x), formula(x, norm.weight), atol=1e-12, rtol=0)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), cotangent)
    theirs = torch.autograd.grad(formula(x, norm.weight), (x, norm.weight), cotangent)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(rms_norm(x, EPS), formula(x, 1), atol=1e-12, rtol=0)
    ours, theirs = (torch.autograd.grad(y, x, cotangent) for y in (rms_norm(x, EPS), formula(x, 1)))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_statistics_of_bf16_are_fp32():
    x, norm = 100 * random(4, 512).bfloat16(), RMSNorm(512, EPS)
    torch.nn.init.ones_(norm.weight)
    x.requires_grad_()
    for y in (norm(x), rms_norm(x, EPS)):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), formula(x.double(), 1), atol=0, rtol=2**-8)
        assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16
