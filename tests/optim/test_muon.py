"""Muon against the singular value decomposition and a naive, unbatched twin."""

import math

import pytest
import torch

from v4train.optim import muon
from v4train.optim.muon import Matrices, muon_update, muon_updates, newton_schulz

SETTINGS = {"beta": 0.95, "update_rms": 0.18, "steps": (8, 2)}
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2
SHAPES = [(64, 64), (512, 512), (512, 64), (48, 300), (64, 512), (512, 511), (1, 7), (7, 1)]
SHAPES += [(3, 2, 40, 96), (5, 16, 16), (4, 128, 128), (2, 512, 512)]


def naive_newton_schulz(matrix, coefficients):
    """One float64 matrix, never transposed, the polynomial written out."""
    x = matrix / matrix.square().sum().sqrt()
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x


def naive_update(gradient, momentum, beta):
    momentum = beta * momentum + gradient
    x = naive_newton_schulz(beta * momentum + gradient, COEFFICIENTS)
    return x * 0.18 * math.sqrt(max(x.shape)), momentum


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_one_and_the_update_has_its_rms(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    assert (torch.linalg.svdvals(newton_schulz(gradient)) - 1).abs().max() < 0.01
    update = muon_update(gradient, torch.zeros(shape), **SETTINGS)
    rms = update.square().mean(dim=(-2, -1)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.18), atol=0.002, rtol=0)


