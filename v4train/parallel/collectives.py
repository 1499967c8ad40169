"""Collectives with gradients. Each has the gradient of the mean of all ranks' losses, but for `copy` and `reduce`,
which belong to ranks that share one loss.

Nothing here starts a collective that the other ranks of the group do not start in the same order.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, a new tensor without gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return summed(gradient, ctx.group), None


def copy(x: Tensor, group: Group) -> Tensor:
    """x, whose gradient is the sum over ranks that share one loss."""
    return _Copy.apply(x, group)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks that share one loss."""
    return _Reduce.apply(x, group)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return summed(gradient, ctx.group), None


def total(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks that each have a loss of their own."""
    return _Total.apply(x, group)


def gathered(x: Tensor, dim: int, group: Group) -> Tensor:
    """x of all ranks, the same shape on each, one after another along `dim`; a new tensor without gradient."""
    x = x.detach().movedim(dim, 0).contiguous()
    whole = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x, group=group)
    return whole.movedim(0, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group, ctx.length = dim, group, x.shape[dim]
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.movedim(ctx.dim, 0).contiguous()
        own = gradient.new_empty(ctx.length, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient, group=ctx.group)
        return own.movedim(0, ctx.dim), None, None


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """x of all ranks, the same shape on each, one after another along `dim`."""
    return _Gather.apply(x, dim, group)


class _FromPrevious(torch.autograd.Function):
    """Each rank but the last hands x on to the next one; the first gets nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        return _hand_on(x, group, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        back = _hand_on(gradient, ctx.group, -1, ctx.shape)
        return back if back.numel() else gradient.new_zeros(ctx.shape), None


def from_previous(x: Tensor, group: Group) -> Tensor:
    """The previous rank's x; on the first rank nothing, of x's shape but for a first dimension of 0."""
    return _FromPrevious.apply(x, group)


def _hand_on(x: Tensor, group: Group, step: int, shape: torch.Size | None = None) -> Tensor:
    """Send x `step` ranks on, return what comes from there: of x's shape or `shape`, or nothing at the end."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    x = x.detach().contiguous()
    shape = x.shape if shape is None else shape
    came = x.new_empty(shape if 0 <= rank - step < count else (0, *shape[1:]))
    operations = []
    if 0 <= rank + step < count and x.numel():
        operations.append(dist.P2POp(dist.isend, x, dist.get_global_rank(group, rank + step), group))
    if came.numel():
        operations.append(dist.P2POp(dist.irecv, came, dist.get_global_rank(group, rank - step), group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return came


class Exchange:
    """Uneven rows that all ranks of a group send each other; between `start` and `finish` they are under way.

    In backward `finish` starts what `start` waits for, so that what was computed in between overlaps there too.
    """

    def __init__(self, group: Group, sent: list[int], received: list[int]) -> None:
        """sent, received: number of rows for and from each rank."""
        self.group, self.sent, self.received = group, sent, received
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None  # with what must live until it has been sent

    def start(self, x: Tensor) -> Tensor:
        """Rows [sent, ...] to what will be [received, ...]; to be read after `finish` only."""
        return _Start.apply(x, self)

    def finish(self, x: Tensor) -> Tensor:
        """What `start` gave, arrived."""
        return _Finish.apply(x, self)

    def begin(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        kept, came = x.detach().contiguous(), x.new_empty(sum(received), *x.shape[1:])
        work = dist.all_to_all_single(came, kept, received, sent, group=self.group, async_op=True)
        self._under_way = work, kept, came
        return came

    def wait(self) -> Tensor:
        work, _, came = self._under_way
        work.wait()
        self._under_way = None
        return came


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(x, exchange.sent, exchange.received)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        exchange = ctx.exchange
        exchange.begin(gradient, exchange.received, exchange.sent)
        return gradient, None  # read by no one: `_Start` has what came
