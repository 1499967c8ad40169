"""Rotary embedding against closed forms (V4.md 0.1)."""

import dataclasses
import math

import pytest
import torch

from tests.models import PLAIN_ROPE as PLAIN
from tests.models import YARN_ROPE as YARN
from v4train.model.norm import rms_norm
from v4train.model.rope import inverse_frequencies, rotate, rotate_normalised, rotations

CPU = torch.device("cpu")


def test_plain_frequencies():
    expected = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(inverse_frequencies(64, PLAIN, CPU), expected, atol=0, rtol=1e-6)


def test_yarn_frequencies_of_v4():
    """Kept up to pair 15, divided by 16 from pair 25 on, linear between (V4.md 0.1)."""

    def correction(rotations):
        return 64 * math.log(65536 / (2 * math.pi * rotations)) / (2 * math.log(160000))

    assert (math.floor(correction(32)), math.ceil(correction(1))) == (15, 25)
    expected = []
    for pair in range(32):
        frequency, ramp = 160000.0 ** (-2 * pair / 64), min(max((pair - 15) / 10, 0), 1)
        expected.append(frequency * (1 - ramp) + frequency / 16 * ramp)
    ours = inverse_frequencies(64, YARN, CPU)
    torch.testing.assert_close(ours, torch.tensor(expected), atol=0, rtol=1e-6)
    assert ours[15].item() == pytest.approx(160000.0 ** (-30 / 64), rel=1e-6)
    assert ours[25].item() == pytest.approx(160000.0 ** (-50 / 64) / 16, rel=1e-6)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def test_interleaved_pairs_of_the_last_channels():
    x, positions = random(2, 5, 3, 10), torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 900]])
    ours = rotate(x, rotations(positions, 6, YARN))
    frequency = inverse_frequencies(6, YARN, CPU).tolist()
    expected = x.clone()
    for row in range(2):
        for token in range(5):
            for pair in range(3):
                angle = positions[row, token].item() * frequency[pair]
                a, b = x[row, token, :, 4 + 2 * pair], x[row, token, :, 5 + 2 * pair]
                expected[row, token, :, 4 + 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                expected[row, token, :, 5 + 2 * pair] = a * math.sin(angle) + b * math.cos(angle)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)  # the angle 900 * f is rounded to fp32
    torch.testing.assert_close(ours[0], expected[0], atol=1e-6, rtol=0)
    assert torch.equal(ours[..., :4], x[..., :4])
    assert not torch.isclose(ours[:, 1:, :, 4:], x[:, 1:, :, 4:])[0].any()


@pytest.mark.parametrize("shape", [(2, 7, 16), (2, 7, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype_are_kept_and_the_conjugate_rotates_back(shape, dtype):
    x = random(*shape, dtype=torch.float32).to(dtype)
    rotation = rotations(torch.arange(7).repeat(2, 1), 8, PLAIN)
    turned = rotate(x, rotation)
    assert turned.dtype == dtype and turned.shape == x.shape
    assert (turned - x).abs().max() > 0.5
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(rotate(turned, rotation.conj()), x, atol=tolerance, rtol=0)


@pytest.mark.parametrize("rope", [PLAIN, YARN], ids=["plain", "yarn"])
def test_products_depend_on_the_distance_alone(rope):
    query, key = random(1, 1, 12).expand(1, 40, 12), random(1, 1, 16)[..., :12].expand(1, 40, 12)
    rotation = rotations(torch.arange(40)[None], 8, rope)
    products = (rotate(query, rotation) @ rotate(key, rotation).mT)[0]
    for distance in range(-39, 40):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=2e-5, rtol=0)
    assert (products[0] - products[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_rotation_of_what_is_normalised_is_both_one_after_the_other(factor, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    gradient = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
    rotation = rotations(torch.arange(10).view(2, 5), 8, dataclasses.replace(PLAIN, attention_factor=factor))
    results = []
    for y in (rotate_normalised(x, rotation, 0.1), rotate(rms_norm(x, 0.1), rotation)):
        results.append((y, *torch.autograd.grad(y, x, gradient)))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
