"""The one softmax of every attention kind: tokens of a window, entries and sink together (V4 report eq. 18, 2.3).

Works query chunk by query chunk; backward computes each chunk's softmax again from the saved log-sum-exp. Memory is
linear in the sequence: no [S, S] tensor exists. The indexer's scores and its KL loss live in the same chunks, for the
same reason.

Keys come from two places. `local` tokens are the sequence itself, seen through a window or as far as the document goes.
`entries` are a list beside it: compressed entries (csa, hca), all tokens, to be selected from (dsa), or global tokens.

Shapes: B batch, S queries, Q queries of a chunk, H heads, G key-value heads (H a multiple), R = H / G, D head width,
E value width, T tokens that keys exist for (S and what a cache holds before them), N entries, I indexer heads, J their
width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from v4train.model.documents import in_window
from v4train.model.precision import full, full_precision


@dataclass
class IndexUse:
    """What is done with the lightning indexer's scores."""

    top_k: int
    select: bool  # attend to the top-k only (sparse mode)
    with_loss: bool  # compute the KL to the main attention


@dataclass
class Local:
    """Tokens of the sequence that a query sees. Keys [B, G, T, D] and values [B, G, T, E]; the last S are the queries'.

    values None: keys are values too. starts: [B, S] first token of each query's document, as an index into the keys.
    window: how many tokens a query sees, every `dilation`-th one back from itself; None is the whole document.
    """

    keys: Tensor
    values: Tensor | None
    starts: Tensor
    window: int | None
    dilation: int = 1


class Seen(Protocol):
    def count(self, stop: int) -> int:
        """No query before `stop` sees an entry from this one on."""

    def visible(self, begin: int, stop: int) -> Tensor:
        """Which entries queries begin..stop-1 may see: [B, stop - begin, count(stop)] bool."""


