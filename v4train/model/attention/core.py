"""The one softmax of every attention kind: tokens of a window, entries and sink together (V4 report eq. 18, 2.3).

Works query chunk by query chunk; backward computes each chunk's weights again from the saved log-sum-exp. Memory is
linear in the sequence: no [S, S] tensor exists. The indexer's scores, its selection and its KL loss live in the same
chunks, for the same reason.

Keys come from two places. `local` tokens are the sequence itself, seen through a window or as far as the document goes.
`entries` are a list beside it: compressed entries (csa, hca), all tokens, to be selected from (dsa), or global tokens.
Entries that all are seen stand with the local tokens in one product a chunk. Selected ones are gathered, K rows a query
(each query its own small product), or, while there are few to select from, multiplied all and masked.

Shapes: B batch, S queries, Q queries of a chunk, H heads, G key-value heads (H a multiple), D head width, E value
width, T tokens that keys exist for (S and what a cache holds before them), N entries, n those in reach of a chunk, K
selected ones, I indexer heads, J their width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from v4train.model.attention.selection import (
    add_rows,
    index_scores,
    indexer_kl,
    normalised,
    select_by_index,
    select_top_k,
    selection_mask,
    take_rows,
    uniform_kl,
)
from v4train.model.attention.softmax import Term, join
from v4train.model.documents import in_window
from v4train.model.precision import full, full_precision

GATHER_FROM = 2  # entries in reach, as a multiple of K, from which gathering is the faster way (docs/performance.md)
GATHERED = 2**21  # elements gathered at a time, at most: what a cache holds
MEASURED_ENTRIES = 128  # for each query, of the dense attention that `recall` compares the selection with


@dataclass
class IndexUse:
    """What is done with the lightning indexer's scores."""

    top_k: int
    select: bool  # attend to the top-k only (sparse mode)
    with_loss: bool  # compute the KL to the main attention


@dataclass
class Local:
    """Tokens of the sequence that a query sees. Keys [B, G, T, D] and values [B, G, T, E]; the last S are the queries'.

    values None: the first E channels of the keys. starts: [B, S] first token of each query's document, as an index into
    the keys.
    window: how many tokens a query sees, every `dilation`-th one back from itself; None is the whole document.
    """

    keys: Tensor
    values: Tensor | None
    starts: Tensor
    window: int | None
    dilation: int = 1


class Seen(Protocol):
    def reach(self, begin: int, stop: int) -> slice:
        """Entries that some query of begin..stop-1 may see: no other one does."""

    def visible(self, begin: int, stop: int, entries: slice) -> Tensor:
        """Which of these entries queries begin..stop-1 see: [B, stop - begin, n] bool."""


@dataclass
class Entries:
    """Keys [B, G, N, D] and values [B, G, N, E] beside the sequence; values None: the first E channels of the keys."""

    keys: Tensor
    values: Tensor | None
    seen: Seen


class Attended(NamedTuple):
    """Result of `attend`. The scalars, fp32, are sums over queries; only `output` and `kl` carry gradient."""

    output: Tensor  # [B, S, H, E]
    kl: Tensor  # of the indexer
    uniform_kl: Tensor  # what `kl` would be if all scores were equal
    recalled: Tensor  # share of the dense teacher's mass that the top-k hold, of queries that see more than K entries
    recallable: Tensor  # number of those queries


