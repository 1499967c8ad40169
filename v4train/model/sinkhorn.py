"""Sinkhorn's projection of mHC's mixing matrices, and its gradient, as plain functions (V4 report eq. 8).

Shapes: C streams; matrices are [source, destination, ...], so that sums over streams are vectorised over tokens.
"""

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, ...]:
    """Approximately doubly stochastic matrices from logits [C, C, ...], same shape; then what backward needs.

    The released code's order (V4.md trap 3): softmax over destinations, divide by the sums over sources, then
    `iterations - 1` times both. On B = transpose this is 20 x RowNorm(ColNorm(.)) of report eq. 8.

    Dividing by sums changes one factor a row and one a column only, 2 C numbers a token and not C^2: the matrix is
    x[i, j] rows[i] columns[j]. Only the denominators are kept: backward multiplies its way to each iterate.
    """
    x = logits.softmax(dim=1) + eps
    factors, turns = [torch.ones_like(x[:, 0]), torch.ones_like(x[0])], _turns(iterations)
    added, products = torch.full_like(x[0], eps), torch.empty_like(x)
    denominators = x.new_empty(len(turns), *x.shape[1:])
    for turn, denominator in zip(turns, denominators, strict=True):
        sums = _weighted_sums(x, factors[1 - turn], turn, products)
        torch.addcmul(added, sums, factors[turn], out=denominator)
        factors[turn] = factors[turn] / denominator
    rows, columns = factors
    return x * rows[:, None] * columns[None], x, rows, columns, denominators


def sinkhorn_backward(
    gradient: Tensor, eps: float, x: Tensor, rows: Tensor, columns: Tensor, denominators: Tensor
) -> Tensor:
    """Gradient of the logits [C, C, ...] from that of the matrices and the rest of `sinkhorn`'s results."""
    factors, products = [rows, columns], torch.empty_like(x)
    gradient = gradient.contiguous()  # it comes from a product with tokens first
    change = gradient * rows[:, None] * columns[None]
    gradient = gradient * x
    gradients = [_weighted_sums(gradient, columns, 0, products), _weighted_sums(gradient, rows, 1, products)]
    turns = _turns((len(denominators) + 1) // 2)
    for turn, denominator in zip(reversed(turns), denominators.flip(0), strict=True):
        # new = own / denominator, denominator = own * sums + eps, sums = x weighted by the other factor
        other, own_gradient = factors[1 - turn], gradients[turn]
        sums_gradient = factors[turn].square().mul_(own_gradient).neg_()
        gradients[turn] = denominator.square().reciprocal_().mul_(own_gradient).mul_(eps)
        factors[turn] = factors[turn] * denominator
        row, column = (sums_gradient, other) if turn == 0 else (other, sums_gradient)
        change.addcmul_(row[:, None], column[None])
        gradients[1 - turn] += _weighted_sums(x, sums_gradient, 1 - turn, products)
    softmax = x - eps
    return softmax * (change - (change * softmax).sum(1, keepdim=True))


def _turns(iterations: int) -> list[int]:
    """Which factor each division changes: 1 the columns' (sums over sources), 0 the rows'."""
    return [1, *[0, 1] * (iterations - 1)]


def _weighted_sums(x: Tensor, weights: Tensor, turn: int, products: Tensor) -> Tensor:
    """For the columns (turn 1) sum_i x[i, j] weights[i], for the rows (0) sum_j x[i, j] weights[j]: [C, ...].

    products: room for them, like x. Few operations on much each: the time is that of starting them.
    """
    return torch.mul(x, weights[:, None] if turn == 1 else weights[None], out=products).sum(1 - turn)