@dataclass
class Entries:
    """Keys [B, G, N, D] and values [B, G, N, E] beside the sequence; values None: keys are values too."""

    keys: Tensor
    values: Tensor | None
    seen: Seen


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
    *,
    local: Local | None = None,
    entries: Entries | None = None,
    sink: Tensor | None = None,
    scored: tuple[Tensor, Tensor, Tensor] | None = None,
    index: IndexUse | None = None,
    scale: float | None = None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Joint softmax over local tokens, entries and the sink. One of `local` and `entries` at least.

    Args:
        query: [B, S, H, D] rotated; query head h reads key-value head h // R.
        sink: [H] logits that join the denominator and carry no value.
        scored: what the indexer scores the entries with, as `index_scores` takes it: query [B, S, I, J] and keys
            [B, N, J], both rotated, and head weights [B, S, I]; with `index`, which says whether the scores restrict
            the entries to the top-k, train the indexer, or both.
        scale: of the logits; None is 1 / sqrt(D).
        chunk: queries computed at a time; changes memory and speed, not the result.

    Returns:
        (output [B, S, H, E], sum over queries of the indexer's KL, fp32 scalar). A query that sees nothing and has no
        sink is NaN.
    """
    sources = [None if source is None else source.keys for source in (local, entries)]
    sources += [None if source is None else source.values for source in (local, entries)]
    layout = _Layout(local, None if entries is None else entries.seen, index, chunk, scale or query.shape[-1] ** -0.5)
    with full_precision(query.device.type):
        return _Attend.apply(query, *sources, sink, *(scored or (None, None, None)), layout)


class _Layout:
    """What is seen from where: everything about the attention that has no gradient."""

    def __init__(self, local: Local | None, seen: Seen | None, index: IndexUse | None, chunk: int, scale: float):
        self.has_local = local is not None
        if local is not None:  # not the tensors with gradients, which autograd must be able to free
            self.starts, self.window, self.dilation = local.starts, local.window, local.dilation
            self.before = local.keys.shape[2] - local.starts.shape[1]  # keys older than the first query
        self.seen, self.index, self.chunk, self.scale = seen, index, chunk, scale

    def chunks(self, length: int) -> list[tuple[int, int]]:
        return [(begin, min(begin + self.chunk, length)) for begin in range(0, length, self.chunk)]

    def local_keys(self, begin: int, stop: int) -> slice:
        """Local keys that queries begin..stop-1 can reach."""
        if not self.has_local:
            return slice(0, 0)
        first = 0 if self.window is None else self.before + begin - (self.window - 1) * self.dilation
        return slice(max(first, 0), self.before + stop)

    def local_mask(self, begin: int, stop: int) -> Tensor:
        """Which of them each query sees: [B, Q, T'] bool."""
        reach, device = self.local_keys(begin, stop), self.starts.device
        key = torch.arange(reach.start, reach.stop, device=device)
        distance = torch.arange(self.before + begin, self.before + stop, device=device)[:, None] - key
        near = distance >= 0 if self.window is None else in_window(distance, self.window, self.dilation)
        return near & (key >= self.starts[:, begin:stop, None])

    def num_entries(self, stop: int) -> int:
        return 0 if self.seen is None else self.seen.count(stop)


@dataclass
class _Chunk:
    """Queries begin..stop-1: local keys first, then entries, n in all."""

    local: slice
    count: int  # entries
    keys: Tensor  # [B*G, n, D]
    values: Tensor  # [B*G, n, E]
    query: Tensor  # [B*G, Q*R, D] scaled
    logits: Tensor  # [B, G, Q, R, n], -inf where unseen
    attended: Tensor | None  # [B, Q, count] entries attended to
    scores: Tensor | None  # [B, Q, count] of the indexer


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, entries, values, entry_values, sink, index_query, index_keys, head_weight, layout):
        inputs = (query, keys, entries, values, entry_values, sink, index_query, index_keys, head_weight)
        batch, length, heads, _ = query.shape
        last = next(x for x in (values, entry_values, keys, entries) if x is not None)
        output = query.new_empty(batch, length, heads, last.shape[-1])
        normaliser = full(query.new_empty(batch, length, heads))  # log-sum-exp, sink included
        kl = normaliser.new_zeros(())
        for begin, stop in layout.chunks(length):
            part = _chunk(inputs, layout, begin, stop)
            top = part.logits.amax(-1)
            if sink is not None:
                top = torch.maximum(top, _by_group(sink, top))
            weights = part.logits.sub_(top[..., None]).exp_()
            total = weights.sum(-1)
            if sink is not None:
                total = total + torch.exp(_by_group(sink, top) - top)
            normaliser[:, begin:stop] = _heads_last(top + total.log())
            mixed = torch.bmm(weights.flatten(2, 3).flatten(0, 1).to(part.values.dtype), part.values)
            output[:, begin:stop] = _heads_last(full(mixed).view(*total.shape, -1) / total[..., None])
            if part.scores is not None and layout.index.with_loss:
                entry_weights = weights[..., weights.shape[-1] - part.count :]
                probabilities = torch.einsum("bgqrn,bgqr->bqn", entry_weights, 1 / total)
                kl += indexer_kl(part.scores, part.attended, probabilities)
        ctx.save_for_backward(*inputs, output, normaliser)
        ctx.layout = layout
        return output, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient, kl_gradient):
        *inputs, output, normaliser = ctx.saved_tensors
        layout, (query, keys, entries, _, _, sink, *scored) = ctx.layout, inputs
        groups = (entries if keys is None else keys).shape[1]
        # fp32 sums: many chunks add to the same key
        gradients = [None if tensor is None else full(torch.zeros_like(tensor)) for tensor in inputs]
        query_gradient, *source_gradients, sink_gradient = gradients[:6]
        learning = layout.index is not None and layout.index.with_loss
        correction = (full(output) * full(output_gradient)).sum(-1)  # sum over keys of weight * its gradient
        if sink is not None:
            sink_gradient -= (torch.exp(full(sink) - normaliser) * correction).sum((0, 1))
        for begin, stop in layout.chunks(query.shape[1]):
            part = _chunk(inputs, layout, begin, stop)
            weights = part.logits.sub_(_groups_first(normaliser[:, begin:stop], groups)[..., None]).exp_()
            near = weights.shape[-1] - part.count  # local keys; entries follow
            if learning and part.attended is not None:
                probabilities = weights[..., near:].sum((1, 3))
                _add_kl_gradients(scored, gradients[6:], part.attended, probabilities, kl_gradient, begin, stop)
            change = _flat(_groups_first(output_gradient[:, begin:stop], groups))
            flat = weights.flatten(2, 3).flatten(0, 1)
            value_gradient = torch.bmm(flat.mT.to(part.values.dtype), change)
            change = full(torch.bmm(change, part.values.mT))
            correct = _groups_first(correction[:, begin:stop], groups).flatten(2, 3).flatten(0, 1)
            change = change.sub_(correct[..., None]).mul_(flat).to(part.keys.dtype)
            shape = weights.shape[:-1]
            query_gradient[:, begin:stop] = _heads_last(torch.bmm(change, part.keys).view(*shape, -1)) * layout.scale
            if part.values is part.keys:
                value_gradient = key_gradient = value_gradient.baddbmm_(change.mT, part.query)
            else:
                key_gradient = torch.bmm(change.mT, part.query)
            _add_source_gradients(source_gradients, part, key_gradient, value_gradient, near)
        cast = (None if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, inputs, strict=True))
        return *cast, None