@pytest.mark.parametrize("shape", [(256, 256), (512, 512), (2, 512, 512)])
def test_what_ten_iterations_lift(shape):
    """A square Gaussian matrix may have a singular value that is next to nothing: from 2.5e-5 of the norm on it comes
    within 1 % of 1, and the update's root mean square does not depend on it."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, values = torch.linalg.svdvals(newton_schulz(gradient)), torch.linalg.svdvals(gradient)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    assert (found[values > 2.5e-5] - 1).abs().max() < 0.01
    rms = muon_update(gradient, torch.zeros(shape), **SETTINGS).square().mean(dim=(-2, -1)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.18), atol=0.002, rtol=0)


@pytest.mark.parametrize("shape", [(128, 128), (256, 256), (512, 512), (512, 511), (4, 256, 256)])
def test_twelve_fast_iterations_lift_what_any_gaussian_has(shape):
    for seed in range(8):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert (torch.linalg.svdvals(newton_schulz(gradient, (12, 2))) - 1).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(64, 64), (128, 24), (3, 2, 40, 96), (7, 1)])
def test_singular_values_follow_the_scalar_polynomial(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.linalg.svdvals(gradient)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    found = torch.linalg.svdvals(newton_schulz(gradient, dtype=torch.float64))
    torch.testing.assert_close(found, values.sort(-1, descending=True).values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (2, 3, 12, 20)])
def test_keeps_the_singular_vectors(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close(newton_schulz(gradient, dtype=torch.float64), u @ vh, atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (2, 3, 12, 20)])
def test_equals_the_naive_twin_over_three_steps(shape):
    generator = torch.Generator().manual_seed(3)
    momentum = torch.zeros(shape)
    batch = math.prod(shape[:-2])
    naive = [torch.zeros(shape[-2:], dtype=torch.float64) for _ in range(batch)]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        before = gradient.clone()
        update = muon_update(gradient, momentum, **SETTINGS)
        assert torch.equal(gradient, before)
        matrices = gradient.double().reshape(-1, *shape[-2:])
        expected = []
        for i in range(batch):
            one, naive[i] = naive_update(matrices[i], naive[i], 0.95)
            expected.append(one)
        torch.testing.assert_close(update.double(), torch.stack(expected).view(shape), atol=1e-4, rtol=0)
        torch.testing.assert_close(momentum.double(), torch.stack(naive).view(shape), atol=1e-5, rtol=0)


def test_rows_that_are_independent_matrices():
    gradient = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(4))
    momentum = torch.zeros_like(gradient)
    update = muon_update(gradient, momentum, matrices=Matrices((4, 4, 16)), **SETTINGS)
    parts = [muon_update(part, torch.zeros_like(part), **SETTINGS) for part in gradient.split([4, 4, 16], dim=-2)]
    torch.testing.assert_close(update, torch.cat(parts, dim=-2), atol=1e-6, rtol=0)
    together = muon_update(gradient, torch.zeros_like(gradient), **SETTINGS)
    assert (update - together).abs().max() > 0.01
    assert torch.equal(momentum, gradient)


def test_heads_are_matrices_of_their_own():
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(8))
    update = muon_update(gradient, torch.zeros_like(gradient), matrices=Matrices(8), **SETTINGS)
    heads = [naive_update(head, torch.zeros(8, 16).double(), 0.95)[0] for head in gradient.double().split(8)]
    torch.testing.assert_close(update.double(), torch.cat(heads), atol=1e-5, rtol=0)


def test_joined_groups_are_one_matrix():
    gradient = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(9))
    update = muon_update(gradient, torch.zeros_like(gradient), matrices=Matrices(joined=True), **SETTINGS)
    whole, _ = naive_update(gradient.double().view(24, 16), torch.zeros(24, 16).double(), 0.95)
    torch.testing.assert_close(update.double(), whole.view(3, 8, 16), atol=1e-5, rtol=0)


def test_matrices_of_equal_shape_go_through_newton_schulz_together(monkeypatch):
    seen = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x, *settings: seen.append(tuple(x.shape)) or x.clone())
    monkeypatch.setitem(muon.BATCH, "cpu", 16 * 8 * 6)
    shapes = [(24, 6), (24, 6), (5, 2, 8, 6), (8, 6), (3, 8, 6)]
    matrices = [Matrices((4, 4, 16)), Matrices(8), Matrices(), Matrices(), Matrices()]
    zeros = [torch.zeros(shape) for shape in shapes]
    updates = muon_updates(zeros, [x.clone() for x in zeros], matrices, **SETTINGS)
    assert [update.shape for update in updates] == [x.shape for x in zeros]
    assert sorted(seen) == [(1, 16, 6), (2, 4, 6), (3, 8, 6), (14, 8, 6)]  # no more than BATCH elements at a time


def test_together_is_one_by_one():
    generator = torch.Generator().manual_seed(10)
    shapes = [(24, 6), (24, 6), (5, 2, 8, 6), (8, 6), (3, 8, 6)]
    matrices = [Matrices((4, 4, 16)), Matrices(8), Matrices(), Matrices(), Matrices(joined=True)]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    momenta = [torch.randn(shape, generator=generator) for shape in shapes]
    alone = [
        muon_update(gradient, momentum.clone(), matrices=of, **SETTINGS)
        for gradient, momentum, of in zip(gradients, momenta, matrices, strict=True)
    ]
    before = [momentum.clone() for momentum in momenta]
    for update, expected in zip(muon_updates(gradients, momenta, matrices, **SETTINGS), alone, strict=True):
        torch.testing.assert_close(update, expected, atol=1e-6, rtol=0)
    for momentum, old, gradient in zip(momenta, before, gradients, strict=True):
        torch.testing.assert_close(momentum, 0.95 * old + gradient)


@pytest.mark.parametrize("rows", [None, (2, 4), 3])
def test_zero_gradient_gives_zero_update(rows):
    update = muon_update(torch.zeros(3, 6, 8), torch.zeros(3, 6, 8), matrices=Matrices(rows), **SETTINGS)
    assert torch.equal(update, torch.zeros(3, 6, 8))


def test_one_zero_matrix_of_a_stack_stays_zero():
    gradient = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(5))
    gradient[1] = 0
    update = newton_schulz(gradient)
    assert torch.equal(update[1], torch.zeros(6, 8)) and update.isfinite().all()


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e20, 1e37])
def test_any_scale_is_orthogonalised(scale):
    """Squares of such entries underflow or overflow in float32. At 1e-44 only a few bits of each entry are left."""
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(6))
    update = newton_schulz(gradient * scale)
    assert update.isfinite().all()
    if scale > 1e-40:
        torch.testing.assert_close(update, newton_schulz(gradient), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(value):
    gradient = torch.ones(4, 4)
    gradient[1, 2] = value
    assert newton_schulz(gradient).isnan().any()


def test_bfloat16_products():
    gradient = torch.randn(4, 96, 128, generator=torch.Generator().manual_seed(7))
    update = newton_schulz(gradient, dtype=torch.bfloat16)
    assert update.dtype == torch.float32
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.9 and values.max() < 1.1
