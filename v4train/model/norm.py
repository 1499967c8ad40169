"""RMSNorm, with and without a learned weight, and LayerNorm. Statistics are fp32 whatever the input's dtype."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from v4train.model.precision import full, full_precision
from v4train.model.seams import Heads


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, no weight; same shape and dtype as `x`."""
    return _Normalise.apply(x, eps)


class _Normalise(torch.autograd.Function):
    """Saves its input and one number a row; four passes in all."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, scale)
        return (x * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        # y = s x, s = (mean(x^2) + eps)^-1/2: dx = s (dy - x s^2 mean(x dy))
        x, scale = ctx.saved_tensors
        along = (full(x) * gradient).mean(-1, keepdim=True) * scale.square()
        return (gradient - x * along).mul_(scale).to(x.dtype), None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays as 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=full(x[:0]).dtype)
    return torch.rsqrt(norm.square_() / x.shape[-1] + eps)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension with a learned weight and bias [dim]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device.type):
            weight, bias = full(self.weight), full(self.bias)
            return nn.functional.layer_norm(full(x), self.weight.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension with a learned weight [dim]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor, heads: Heads | None = None) -> Tensor:
        """heads: where each head of x has the same weight, which share of the heads these are."""
        weight = self.weight if heads is None else heads.copy(self.weight)
        return _WeightedNormalise.apply(x, weight, self.eps)


class _WeightedNormalise(torch.autograd.Function):
    """As `_Normalise`, times the weight: torch's own saves the normalised values too (2.13)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(full(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        # y = w s x: dx = s (w dy - x s^2 mean(x w dy)), dw = sum of s x dy
        x, weight, scale = ctx.saved_tensors
        full_x, full_weight, gradient = full(x), full(weight), full(gradient)
        with full_precision(x.device.type):
            products = (full_x * gradient).flatten(0, -2)
            weight_gradient = torch.mv(products.mT, scale.flatten())
            along = torch.mv(products, full_weight).view_as(scale) * scale.pow(3) / -x.shape[-1]
            x_gradient = (gradient * full_weight).mul_(scale).addcmul_(full_x, along)
        return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype), None
