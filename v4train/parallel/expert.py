"""Expert parallelism: each rank of a group holds a share of every layer's experts, and tokens go to where theirs are.

Nothing is dropped: the exchange is as uneven as the choices. Each rank sends one row for every expert of every token,
sorted by expert, and with it the expert's weight, which is applied where the expert is.

Shapes: T tokens here, K experts a token, R = T K rows sent, A rows arrived, M hidden.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from v4train.model.moe.experts import groups_of, sum_of_rows
from v4train.model.precision import product_dtype
from v4train.model.seams import Dispatched, Experts, Rows
from v4train.parallel.collectives import Exchange, Group


class SharedOutExperts(Experts):
    """Experts r N / E ... (r + 1) N / E - 1 of N are on rank r of E."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(self, rows: Rows, num_experts: int) -> Dispatched:
        return _Sent(rows, num_experts, self.group)


class _Sent(Dispatched):
    def __init__(self, rows: Rows, num_experts: int, group: Group) -> None:
        ranks = dist.get_world_size(group)
        self.groups = groups_of(rows.chosen, num_experts)
        ends = self.groups.ends.long()
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).view(ranks, -1)  # [rank, expert of it]
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=group)
        sent, received = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()
        experts = torch.arange(theirs.shape[1], device=theirs.device).repeat(ranks)
        self.chosen = experts.repeat_interleave(theirs.flatten())[:, None]  # [A, 1]
        self.x, self.weights = Exchange(group, sent, received), Exchange(group, sent, received)
        self.results = Exchange(group, received, sent)
        x = _Spread.apply(rows.x.to(product_dtype(rows.x)), self.groups.token, self.groups.row)
        weights = rows.weights.flatten().index_select(0, self.groups.order)[:, None]
        self.rows = Rows(self.x.start(x), self.chosen, self.weights.start(weights))

    def arrived(self) -> Rows:
        return Rows(self.x.finish(self.rows.x), self.chosen, self.weights.finish(self.rows.weights))

    def back(self, results: Tensor) -> Tensor:
        rows = self.results.finish(self.results.start(results))
        return _Collect.apply(rows, self.groups.token, self.groups.row)


class _Spread(torch.autograd.Function):
    """Tokens [T, M] to rows [R, M]; gradients are summed in a fixed order, which `index_select` doesn't promise."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (row,) = ctx.saved_tensors
        return sum_of_rows(gradient.contiguous(), row), None, None


class _Collect(torch.autograd.Function):
    """Rows [R, M] summed to tokens [T, M]."""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return sum_of_rows(rows, row)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (token,) = ctx.saved_tensors
        return gradient.index_select(0, token), None, None
