"""V4's Muon (V4 report 2.4, algorithm 1) as functions on tensors.

The last two dimensions of a tensor are the matrix, all before them are a batch of independent matrices (experts, heads,
groups, gate and up). Not for embeddings, the output head, norms, biases or gains: those are AdamW's.

Shape legend: `...` batch of matrices, `n` rows, `m` columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from v4train.optim.config import BATCH

# Coefficients (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X. The first triple drives every singular value into
# about [0.7, 1.2] as fast as possible, the second has the fixed point 1 with derivative 0 and brings them to 1.
FAST = (3.4445, -4.7750, 2.0315)
EXACT = (2.0, -1.5, 0.5)


def newton_schulz(matrices: Tensor, steps: tuple[int, int] = (8, 2), dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrix U V^T of each matrix U S V^T, by V4's hybrid Newton-Schulz iteration.

    matrices: `[..., n, m]`, any scale (also beyond what squares of float32 can hold). steps: number of FAST and of
    EXACT iterations. dtype: of the matrix products; bfloat16 is stable. Returns `[..., n, m]` in the dtype of
    `matrices`. A zero matrix gives zeros; one that is not finite gives NaN. Eight FAST iterations lift a small singular
    value 3.44^8 times, so what is below about 2.5e-5 of the matrix's norm stays below 1: of square Gaussians of 512
    rows one in four has such a value. Twelve lift it too, and a rank-deficient matrix's rounding as far.
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

    def apart(self, tensor: Tensor) -> list[Tensor]:
        """Its matrices, stacks [b, n, m] of whole ones."""
        x = tensor.flatten(-3, -2) if self.joined else tensor
        x = x if self.gather is None else self.gather(x)
        if isinstance(self.rows, int):
            return [x.reshape(-1, self.rows, x.shape[-1])]
        parts = [x] if self.rows is None else x.split(self.rows, dim=-2)
        return [part.reshape(-1, *part.shape[-2:]) for part in parts]

    def together(self, stacks: list[Tensor], shape: torch.Size) -> Tensor:
        """A tensor of this shape from what `apart` makes of one."""
        leading = shape[:-3] if self.joined else shape[:-2]
        parts = [stack.reshape(*leading, -1, stack.shape[-1]) for stack in stacks]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        return (x if self.part is None else self.part(x)).reshape(shape)


def muon_update(gradient: Tensor, momentum: Tensor, *, matrices: Matrices | None = None, **settings: Any) -> Tensor:
    """`muon_updates` of one tensor, whose last two dimensions are the matrix unless `matrices` says otherwise."""
    return muon_updates([gradient], [momentum], [matrices or Matrices()], **settings)[0]


def muon_updates(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    matrices: Sequence[Matrices],
    *,
    beta: float,
    update_rms: float,
    steps: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Muon updates O `[..., n, m]`, one a tensor; the caller applies W <- W (1 - lr * weight_decay) - lr * O.

    gradients, momenta: `[..., n, m]`; each momentum is changed in place to M = beta M + G, gradients are left alone.
    O = NewtonSchulz(beta M + G) * sqrt(max(n, m)) * update_rms, so a full-rank update has that root mean square.
    Matrices of equal shape, of any tensor, go through the iteration together, as many tensors at a time as BATCH holds.
    """
    stacks: list[list[Tensor]] = []
    for gradient, momentum, of in zip(gradients, momenta, matrices, strict=True):
        momentum.mul_(beta).add_(gradient)
        stacks.append(of.apart(torch.add(gradient, momentum, alpha=beta)))
    most = BATCH[momenta[0].device.type] if momenta else 0
    by_shape: dict[torch.Size, list[tuple[int, int]]] = defaultdict(list)
    for i, own in enumerate(stacks):
        for j, stack in enumerate(own):
            by_shape[stack.shape[1:]].append((i, j))
    for (rows, columns), places in by_shape.items():
        scale = math.sqrt(max(rows, columns)) * update_rms
        for batch in _batches(places, [stacks[i][j].numel() for i, j in places], most):
            chosen = [stacks[i][j] for i, j in batch]
            results = newton_schulz(chosen[0] if len(chosen) == 1 else torch.cat(chosen), steps, dtype).mul_(scale)
            for (i, j), result in zip(batch, results.split([len(stack) for stack in chosen]), strict=True):
                stacks[i][j] = result
    parts = zip(matrices, stacks, gradients, strict=True)
    return [of.together(own, gradient.shape) for of, own, gradient in parts]


def _batches(places: list, sizes: list[int], most: int) -> Iterator[list]:
    """Neighbours together while their sizes sum to `most`."""
    batch, total = [], 0
    for place, size in zip(places, sizes, strict=True):
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(place)
        total += size
    yield batch
