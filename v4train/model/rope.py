"""Rotary position embedding: interleaved pairs, the LAST `rope_dim` channels, YaRN (V4.md 0.1, 2.2).

Shapes: B batch, S sequence, H heads, D head width, R = rope_dim.
"""

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from v4train.model.config import RopeConfig
from v4train.model.norm import inverse_rms
from v4train.model.precision import full


def inverse_frequencies(rope_dim: int, rope: RopeConfig, device: torch.device) -> Tensor:
    """Angle per position of each of the R/2 pairs, fp32 [R/2]; blended with f/factor (YaRN) if factor > 1."""
    yarn = (rope.factor, rope.original_length, rope.beta_fast, rope.beta_slow, rope.truncate)
    return _frequencies(rope_dim, rope.theta, *yarn, device)


@functools.lru_cache(maxsize=64)
def _frequencies(
    rope_dim: int,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
    device: torch.device,
) -> Tensor:
    exponent = torch.arange(0, rope_dim, 2, dtype=torch.float32, device="cpu") / rope_dim
    frequency = 1.0 / theta**exponent
    if factor > 1:

        def correction_dim(rotations: float) -> float:
            return rope_dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = correction_dim(beta_fast), correction_dim(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope_dim - 1)
        pair = torch.arange(rope_dim // 2, dtype=torch.float32, device="cpu")
        ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency = frequency * (1 - ramp) + frequency / factor * ramp
    return frequency.to(device)


def rotations(positions: Tensor, rope_dim: int, rope: RopeConfig) -> Tensor:
    """Complex numbers factor * exp(i * position * frequency): [B, S] int -> complex64 [B, S, R/2].

    The factor is `rope.attention_factor`, 1 but for models that scale cosines and sines (YaRN's mscale in gpt-oss).
    """
    angle = positions[..., None].float() * inverse_frequencies(rope_dim, rope, positions.device)
    return torch.polar(torch.full_like(angle, rope.attention_factor), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of the last R channels of x.

    Args:
        x: [B, S, ..., D], any dtype.
        rotation: complex64 [B, S, R/2] from `rotations`; pass its conjugate to rotate back.

    Returns:
        Tensor of x's shape and dtype. Source: V4 report section 2.3, partial RoPE on the last 64 dimensions.
    """
    return _Rotate.apply(x, _broadcast(rotation, x))


def rotate_normalised(x: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """`rotate(rms_norm(x, eps), rotation)`, of which backward needs the result only."""
    return _RotateNormalised.apply(x, _broadcast(rotation, x), eps)


def _broadcast(rotation: Tensor, x: Tensor) -> Tensor:
    """[B, S, R/2] as [B, S, 1 ..., R/2], for x [B, S, ..., D]."""
    return rotation.reshape(*rotation.shape[:2], *[1] * (x.dim() - 3), rotation.shape[-1])


class _Rotate(torch.autograd.Function):
    """One copy and the turned channels in place, both ways; slices and a concatenation would be several copies."""

    @staticmethod
    def forward(ctx, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _turn(x.clone(memory_format=torch.contiguous_format), rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (rotation,) = ctx.saved_tensors
        return _turn(gradient.clone(memory_format=torch.contiguous_format), rotation.conj()), None


class _RotateNormalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rotation: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        y = _turn((x * scale).to(x.dtype), rotation)
        ctx.save_for_backward(y, scale, rotation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        # y = R n, n = s x: dx = s (R^T dy - n mean(n . R^T dy)), where n . R^T dy = y . dy and n = R^T y / |r|^2
        y, scale, rotation = ctx.saved_tensors
        along = torch.linalg.vecdot(full(y), full(gradient))[..., None] / y.shape[-1]
        change = full(y) * along
        turned = change[..., -2 * rotation.shape[-1] :].unflatten(-1, (-1, 2))
        turned /= torch.view_as_real(rotation).to(change.dtype).square().sum(-1, keepdim=True)
        torch.sub(gradient, change, out=change)
        return _turn(change, rotation.conj()).mul_(scale).to(y.dtype), None, None


def _turn(x: Tensor, rotation: Tensor) -> Tensor:
    """x itself, its last channels rotated in place."""
    last = x[..., -2 * rotation.shape[-1] :]
    pairs = torch.view_as_complex(full(last).unflatten(-1, (-1, 2)).contiguous())
    last.copy_(torch.view_as_real(pairs * rotation).flatten(-2))
    return x
