"""Linear layers whose weight is a stack of independent matrices: the last two dimensions are the matrix."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.flatten(0, -3).transpose(0, 1)
        return torch.bmm(grouped, self.weight.mT).transpose(0, 1).unflatten(0, x.shape[:-2])
