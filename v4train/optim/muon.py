"""V4's Muon (V4 report 2.4, algorithm 1) as functions on tensors.

The last two dimensions of a tensor are the matrix, all before them are a batch of independent matrices (experts, heads,
groups, gate and up). Not for embeddings, the output head, norms, biases or gains: those are AdamW's.

Shape legend: `...` batch of matrices, `n` rows, `m` columns.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Coefficients (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X. The first triple drives every singular value into
# about [0.7, 1.2] as fast as possible, the second has the fixed point 1 with derivative 0 and brings them to 1.
FAST = (3.4445, -4.7750, 2.0315)
EXACT = (2.0, -1.5, 0.5)


def newton_schulz(matrices: Tensor, steps: tuple[int, int] = (8, 2), dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrix U V^T of each matrix U S V^T, by V4's hybrid Newton-Schulz iteration.

    matrices: `[..., n, m]`, any scale (also beyond what squares of float32 can hold). steps: number of FAST and of
    EXACT iterations. dtype: of the matrix products; bfloat16 is stable. Returns `[..., n, m]` in the dtype of
    `matrices`. A zero matrix gives zeros; one that is not finite gives NaN.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.reshape(-1, rows, columns)
    if rows > columns:
        x = x.mT
    # Dividing by the largest entry first keeps the squares in the norm from underflowing or overflowing.
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-12)).to(dtype)
    for a, b, c in [FAST] * steps[0] + [EXACT] * steps[1]:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if rows > columns:
        x = x.mT
    return x.reshape(matrices.shape).to(matrices.dtype)


class Matrices(NamedTuple):
    """What of a tensor is one matrix to Muon: by default its last two dimensions.

    rows: sizes of the matrices that are stacked along the rows `n`, each orthogonalised and scaled alone: a tuple that
    sums to n, or one number where all have that size (heads). joined: the dimension before the matrix is rows too (the
    groups of a projection as one matrix). gather, part: where ranks have a part of each matrix, from that to the whole
    and back.
    """

    rows: tuple[int, ...] | int | None = None
    joined: bool = False
    gather: Callable[[Tensor], Tensor] | None = None
    part: Callable[[Tensor], Tensor] | None = None

    def map(self, function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """`function`, which maps batches of matrices [..., n, m] to such, of every matrix of `tensor`; those of equal
        shape go into one call."""
        x = tensor.flatten(-3, -2) if self.joined else tensor
        x = x if self.gather is None else self.gather(x)
        if isinstance(self.rows, int):
            x = function(x.unflatten(-2, (-1, self.rows))).flatten(-3, -2)
        elif self.rows is not None:
            x = _map_uneven(function, x, self.rows)
        else:
            x = function(x)
        x = x if self.part is None else self.part(x)
        return x.reshape(tensor.shape)


def _map_uneven(function: Callable[[Tensor], Tensor], x: Tensor, rows: tuple[int, ...]) -> Tensor:
    parts = list(x.split(rows, dim=-2))
    for size in set(rows):
        places = [place for place, own in enumerate(rows) if own == size]
        results = function(torch.stack([parts[place] for place in places], dim=-3)).unbind(-3)
        for place, result in zip(places, results, strict=True):
            parts[place] = result
    return torch.cat(parts, dim=-2)


def muon_update(
    gradient: Tensor,
    momentum: Tensor,
    *,
    beta: float,
    update_rms: float,
    steps: tuple[int, int],
    matrices: Matrices = Matrices(),  # noqa: B008 (immutable)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One Muon update O `[..., n, m]`; the caller applies W <- W (1 - lr * weight_decay) - lr * O.

    gradient, momentum: `[..., n, m]`; `momentum` is changed in place to M = beta M + G, `gradient` is left alone.
    O = NewtonSchulz(beta M + G) * sqrt(max(n, m)) * update_rms, so a full-rank update has that root mean square.
    """
    momentum.mul_(beta).add_(gradient)
    nesterov = torch.add(gradient, momentum, alpha=beta)

    def orthogonalised(x: Tensor) -> Tensor:
        return newton_schulz(x, steps, dtype) * (math.sqrt(max(x.shape[-2:])) * update_rms)

    return matrices.map(orthogonalised, nesterov)