def _chunk(inputs: tuple[Tensor | None, ...], layout: _Layout, begin: int, stop: int) -> _Chunk:
    query, keys, entries, values, entry_values, _, *scored = inputs
    local, count = layout.local_keys(begin, stop), layout.num_entries(stop)
    seen, attended, scores = [], None, None
    if layout.has_local:
        seen.append(layout.local_mask(begin, stop))
    if count:
        attended = layout.seen.visible(begin, stop)
        if layout.index is not None:
            index_query, index_keys, head_weight = scored
            scores = index_scores(index_query[:, begin:stop], index_keys[:, :count], head_weight[:, begin:stop])
            if layout.index.select:
                attended = select_top_k(scores, attended, layout.index.top_k)
        seen.append(attended)
    groups = (entries if keys is None else keys).shape[1]
    together = _together(keys, entries, local, count)
    shared = values is None and entry_values is None
    all_values = together if shared else _together(values, entry_values, local, count)
    part_query = _groups_first(query[:, begin:stop] * layout.scale, groups)
    scaled = _flat(part_query)
    logits = full(torch.bmm(scaled, together.mT)).view(*part_query.shape[:-1], -1)
    mask = seen[0] if len(seen) == 1 else torch.cat(seen, dim=2)
    unseen = torch.zeros_like(mask, dtype=logits.dtype).masked_fill_(~mask, -torch.inf)
    logits.add_(unseen[:, None, :, None])
    return _Chunk(local, count, together, all_values, scaled, logits, attended, scores)


def _together(local: Tensor | None, entries: Tensor | None, reach: slice, count: int) -> Tensor:
    """Local keys (or values) in reach and the first `count` entries: [B*G, n, D]."""
    parts = [] if local is None else [local[:, :, reach]]
    parts += [entries[:, :, :count]] if count else []
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).flatten(0, 1)


def _add_source_gradients(
    gradients: list[Tensor | None], part: _Chunk, key_gradient: Tensor, value_gradient: Tensor, near: int
) -> None:
    """Add one chunk's share to the gradients of (keys, entries, values, entry values), None where there is none."""
    for position, gradient in enumerate(gradients):
        if gradient is None:
            continue
        change = (key_gradient if position < 2 else value_gradient).unflatten(0, gradient.shape[:2])
        if position % 2 == 0:
            gradient[:, :, part.local] += change[:, :, :near]
        else:
            gradient[:, :, : part.count] += change[:, :, near:]


def _groups_first(x: Tensor, groups: int) -> Tensor:
    """[B, Q, H, ...] -> [B, G, Q, R, ...]"""
    return x.unflatten(2, (groups, -1)).transpose(1, 2)


def _heads_last(x: Tensor) -> Tensor:
    """[B, G, Q, R, ...] -> [B, Q, H, ...]"""
    return x.transpose(1, 2).flatten(2, 3)


def _flat(x: Tensor) -> Tensor:
    """[B, G, Q, R, D] -> [B*G, Q*R, D]"""
    return x.flatten(2, 3).flatten(0, 1)


def _by_group(sink: Tensor, like: Tensor) -> Tensor:
    """Sink logits [H] as [G, 1, R], to go with [B, G, Q, R]."""
    return full(sink).view(like.shape[1], 1, like.shape[3])


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
