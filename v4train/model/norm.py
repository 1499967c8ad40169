"""RMSNorm, with and without a learned weight, and LayerNorm. Statistics are fp32 whatever the input's dtype."""

import torch
from torch import Tensor, nn

from v4train.model.precision import full, full_precision


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, no weight; same shape and dtype as `x`."""
    scale = torch.rsqrt(full(x).square().mean(-1, keepdim=True) + eps)
    return (x * scale).to(x.dtype)


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

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(full(x), self.weight.shape, full(self.weight), self.eps).to(x.dtype)