def attend(
    query: Tensor,
    *,
    local: Local | None = None,
    entries: Entries | None = None,
    sink: Tensor | None = None,
    scored: tuple[Tensor, Tensor, Tensor] | None = None,
    index: IndexUse | None = None,
    scale: float | None = None,
    value_width: int | None = None,
    chunk: int,
) -> Attended:
    """Joint softmax over local tokens, entries and the sink. One of `local` and `entries` at least.

    Args:
        query: [B, S, H, D] rotated; query head h reads key-value head h // (H / G).
        sink: [H] logits that join the denominator and carry no value.
        scored: what the indexer scores the entries with, as `index_scores` takes it: query [B, S, I, J] and keys
            [B, N, J], both rotated, and head weights [B, S, I]; with `index`, which says whether the scores restrict
            the entries to the top-k, train the indexer, or both. Selection wants G = 1.
        scale: of the logits; None is 1 / sqrt(D).
        value_width: E where keys are values; None is D.
        chunk: queries computed at a time; changes memory and speed, not the result.

    A query that sees nothing and has no sink is NaN.
    """
    sources = [None if source is None else source.keys for source in (local, entries)]
    sources += [None if source is None else source.values for source in (local, entries)]
    width = next((x.shape[-1] for x in sources[2:] if x is not None), value_width or query.shape[-1])
    scale = scale or query.shape[-1] ** -0.5
    layout = _Layout(local, None if entries is None else entries.seen, index, chunk, scale, width)
    with full_precision(query.device.type):
        return Attended(*_Attend.apply(query, *sources, sink, *(scored or (None, None, None)), layout))


