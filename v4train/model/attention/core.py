"""The one softmax of V4 attention: window, compressed entries and sink together (V4 report eq. 18, section 2.3).

Works query chunk by query chunk and recomputes each chunk in backward, so that memory is linear in the sequence:
no [S, S] tensor exists. The indexer's scores and its KL loss live in the same chunks, for the same reason.

Shapes: B batch, S sequence, Q queries of a chunk, H heads, D head width, N entries, I indexer heads, J their width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from v4train.model.documents import Blocks
from v4train.model.precision import full, full_precision


@dataclass
class IndexInputs:
    """What the lightning indexer scores with, and what to do with the scores."""

    query: Tensor  # [B, S, I, J], rotated
    keys: Tensor  # [B, N, J], rotated
    head_weight: Tensor  # [B, S, I], both scale factors included
    top_k: int
    select: bool  # attend to the top-k only (sparse mode)
    with_loss: bool  # compute the KL to the main attention


def index_scores(query: Tensor, keys: Tensor, head_weight: Tensor) -> Tensor:
    """sum_h w_h ReLU(q_h . k_s), fp32 (V4 report eq. 16): [B, Q, I, J], [B, N, J], [B, Q, I] -> [B, Q, N]."""
    batch, queries, heads, _ = query.shape
    with full_precision(query.device.type):
        products = torch.bmm(full(query).flatten(1, 2), full(keys).mT).view(batch, queries, heads, -1)
        return torch.einsum("bqin,bqi->bqn", products.relu(), full(head_weight))


def select_top_k(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """Mask of the `top_k` highest scores among visible entries, ties to the lower index (DESIGN 4): [B, Q, N] bool.

    `torch.topk` promises nothing about ties, and ReLU makes exact ones, so only its k-th value is used.
    """
    if scores.shape[-1] <= top_k:
        return visible
    scores = scores.masked_fill(~visible, -torch.inf)
    threshold = scores.topk(top_k, dim=-1, sorted=True).values[..., -1:]
    above = scores > threshold
    tied = scores == threshold
    room = top_k - above.sum(-1, keepdim=True)
    return (above | (tied & (tied.cumsum(-1) <= room))) & visible


def indexer_kl(scores: Tensor, attended: Tensor, probabilities: Tensor) -> Tensor:
    """Sum over queries of KL(teacher || softmax(index scores)) on the attended entries (V4.md 2.3).

    Args:
        scores: [B, Q, N] fp32, with gradient.
        attended: [B, Q, N] bool, the entries compared: all visible ones or the selected ones.
        probabilities: [B, Q, H, N] of the main attention under its joint softmax (window and sink in the
            denominator). Summed over heads and normalised over entries it is the teacher; no gradient flows to it.

    Returns:
        Scalar. Queries with nothing attended count 0.
    """
    teacher = full(probabilities.detach()).sum(2)
    teacher = teacher / teacher.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    anything = attended.any(-1, keepdim=True)
    student = scores.masked_fill(~attended & anything, -torch.inf).log_softmax(-1).masked_fill(~attended, 0)
    return (torch.special.xlogy(teacher, teacher) - teacher * student).sum()


def attend(
    query: Tensor,
    kv: Tensor,
    sink: Tensor,
    starts: Tensor,
    window: int,
    entries: Tensor | None = None,
    blocks: Blocks | None = None,
    index: IndexInputs | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Joint softmax over the last `window` tokens, the compressed entries and the sink.

    Args:
        query: [B, S, H, D] rotated; kv: [B, S, D] rotated, key and value in one, shared by all heads.
        sink: [H] fp32 logits that join the denominator and carry no value.
        starts: [B, S] first token of each token's document; nothing before it is seen.
        entries: [B, N, D] rotated compressed entries laid out by `blocks`.
        index: if given, restricts the entries to the indexer's choice and/or trains the indexer.
        chunk: queries computed at a time; changes memory and speed, not the result.

    Returns:
        (output [B, S, H, D], sum over queries of the indexer's KL, fp32 scalar).
    """
    length = query.shape[1]
    outputs, kl = [], full(query.new_zeros(()))
    for begin in range(0, length, chunk):
        arguments = (query, kv, sink, starts, window, entries, blocks, index, begin, min(begin + chunk, length))
        if torch.is_grad_enabled() and length > chunk:
            output, chunk_kl = checkpoint(_attend_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            output, chunk_kl = _attend_chunk(*arguments)
        outputs.append(output)
        kl = kl + chunk_kl
    return torch.cat(outputs, dim=1), kl


def _attend_chunk(
    query: Tensor,
    kv: Tensor,
    sink: Tensor,
    starts: Tensor,
    window: int,
    entries: Tensor | None,
    blocks: Blocks | None,
    index: IndexInputs | None,
    begin: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """`attend` for queries begin..stop-1."""
    batch, _, heads, dim = query.shape
    oldest = max(begin - window + 1, 0)
    keys, seen = kv[:, oldest:stop], _window_mask(starts, window, oldest, begin, stop)
    scores = None
    if entries is not None and blocks is not None and entries.shape[1]:
        attended = blocks.visible(begin, stop)
        if index is not None:
            scores = index_scores(index.query[:, begin:stop], index.keys, index.head_weight[:, begin:stop])
            if index.select:
                attended = select_top_k(scores.detach(), attended, index.top_k)
        keys, seen = torch.cat([keys, entries], dim=1), torch.cat([seen, attended], dim=2)

    chunk_query = query[:, begin:stop].reshape(batch, -1, dim) * dim**-0.5
    logits = full(torch.bmm(chunk_query, keys.mT)).view(batch, stop - begin, heads, -1)
    logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
    # softmax over [logits, sink] = softmax(logits) * sigmoid(logsumexp(logits) - sink); a query always sees itself.
    keep = torch.sigmoid(logits.logsumexp(-1) - full(sink))
    weights = logits.softmax(-1)
    output = torch.bmm(weights.to(keys.dtype).flatten(1, 2), keys).view(batch, stop - begin, heads, dim)
    output = (output * keep[..., None]).to(query.dtype)

    kl = logits.new_zeros(())
    if scores is not None and index.with_loss:
        with torch.no_grad():
            probabilities = weights[..., stop - oldest :] * keep[..., None]
        kl = indexer_kl(scores, attended, probabilities)
    return output, kl


def _window_mask(starts: Tensor, window: int, oldest: int, begin: int, stop: int) -> Tensor:
    """Which of the keys oldest..stop-1 the queries begin..stop-1 see: [B, Q, stop - oldest] bool."""
    query = torch.arange(begin, stop, device=starts.device)[:, None]
    key = torch.arange(oldest, stop, device=starts.device)
    causal = (key <= query) & (key > query - window)
    return causal & (key >= starts[:, begin:stop, None])
