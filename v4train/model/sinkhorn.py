"""Sinkhorn's projection of mHC's mixing matrices, and its gradient, as plain functions (V4 report eq. 8).

Shapes: C streams; matrices are [source, destination, ...], so that sums over streams are vectorised over tokens.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

SMALL = 2**16  # elements of an operation for which a second thread takes as long to wake as it saves


def _by_one_thread_if_small(function: Callable) -> Callable:
    """`function` of tensors, which does many operations one after another on as much as the first of them.

    The number of threads is the process's: nothing else should start a thread of its own meanwhile, and nothing does.
    """

    @wraps(function)
    def limited(first: Tensor, *others):
        threads = torch.get_num_threads()
        if threads == 1 or first.device.type != "cpu" or first.numel() > SMALL:
            return function(first, *others)
        torch.set_num_threads(1)
        try:
            return function(first, *others)
        finally:
            torch.set_num_threads(threads)

    return limited


@_by_one_thread_if_small
def sinkhorn(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, ...]:
    """Approximately doubly stochastic matrices from logits [C, C, ...], same shape; then what backward needs.

    The released code's order (V4.md trap 3): softmax over destinations, divide by the sums over sources, then
    `iterations - 1` times both. On B = transpose this is 20 x RowNorm(ColNorm(.)) of report eq. 8.

    Dividing by sums changes one factor a row and one a column only, 2 C numbers a token and not C^2: the matrix is
    x[i, j] rows[i] columns[j]. Each division by (sum + eps) makes 1 / factor the sum over x weighted by the other
    factor, plus eps / old factor. Factors are kept, [turns, C, ...], and x.
    """
    x = logits.softmax(dim=1) + eps
    turns, products = _turns(iterations), torch.empty_like(x)
    factors = x.new_empty(len(turns), *x.shape[1:])
    other, inverses = torch.ones_like(x[0]), [torch.ones_like(x[0])] * 2  # of rows, of columns
    for turn, factor in zip(turns, factors.unbind(), strict=True):
        inverses[turn] = _weighted_sums(x, other, turn, products).add_(inverses[turn], alpha=eps)
        other = torch.reciprocal(inverses[turn], out=factor)
    rows, columns = _last(factors)
    return x * rows * columns, x, factors


@_by_one_thread_if_small
def sinkhorn_backward(gradient: Tensor, eps: float, x: Tensor, factors: Tensor) -> Tensor:
    """Gradient of the logits [C, C, ...] from that of the matrices and the rest of `sinkhorn`'s results."""
    rows, columns = _last(factors)
    gradient = gradient.contiguous()  # it comes from a product with tokens first
    change, products = gradient * rows * columns, torch.empty_like(x)
    gradient = gradient * x
    of_rows, own = (gradient * columns).sum(1), (gradient * rows).sum(0)
    turns, slopes = _turns((len(factors) + 1) // 2), factors.square().neg_().unbind()  # d factor / d (1 / factor)
    others = [torch.ones_like(x[0]), *factors.unbind()]  # the factor that each turn's sums are weighted with
    later = [torch.zeros_like(own), torch.zeros_like(own)]  # gradients of 1 / rows, 1 / columns at the turn after
    for number in reversed(range(len(turns))):
        turn, other = turns[number], others[number]
        later[turn] = (own * slopes[number]).add_(later[turn], alpha=eps)
        row, column = (later[turn], other) if turn == 0 else (other, later[turn])
        change.addcmul_(row[:, None], column[None])
        own = _weighted_sums(x, later[turn], 1 - turn, products)
        if number + 1 == len(turns):
            own += of_rows
    softmax = x - eps
    return softmax * (change - (change * softmax).sum(1, keepdim=True))


def _turns(iterations: int) -> list[int]:
    """Which factor each division changes: 1 the columns' (sums over sources), 0 the rows'."""
    return [1, *[0, 1] * (iterations - 1)]


def _last(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Those of rows and of columns that the matrix has in the end, [C, 1, ...] and [1, C, ...]."""
    rows = factors[-2] if len(factors) > 1 else torch.ones_like(factors[0])
    return rows[:, None], factors[-1][None]


def _weighted_sums(x: Tensor, weights: Tensor, turn: int, products: Tensor) -> Tensor:
    """For the columns (turn 1) sum_i x[i, j] weights[i], for the rows (0) sum_j x[i, j] weights[j]: [C, ...].

    products: room for them, like x. Few operations on much each: the time is that of starting them.
    """
    return torch.mul(x, weights[:, None] if turn == 1 else weights[None], out=products).sum(1 - turn)
