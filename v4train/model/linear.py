"""Linear layers whose weight is a stack of independent matrices: the last two dimensions are the matrix. And the last
layer of a part whose inner channels may be shared out."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.flatten(0, -3).transpose(0, 1)
        return torch.bmm(grouped, self.weight.mT).transpose(0, 1).unflatten(0, x.shape[:-2])


class SharedOutLinear(nn.Linear):
    """[..., in] -> [..., out], where the inputs at hand may be a share of all: the sum over the shares, plus bias."""

    seams = Seams()

    def forward(self, x: Tensor) -> Tensor:
        heads = self.seams.heads
        if heads.count == 1:
            return super().forward(x)
        y = heads.reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias
