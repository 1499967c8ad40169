"""The one softmax of V4 attention: window, compressed entries and sink together (V4 report eq. 18, section 2.3).

Works query chunk by query chunk; backward computes each chunk's softmax again from the saved log-sum-exp. Memory is
linear in the sequence: no [S, S] tensor exists. The indexer's scores and its KL loss live in the same chunks, for the
same reason.

Shapes: B batch, S sequence, Q queries of a chunk, H heads, D head width, N entries, I indexer heads, J their width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from v4train.model.documents import Blocks
from v4train.model.precision import full, full_precision


@dataclass
class IndexUse:
    """What is done with the lightning indexer's scores."""

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
        probabilities: [B, Q, N] of the main attention under its joint softmax (window and sink in the
            denominator), summed over heads. Normalised over entries they are the teacher; no gradient flows to it.

    Returns:
        Scalar. Queries with nothing attended count 0.
    """
    teacher = probabilities.detach()
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
    scored: tuple[Tensor, Tensor, Tensor] | None = None,
    index: IndexUse | None = None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Joint softmax over the last `window` tokens, the compressed entries and the sink.

    Args:
        query: [B, S, H, D] rotated; kv: [B, S, D] rotated, key and value in one, shared by all heads.
        sink: [H] logits that join the denominator and carry no value.
        starts: [B, S] first token of each token's document; nothing before it is seen.
        entries: [B, N, D] rotated compressed entries laid out by `blocks`.
        scored: what the indexer scores with, as `index_scores` takes it: query [B, S, I, J] and keys [B, N, J], both
            rotated, and head weights [B, S, I]; with `index`, which says whether the scores restrict the entries to
            the top-k, train the indexer, or both.
        chunk: queries computed at a time; changes memory and speed, not the result.

    Returns:
        (output [B, S, H, D], sum over queries of the indexer's KL, fp32 scalar).
    """
    scored = scored or (None, None, None)
    with full_precision(query.device.type):
        return _Attend.apply(query, kv, sink, entries, *scored, _Layout(starts, window, blocks, index, chunk))


@dataclass
class _Layout:
    """What is seen from where: everything about the attention that has no gradient."""

    starts: Tensor
    window: int
    blocks: Blocks | None
    index: IndexUse | None
    chunk: int

    def chunks(self) -> list[tuple[int, int]]:
        length = self.starts.shape[1]
        return [(begin, min(begin + self.chunk, length)) for begin in range(0, length, self.chunk)]

    def num_entries(self, stop: int) -> int:
        """Entries closed before token `stop`, at most: the rest is invisible to the chunk that ends there."""
        return 0 if self.blocks is None else stop // self.blocks.tokens.shape[-1]

    def oldest(self, begin: int) -> int:
        """First token that the window of query `begin` can reach."""
        return max(begin - self.window + 1, 0)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, kv, sink, entries, index_query, index_keys, head_weight, layout: _Layout):
        output = torch.empty_like(query)
        normaliser = full(query.new_empty(query.shape[:-1]))  # log-sum-exp, sink included
        kl = normaliser.new_zeros(())
        scored = (index_query, index_keys, head_weight)
        for begin, stop in layout.chunks():
            keys, logits, attended, scores = _chunk_logits(query, kv, entries, scored, layout, begin, stop)
            top = torch.maximum(logits.amax(-1), full(sink))
            weights = logits.sub_(top[..., None]).exp_()
            total = weights.sum(-1) + torch.exp(full(sink) - top)
            normaliser[:, begin:stop] = top + total.log()
            mixed = torch.bmm(weights.flatten(1, 2).to(keys.dtype), keys).view_as(query[:, begin:stop])
            output[:, begin:stop] = full(mixed) / total[..., None]
            if scores is not None and layout.index.with_loss:
                entry_weights = weights[..., stop - layout.oldest(begin) :]
                kl += indexer_kl(scores, attended, torch.einsum("bqhn,bqh->bqn", entry_weights, 1 / total))
        ctx.save_for_backward(query, kv, sink, entries, *scored, output, normaliser)
        ctx.layout = layout
        return output, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient, kl_gradient):
        query, kv, sink, entries, *scored, output, normaliser = ctx.saved_tensors
        layout, scale = ctx.layout, query.shape[-1] ** -0.5
        inputs = (query, kv, sink, entries, *scored)
        # fp32 sums: many chunks add to the same entry
        gradients = [None if tensor is None else full(torch.zeros_like(tensor)) for tensor in inputs]
        query_gradient, kv_gradient, sink_gradient, entry_gradient, *scored_gradients = gradients
        learning = layout.index is not None and layout.index.with_loss
        correction = (full(output) * full(output_gradient)).sum(-1)  # sum over keys of weight * its gradient
        sink_gradient -= (torch.exp(full(sink) - normaliser) * correction).sum((0, 1))
        for begin, stop in layout.chunks():
            keys, logits, attended, _ = _chunk_logits(query, kv, entries, scored, layout, begin, stop)
            weights = logits.sub_(normaliser[:, begin:stop, :, None]).exp_()
            near = stop - layout.oldest(begin)  # window keys; compressed entries follow
            if learning and attended is not None:
                probabilities = weights[..., near:].sum(2)
                _add_kl_gradients(scored, scored_gradients, attended, probabilities, kl_gradient, begin, stop)
            chunk_gradient = output_gradient[:, begin:stop].flatten(1, 2)
            chunk_query = (query[:, begin:stop] * scale).flatten(1, 2)
            flat = weights.flatten(1, 2)
            key_gradient = torch.bmm(flat.mT.to(keys.dtype), chunk_gradient)
            change = full(torch.bmm(chunk_gradient, keys.mT))
            change = change.sub_(correction[:, begin:stop].flatten(1, 2)[..., None]).mul_(flat).to(keys.dtype)
            query_gradient[:, begin:stop] = torch.bmm(change, keys).view_as(query[:, begin:stop]) * scale
            key_gradient = key_gradient.baddbmm_(change.mT, chunk_query)
            kv_gradient[:, layout.oldest(begin) : stop] += key_gradient[:, :near]
            if entry_gradient is not None:
                entry_gradient[:, : layout.num_entries(stop)] += key_gradient[:, near:]
        cast = (None if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, inputs, strict=True))
        return *cast, None


def _chunk_logits(
    query: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    scored: tuple[Tensor | None, ...],
    layout: _Layout,
    begin: int,
    stop: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """For queries begin..stop-1: keys [B, K, D], logits [B, Q, H, K] (-inf where unseen), and of the entries among the
    keys the attended ones [B, Q, n] and their index scores [B, Q, n], None where there are none."""
    keys = kv[:, layout.oldest(begin) : stop]
    seen = _window_mask(layout, begin, stop)
    attended = scores = None
    count = layout.num_entries(stop)
    if count:
        attended = layout.blocks.visible(begin, stop)[..., :count]
        if layout.index is not None:
            index_query, index_keys, head_weight = scored
            scores = index_scores(index_query[:, begin:stop], index_keys[:, :count], head_weight[:, begin:stop])
            if layout.index.select:
                attended = select_top_k(scores, attended, layout.index.top_k)
        keys, seen = torch.cat([keys, entries[:, :count]], dim=1), torch.cat([seen, attended], dim=2)
    scaled = (query[:, begin:stop] * query.shape[-1] ** -0.5).flatten(1, 2)
    logits = full(torch.bmm(scaled, keys.mT)).view(*query[:, begin:stop].shape[:-1], -1)
    unseen = torch.zeros_like(seen, dtype=logits.dtype).masked_fill_(~seen, -torch.inf)
    return keys, logits.add_(unseen[:, :, None]), attended, scores


def _add_kl_gradients(
    scored: list[Tensor],
    gradients: list[Tensor],
    attended: Tensor,
    probabilities: Tensor,
    kl_gradient: Tensor,
    begin: int,
    stop: int,
) -> None:
    """Gradient of one chunk's KL with respect to the indexer's query, keys and head weights, by autograd."""
    count = attended.shape[-1]
    parts = (slice(begin, stop), slice(0, count), slice(begin, stop))
    leaves = [tensor[:, part].detach().requires_grad_() for tensor, part in zip(scored, parts, strict=True)]
    with torch.enable_grad():
        kl = indexer_kl(index_scores(*leaves), attended, probabilities)
    for total, part, gradient in zip(gradients, parts, torch.autograd.grad(kl, leaves, kl_gradient), strict=True):
        total[:, part] += gradient


def _window_mask(layout: _Layout, begin: int, stop: int) -> Tensor:
    """Which of the tokens oldest..stop-1 the queries begin..stop-1 see: [B, Q, stop - oldest] bool."""
    device = layout.starts.device
    query = torch.arange(begin, stop, device=device)[:, None]
    key = torch.arange(layout.oldest(begin), stop, device=device)
    causal = (key <= query) & (key > query - layout.window)
    return causal & (key >= layout.starts[:, begin:stop, None])
