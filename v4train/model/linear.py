"""Linear layers whose weight is a stack of independent matrices: the last two dimensions are the matrix. And the last
layer of a part whose inner channels may be shared out."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from v4train.model.precision import product_dtype
from v4train.model.seams import Seams


class StackedLinear(nn.Module):
    """One input, `stack` projections side by side: [..., in] -> [..., stack * out], weight [stack, out, in]."""

    def __init__(self, stack: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(0, 1))


class GroupedLinear(nn.Module):
    """Each group its own input and projection: [..., G, in] -> [..., G, out], weight [G, out, in]."""

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))
        self.weight.grouped = True  # to the optimizer: a matrix a group, or all of them one

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        return _Grouped.apply(x.to(dtype), self.weight.to(dtype))


class _Grouped(torch.autograd.Function):
    """Autograd's own gradient of the weight would copy the transposed inputs (torch 2.13)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _each(x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        rows, inputs = (part.flatten(0, -3).transpose(0, 1) for part in (gradient, x))
        return _each(gradient, weight), torch.bmm(rows.mT, inputs)


def _each(x: Tensor, matrices: Tensor) -> Tensor:
    """[..., G, in] times [G, in, out]."""
    product = torch.bmm(x.flatten(0, -3).transpose(0, 1), matrices)
    return product.transpose(0, 1).unflatten(0, x.shape[:-2])


class SharedOutLinear(nn.Linear):
    """[..., in] -> [..., out], where the inputs at hand may be a share of all: the sum over the shares, plus bias."""

    seams = Seams()

    def forward(self, x: Tensor) -> Tensor:
        heads = self.seams.heads
        if heads.count == 1:
            return super().forward(x)
        y = heads.reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias
