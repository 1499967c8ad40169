"""The lightning indexer's scores: which entries each query attends to, and the loss that trains them (V4 report 2.3.1).

Shapes: B batch, Q queries, N entries, K selected ones, I indexer heads, J their width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from v4train.model.config import ENTRIES_AT_ONCE
from v4train.model.precision import full, full_precision
from v4train.model.seams import Heads

ALL = Heads()
Visible = Callable[[slice], Tensor]
LOWEST = -(2**63)
LOW_BITS = 2**32 - 1


@dataclass
class IndexUse:
    """What is done with the lightning indexer's scores."""

    top_k: int
    select: bool  # attend to the top-k only (sparse mode)
    with_loss: bool  # compute the KL to the main attention


class Scored(NamedTuple):
    """Scores of entries, and what they were computed from, in full precision."""

    query: Tensor  # [B, Q, I, J]
    keys: Tensor  # [B, N, J]
    head_weight: Tensor  # [B, Q, I]
    products: Tensor  # [B, Q, I, N], ReLU(q_h . k_s)
    scores: Tensor  # [B, Q, N]


def index_scores(query: Tensor, keys: Tensor, head_weight: Tensor, heads: Heads = ALL) -> Scored:
    """sum_h w_h ReLU(q_h . k_s) (V4 report eq. 16) of [B, Q, I, J], [B, N, J], [B, Q, I].

    heads: which share of the indexer's heads these are; the sum is over all.
    """
    with full_precision(query.device.type):
        query, keys, head_weight = full(query), full(keys), full(head_weight)
        products = torch.bmm(query.flatten(1, 2), keys.mT).view(*query.shape[:3], -1).relu()
        scores = heads.reduce(torch.matmul(head_weight[:, :, None], products)[:, :, 0])
        return Scored(query, keys, head_weight, products, scores)


def select_top_k(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """Indices of the `top_k` highest scores among visible entries, ties to the lower index (DESIGN 4).

    `torch.topk` promises nothing about ties, and ReLU makes exact ones, so it is given integers without ties: the
    score's bits, in its order, above those of the index.

    Args:
        scores: [B, Q, N] fp32 (or fp64: for tests); visible: [B, Q, N] bool.

    Returns:
        [B, Q, min(K, N)] int64, in no particular order; -1 where fewer than K are visible.
    """
    top_k = min(top_k, scores.shape[-1])
    if scores.dtype == torch.float64:
        ranked = (
            scores.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        )
        return ranked.masked_fill(~visible.gather(-1, ranked), -1)
    return _entry(_ranks(scores, visible, 0).topk(top_k, dim=-1, sorted=False).values)


def select_by_index(
    query: Tensor, keys: Tensor, head_weight: Tensor, visible: Visible, top_k: int, heads: Heads = ALL
) -> Tensor:
    """`select_top_k` of `index_scores`, never holding the scores of more than ENTRIES_AT_ONCE entries.

    visible: function of a slice of entries to [B, Q, n] bool.
    """
    count = keys.shape[1]
    if count <= max(ENTRIES_AT_ONCE, top_k) or query.dtype == torch.float64:
        return select_top_k(index_scores(query, keys, head_weight, heads).scores, visible(slice(0, count)), top_k)
    best = None
    for begin in range(0, count, ENTRIES_AT_ONCE):
        some = slice(begin, min(begin + ENTRIES_AT_ONCE, count))
        ranks = _ranks(index_scores(query, keys[:, some], head_weight, heads).scores, visible(some), begin)
        ranks = ranks.topk(min(top_k, ranks.shape[-1]), dim=-1, sorted=False).values
        best = ranks if best is None else torch.cat([best, ranks], dim=-1)
        best = best.topk(min(top_k, best.shape[-1]), dim=-1, sorted=False).values
    return _entry(best)


def _ranks(scores: Tensor, visible: Tensor, first: int) -> Tensor:
    """int64 [B, Q, N] in the order of the scores, then of falling index; lowest where not visible."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative numbers all but the sign turn round
    index = torch.arange(first, first + scores.shape[-1], device=scores.device)
    return bits.long().mul_(2**32).add_(LOW_BITS - index).masked_fill_(~visible, LOWEST)


def _entry(ranks: Tensor) -> Tensor:
    """Index of each entry from its rank; -1 where it isn't visible."""
    return torch.where(ranks == LOWEST, -1, LOW_BITS - (ranks & LOW_BITS))


def selection_mask(chosen: Tensor, count: int) -> Tensor:
    """[B, Q, K] indices, -1 for none, as a mask [B, Q, count]."""
    mask = torch.zeros(*chosen.shape[:2], count + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(-1, torch.where(chosen < 0, count, chosen), True)[..., :count]


def take_rows(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows [B, N, D] at indices [B, Q, K] (row 0 for -1): [B*Q, K, D]."""
    batch, count, width = rows.shape
    flat = chosen.clamp(min=0)
    if batch > 1:
        flat = flat + torch.arange(batch, device=rows.device)[:, None, None] * count
    return rows.reshape(-1, width).index_select(0, flat.flatten()).view(-1, chosen.shape[-1], width)


def add_rows(total: Tensor, chosen: Tensor, rows: Tensor) -> None:
    """Add rows [B*Q, K, D], zero where none was chosen, to [B, N, D] at indices [B, Q, K]."""
    rows = rows.reshape(total.shape[0], -1, total.shape[-1])
    for own, index, change in zip(total, chosen.clamp(min=0).flatten(1), rows, strict=True):
        own.index_add_(0, index, change.to(own.dtype))


def normalised(probabilities: Tensor) -> Tensor:
    """The teacher: the main attention's probabilities [..., N] as shares of their sum; zeros where that is 0."""
    probabilities = probabilities.detach()
    return probabilities / probabilities.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


class IndexerKL(NamedTuple):
    """Sums over queries; those with nothing attended count 0."""

    kl: Tensor  # KL(teacher || softmax(index scores)) on the attended entries (V4.md 2.3)
    uniform: Tensor  # the same with equal scores for all of them
    score_gradient: Tensor  # [B, Q, N], of `kl`


def indexer_kl(scores: Tensor, attended: Tensor, probabilities: Tensor) -> IndexerKL:
    """Of scores [B, Q, N] fp32.

    Args:
        attended: [B, Q, N] bool, the entries compared: all visible ones or the selected ones.
        probabilities: [B, Q, N] of the main attention under its joint softmax (window and sink in the
            denominator), summed over heads. Normalised over entries they are the teacher; no gradient flows to it.
    """
    teacher, count = normalised(probabilities), attended.sum(-1, keepdim=True)
    student = scores.masked_fill(~attended & (count > 0), -torch.inf).log_softmax(-1)
    change = torch.exp(student).mul_(teacher.sum(-1, keepdim=True)).sub_(teacher)
    entropy = torch.special.xlogy(teacher, teacher).sum()
    kl = entropy - (teacher * student.masked_fill(~attended, 0)).sum()
    return IndexerKL(kl, entropy + (teacher * count.clamp(min=1).to(teacher.dtype).log()).sum(), change)


def score_gradients(scored: Scored, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query, keys and head weights from that of the scores [B, Q, N]."""
    query, keys, head_weight, products, _ = scored
    of_weight = torch.matmul(products, gradient[..., None])[..., 0]
    of_products = (products > 0).mul(gradient[:, :, None]).mul_(head_weight[..., None]).flatten(1, 2)
    of_query = torch.bmm(of_products, keys).view_as(query)
    return of_query, torch.bmm(of_products.mT, query.flatten(1, 2)), of_weight
