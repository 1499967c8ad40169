"""V4's Muon (V4 report 2.4, algorithm 1) as functions on tensors.

The last two dimensions of a tensor are the matrix, all before them are a batch of independent matrices (experts, heads,
groups, gate and up). Not for embeddings, the output head, norms, biases or gains: those are AdamW's.

Shape legend: `...` batch of matrices, `n` rows, `m` columns.
"""

import math
from collections.abc import Callable, Sequence
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
    """What of a tensor is one matrix to Muon, beside its leading dimensions.

    independent_rows: sizes of the matrices that are stacked along the rows (they sum to n), each orthogonalised and
    scaled alone; None is one matrix. gather, part: where ranks have a part of each matrix, from that to the whole and
    back.
    """

    independent_rows: Sequence[int] | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    part: Callable[[Tensor], Tensor] | None = None


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
    if matrices.gather is not None:
        nesterov = matrices.gather(nesterov)
    updates = []
    for matrix in nesterov.split(list(matrices.independent_rows or nesterov.shape[-2:-1]), dim=-2):
        scale = math.sqrt(max(matrix.shape[-2:])) * update_rms
        updates.append(newton_schulz(matrix, steps, dtype) * scale)
    update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=-2)
    return update if matrices.part is None else matrices.part(update)
