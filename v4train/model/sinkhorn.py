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
    factors, denominators = [torch.ones_like(x[:, 0]), torch.ones_like(x[0])], []
    for turn in _turns(iterations):
        denominators.append(_weighted_sums(x, factors[1 - turn], turn).mul_(factors[turn]).add_(eps))
        factors[turn] = factors[turn] / denominators[-1]
    rows, columns = factors
    return x * rows[:, None] * columns[None], x, rows, columns, *denominators


def sinkhorn_backward(
    gradient: Tensor, eps: float, x: Tensor, rows: Tensor, columns: Tensor, *denominators: Tensor
) -> Tensor:
    """Gradient of the logits [C, C, ...] from that of the matrices and the rest of `sinkhorn`'s results."""
    factors = [rows, columns]
    change, weighted = gradient * rows[:, None] * columns[None], gradient * x
    gradients = [_weighted_sums(weighted, columns, 0), _weighted_sums(weighted, rows, 1)]
    turns = _turns((len(denominators) + 1) // 2)
    for turn, denominator in zip(reversed(turns), reversed(denominators), strict=True):
        # new = own / denominator, denominator = own * sums + eps, sums = x weighted by the other factor
        other, own_gradient = factors[1 - turn], gradients[turn]
        sums_gradient = factors[turn].square().mul_(own_gradient).neg_()
        gradients[turn] = own_gradient / denominator.square() * eps
        factors[turn] = factors[turn] * denominator
        if turn == 0:
            change.addcmul_(sums_gradient[:, None], other[None])
        else:
            change.addcmul_(other[:, None], sums_gradient[None])
        gradients[1 - turn] = _weighted_sums(x, sums_gradient, 1 - turn).add_(gradients[1 - turn])
    softmax = x - eps
    return softmax * (change - (change * softmax).sum(1, keepdim=True))


def _turns(iterations: int) -> list[int]:
    """Which factor each division changes: 1 the columns' (sums over sources), 0 the rows'."""
    return [1, *[0, 1] * (iterations - 1)]


def _weighted_sums(x: Tensor, weights: Tensor, turn: int) -> Tensor:
    """For the columns (turn 1) sum_i x[i, j] weights[i], for the rows (0) sum_j x[i, j] weights[j]: [C, ...]."""
    parts = x.unbind(1 - turn)
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(part, weight)
    return total