class _Layout:
    """What is seen from where: everything about the attention that has no gradient."""

    def __init__(
        self, local: Local | None, seen: Seen | None, index: IndexUse | None, chunk: int, scale: float, width: int
    ):
        self.has_local = local is not None
        if local is not None:  # not the tensors with gradients, which autograd must be able to free
            self.starts, self.window, self.dilation = local.starts, local.window, local.dilation
            self.before = local.keys.shape[2] - local.starts.shape[1]  # keys older than the first query
        self.seen, self.index, self.chunk, self.scale, self.width = seen, index, chunk, scale, width

    @property
    def selects(self) -> bool:
        return self.index is not None and self.index.select

    @property
    def learns(self) -> bool:
        return self.index is not None and self.index.with_loss

    def chunks(self, inputs: "_Inputs") -> Iterator[tuple[int, int]]:
        (batch, length), chunk = inputs.query.shape[:2], self.chunk
        if self.selects:
            gathered = batch * self.index.top_k * inputs.entries.shape[-1]  # for one query of each row
            chunk = max(1, min(chunk, GATHERED // gathered))
        for begin in range(0, length, chunk):
            yield begin, min(begin + chunk, length)

    def local_keys(self, begin: int, stop: int) -> slice:
        """Local keys that queries begin..stop-1 can reach."""
        if not self.has_local:
            return slice(0, 0)
        if self.window is not None:
            first = self.before + begin - (self.window - 1) * self.dilation
        else:  # on a GPU reading a number back would hold up its queue
            first = int(self.starts[:, begin:stop].min()) if self.starts.device.type == "cpu" else 0
        return slice(max(first, 0), self.before + stop)

    def local_mask(self, begin: int, stop: int) -> Tensor:
        """Which of them each query sees: [B, Q, T'] bool."""
        reach, device = self.local_keys(begin, stop), self.starts.device
        key = torch.arange(reach.start, reach.stop, device=device)
        distance = torch.arange(self.before + begin, self.before + stop, device=device)[:, None] - key
        near = distance >= 0 if self.window is None else in_window(distance, self.window, self.dilation)
        return near & (key >= self.starts[:, begin:stop, None])

    def entries(self, begin: int, stop: int) -> slice:
        return slice(0, 0) if self.seen is None else self.seen.reach(begin, stop)


class _Inputs(NamedTuple):
    """The tensors of `attend`: sources are local keys [B, G, T, D], entries [B, G, N, D], and the values of both."""

    query: Tensor
    keys: Tensor | None
    entries: Tensor | None
    values: Tensor | None
    entry_values: Tensor | None
    sink: Tensor | None
    index_query: Tensor | None
    index_keys: Tensor | None
    head_weight: Tensor | None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """0 where the mask holds, -inf elsewhere, in the precision of logits."""
    zeros = torch.zeros(mask.shape, dtype=full(like[:0]).dtype, device=mask.device)
    return zeros.masked_fill_(~mask, -torch.inf)


class _Near:
    """Local tokens and entries in reach of queries begin..stop-1, the latter where `attended` [B, Q, n] says so."""

    def __init__(
        self,
        inputs: _Inputs,
        layout: _Layout,
        begin: int,
        stop: int,
        attended: Tensor | None,
        some: slice = slice(None),  # noqa: B008
    ):
        """some: of the chunk's queries, from its beginning."""
        self.local = layout.local_keys(begin, stop)
        self.entries = slice(0, 0) if attended is None else layout.entries(begin, stop)
        masks = [layout.local_mask(begin, stop)] if layout.has_local else []
        masks += [] if attended is None else [attended]
        mask = masks[0] if len(masks) == 1 else torch.cat(masks, dim=2)
        query = inputs.query[:, begin:stop][:, some].transpose(1, 2)
        keys = self._together(inputs.keys, inputs.entries)
        shared = inputs.values is None and inputs.entry_values is None
        values = None if shared else self._together(inputs.values, inputs.entry_values)
        self.term = Term(query, keys, values, layout.width, _additive(mask[:, some], query)[:, None], layout.scale)
        self.num_local = self.local.stop - self.local.start

    def arrange(self, x: Tensor) -> Tensor:
        """[B, Q, H, ...] as the term has it, [B, H, Q, ...]."""
        return x.transpose(1, 2)

    restore = arrange

    def entry_probabilities(self, normaliser: Tensor) -> Tensor:
        """Weights of the entries [B, Q, n], summed over heads, in a softmax with normaliser [B, Q, H]."""
        logits = self.term.logits()[..., self.num_local :]
        return (logits - self.arrange(normaliser)[..., None]).exp_().sum(1)

    def add(self, gradients: list[Tensor | None], keys: Tensor, values: Tensor | None) -> None:
        """Add gradients of the term's keys and values to those of the sources."""
        for position, total in enumerate(gradients):
            change = keys if position < 2 else values
            if total is not None and position % 2 == 0:
                total[:, :, self.local] += change[:, :, : self.num_local]
            elif total is not None:
                total[:, :, self.entries] += change[:, :, self.num_local :]

    def _together(self, local: Tensor | None, entries: Tensor | None) -> Tensor:
        parts = [] if local is None else [local[:, :, self.local]]
        parts += [entries[:, :, self.entries]] if self.entries.stop > self.entries.start else []
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _Gathered:
    """Entries `chosen` [B, Q, K] for each of queries begin..stop-1: every query a batch of its own, heads its rows."""

    def __init__(self, inputs: _Inputs, layout: _Layout, begin: int, stop: int, chosen: Tensor):
        self.chosen, self.shape = chosen, (*chosen.shape[:2], inputs.query.shape[2])
        rows = take_rows(inputs.entries[:, 0], chosen)
        values = None if inputs.entry_values is None else take_rows(inputs.entry_values[:, 0], chosen)[:, None]
        mask = _additive(chosen >= 0, rows)
        query = self.arrange(inputs.query[:, begin:stop])
        self.term = Term(query, rows[:, None], values, layout.width, mask.flatten(0, 1)[:, None, None], layout.scale)

    def arrange(self, x: Tensor) -> Tensor:
        """[B, Q, H, ...] as the term has it, [B*Q, 1, H, ...]."""
        return x.flatten(0, 1)[:, None]

    def restore(self, x: Tensor) -> Tensor:
        return x[:, 0].unflatten(0, self.shape[:2])

    def entry_probabilities(self, normaliser: Tensor) -> Tensor:
        """Weights of the chosen entries [B, Q, K], summed over heads, in a softmax with normaliser [B, Q, H]."""
        return self.restore((self.term.logits() - self.arrange(normaliser)[..., None]).exp_()).sum(2)

    def add(self, gradients: list[Tensor | None], keys: Tensor, values: Tensor | None) -> None:
        add_rows(gradients[1][:, 0], self.chosen, keys)
        if values is not None:
            add_rows(gradients[3][:, 0], self.chosen, values)


class _Chunk:
    """Queries begin..stop-1: what they attend to, and what the indexer has to do with it."""

    def __init__(self, inputs: _Inputs, layout: _Layout, begin: int, stop: int, chosen: Tensor | None):
        """chosen: [B, Q, K] entries, -1 for none, where the layout selects: filled here in forward, read in backward"""
        self.inputs, self.layout, self.begin, self.stop = inputs, layout, begin, stop
        self.reach = layout.entries(begin, stop)
        self.num_entries = self.reach.stop - self.reach.start
        self.selects = layout.selects and self.num_entries > layout.index.top_k
        self.chosen = chosen if self.selects else None
        self.gathers = self.selects and self.num_entries >= GATHER_FROM * layout.index.top_k

    def visible(self) -> Tensor:
        return self.layout.seen.visible(self.begin, self.stop, self.reach)

    def select(self) -> Tensor:
        """The best entries of each query, [B, Q, K] int64."""
        index_query, index_keys, head_weight = self._scored(self.reach)

        def visible(entries: slice) -> Tensor:
            entries = slice(self.reach.start + entries.start, self.reach.start + entries.stop)
            return self.layout.seen.visible(self.begin, self.stop, entries)

        best = select_by_index(index_query, index_keys, head_weight, visible, self.layout.index.top_k)
        return torch.where(best < 0, -1, best + self.reach.start)

    def parts(self) -> list[_Near | _Gathered]:
        """The terms of this chunk's softmax; the last one holds the entries."""
        arguments = (self.inputs, self.layout, self.begin, self.stop)
        if self.gathers:
            near = [_Near(*arguments, None)] if self.layout.has_local else []
            return [*near, _Gathered(*arguments, self.chosen)]
        return [_Near(*arguments, self.attended() if self.num_entries else None)]

    def attended(self) -> Tensor:
        """[B, Q, n] bool: the entries in reach that are attended to."""
        if not self.selects:
            return self.visible()
        inside = torch.where(self.chosen < 0, -1, self.chosen - self.reach.start)
        return selection_mask(inside, self.num_entries)

    def learning(self, with_gradient: bool) -> tuple[list[Tensor], Tensor, Tensor]:
        """(leaves, scores, attended) of the KL: over chosen entries [B*Q, 1, K], or those in reach [B, Q, n].

        leaves: the indexer's query, keys and head weight.
        """
        index_query, index_keys, head_weight = self._scored(self.reach)
        if self.gathers:
            leaves = [
                index_query.flatten(0, 1)[:, None],
                take_rows(self.inputs.index_keys, self.chosen),
                head_weight.flatten(0, 1)[:, None],
            ]
            attended = (self.chosen >= 0).flatten(0, 1)[:, None]
        else:
            leaves, attended = [index_query, index_keys, head_weight], self.attended()
        leaves = [leaf.detach().requires_grad_(with_gradient) for leaf in leaves]
        with torch.set_grad_enabled(with_gradient):
            return leaves, index_scores(*leaves), attended

    def measures(self, part: _Near | _Gathered, normaliser: Tensor) -> Tensor:
        """(kl, uniform kl, recalled, recallable) of this chunk, whose softmax has normaliser [B, Q, H]: fp32 [4]."""
        _, scores, attended = self.learning(with_gradient=False)
        probabilities = part.entry_probabilities(normaliser).view(scores.shape)
        kls = [indexer_kl(scores, attended, probabilities), uniform_kl(attended, probabilities)]
        recall = self._recall(scores, probabilities)
        return torch.stack([*kls, *recall])

    def _recall(self, scores: Tensor, probabilities: Tensor) -> list[Tensor]:
        """(recalled, recallable); of the dense attention's probabilities [B, Q, n], given where that is attended to."""
        if self.num_entries <= (top_k := self.layout.index.top_k):
            return [probabilities.new_zeros(())] * 2
        if not self.layout.selects:
            visible = self.visible()
            chosen, step = select_top_k(scores, visible, top_k).clamp(min=0), 1
        else:  # the dense attention of every `step`-th query, so that a query's cost doesn't grow with the sequence
            step = -(-self.inputs.entries.shape[2] // MEASURED_ENTRIES)
            some = slice(-self.begin % step, None, step)
            chosen, visible = self.chosen[:, some], self.visible()
            dense = _Near(self.inputs, self.layout, self.begin, self.stop, visible, some)
            normaliser = join([dense.restore(dense.term.logits().logsumexp(-1))], self.inputs.sink)
            probabilities, visible = dense.entry_probabilities(normaliser), visible[:, some]
            chosen = torch.where(chosen < 0, 0, chosen - self.reach.start)
        counts = visible.sum(-1) > top_k
        held = normalised(probabilities).gather(-1, chosen).sum(-1)
        return [step * (held * counts).sum(), step * counts.sum()]

    def add_kl_gradients(self, gradients: list[Tensor], probabilities: Tensor, kl_gradient: Tensor) -> None:
        """Gradient of the KL with respect to the indexer's query, keys and head weights, by autograd."""
        leaves, scores, attended = self.learning(with_gradient=True)
        with torch.enable_grad():
            kl = indexer_kl(scores, attended, probabilities.view(scores.shape))
        query, keys, head_weight = torch.autograd.grad(kl, leaves, kl_gradient)
        here = slice(self.begin, self.stop)
        gradients[0][:, here] += query.view_as(gradients[0][:, here])
        gradients[2][:, here] += head_weight.view_as(gradients[2][:, here])
        if self.gathers:
            add_rows(gradients[1], self.chosen, keys)
        else:
            gradients[1][:, self.reach] += keys

    def _scored(self, entries: slice) -> tuple[Tensor, Tensor, Tensor]:
        here = slice(self.begin, self.stop)
        return self.inputs.index_query[:, here], self.inputs.index_keys[:, entries], self.inputs.head_weight[:, here]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, layout = arguments
        inputs = _Inputs(*tensors)
        query, sink = inputs.query, inputs.sink
        batch, length, heads, _ = query.shape
        output = query.new_empty(batch, length, heads, layout.width)
        normaliser = full(query.new_empty(batch, length, heads))  # log-sum-exp, sink included
        measures = normaliser.new_zeros(4)
        selected = None
        if layout.selects:
            width = min(layout.index.top_k, inputs.entries.shape[2])
            selected = torch.full((batch, length, width), -1, dtype=torch.int32, device=query.device)
        for begin, stop in layout.chunks(inputs):
            chunk = _Chunk(inputs, layout, begin, stop, None)
            if chunk.selects:
                chunk.chosen = chunk.select()
                selected[:, begin:stop] = chunk.chosen
            parts = chunk.parts()
            softmaxes = [[part.restore(x) for x in part.term.softmax()] for part in parts]
            joint = join([own for _, own in softmaxes], sink)
            normaliser[:, begin:stop] = joint
            output[:, begin:stop] = sum(values * torch.exp(own - joint)[..., None] for values, own in softmaxes)
            if layout.learns and chunk.num_entries:
                measures += chunk.measures(parts[-1], joint)
        ctx.save_for_backward(*inputs, output, normaliser, selected)
        ctx.layout = layout
        results = (output, *measures)
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient, kl_gradient, *_):
        *tensors, output, normaliser, selected = ctx.saved_tensors
        inputs, layout = _Inputs(*tensors), ctx.layout
        # fp32 sums: many chunks add to the same key
        gradients = [None if tensor is None else full(torch.zeros_like(tensor)) for tensor in inputs]
        query_gradient, sources = gradients[0], gradients[1:5]
        if inputs.sink is not None:
            for begin, stop in layout.chunks(inputs):
                correction = (full(output[:, begin:stop]) * full(output_gradient[:, begin:stop])).sum(-1)
                weight = torch.exp(full(inputs.sink) - normaliser[:, begin:stop])
                gradients[5] -= (weight * correction).sum((0, 1))
        for begin, stop in layout.chunks(inputs):
            chosen = None if selected is None else selected[:, begin:stop].long()
            chunk = _Chunk(inputs, layout, begin, stop, chosen)
            parts = chunk.parts()
            for part in parts:
                given = (part.arrange(x[:, begin:stop]) for x in (output_gradient, output, normaliser))
                own_query, keys, values = part.term.backward(*given)
                query_gradient[:, begin:stop] += part.restore(own_query)
                part.add(sources, keys, values)
            if layout.learns and chunk.num_entries:
                probabilities = parts[-1].entry_probabilities(normaliser[:, begin:stop])
                chunk.add_kl_gradients(gradients[6:], probabilities, kl_gradient)
        return *(None if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)), None
