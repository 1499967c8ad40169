"""The one softmax of every attention kind: tokens of a window, entries and sink together (V4 report eq. 18, 2.3).

Works query chunk by query chunk; backward computes each chunk's weights again from the saved log-sum-exp. Memory is
linear in the sequence: no [S, S] tensor exists. The indexer's scores, its selection and its KL loss live in the same
chunks, for the same reason; the loss's gradient is made with it, in forward, and kept instead of the indexer's inputs.

Keys come from two places. `local` tokens are the sequence itself, seen through a window or as far as the document goes.
`entries` are a list beside it: compressed entries (csa, hca), all tokens, to be selected from (dsa), or global tokens.
Selected entries are gathered, K rows a query, or, while there are few to select from, multiplied all and masked.

Shapes: B batch, S queries, Q queries of a chunk, H heads, G key-value heads (H a multiple), D head width, E value
width, T tokens that keys exist for (S and what a cache holds before them), N entries, n those in reach of a chunk, K
selected ones, I indexer heads, J their width.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from v4train.model.attention.selection import (
    IndexUse,
    Scored,
    add_rows,
    index_scores,
    indexer_kl,
    normalised,
    score_gradients,
    select_by_index,
    select_top_k,
    selection_mask,
    take_rows,
)
from v4train.model.attention.softmax import join, plain_normaliser
from v4train.model.attention.terms import Entries, Gathered, Inputs, InReach, Layout, Local, Part, Tokens, Window
from v4train.model.config import GATHER_FROM, GATHERED, HELD, MEASURED_ENTRIES
from v4train.model.precision import full, full_dtype, full_precision
from v4train.model.seams import Heads

ALL = Heads()
MAIN = 6  # of `Inputs`, before the indexer's
INDEX = slice(MAIN, None)


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
    heads: Heads = ALL,
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
        heads: which share of all heads, and of the indexer's, these are. Scores and teacher are of all.
        chunk: queries computed at a time; changes memory and speed, not the result.

    A query that sees nothing and has no sink is NaN.
    """
    sources = [None if source is None else source.keys for source in (local, entries)]
    sources += [None if source is None else source.values for source in (local, entries)]
    width = next((x.shape[-1] for x in sources[2:] if x is not None), value_width or query.shape[-1])
    scale = scale or query.shape[-1] ** -0.5
    layout = Layout(local, None if entries is None else entries.seen, index, chunk, scale, width, heads)
    with full_precision(query.device.type):
        return Attended(*_Attend.apply(query, *sources, sink, *(scored or (None, None, None)), layout))


class _Chunk:
    """Queries begin..stop-1: what they attend to, and what the indexer has to do with it."""

    def __init__(self, inputs: Inputs, layout: Layout, begin: int, stop: int, chosen: Tensor | None):
        """chosen: [B, Q, K] entries, -1 for none, where the layout selects: filled here in forward, read in backward"""
        self.inputs, self.layout, self.begin, self.stop = inputs, layout, begin, stop
        self.reach = layout.entries(begin, stop)
        self.num_entries = self.reach.stop - self.reach.start
        self.selects = layout.selects and self.num_entries > layout.index.top_k
        self.chosen = chosen if self.selects else None
        self.gathers = self.selects and self.num_entries >= GATHER_FROM * layout.index.top_k

    @cached_property
    def visible(self) -> Tensor:
        """[B, Q, n] bool: the entries in reach that the queries see."""
        return self.layout.seen.visible(self.begin, self.stop, self.reach)

    def select(self) -> Tensor:
        """The best entries of each query, [B, Q, K] int64."""
        if self.layout.learns and not self.gathers:  # the loss wants these scores too
            best = select_top_k(self.scores_in_reach.scores, self.visible, self.layout.index.top_k)
            return torch.where(best < 0, -1, best + self.reach.start)

        def visible(entries: slice) -> Tensor:
            entries = slice(self.reach.start + entries.start, self.reach.start + entries.stop)
            return self.layout.seen.visible(self.begin, self.stop, entries)

        layout = self.layout
        best = select_by_index(*self._index_inputs(), visible, layout.index.top_k, layout.heads)
        return torch.where(best < 0, -1, best + self.reach.start)

    @cached_property
    def scores_in_reach(self) -> Scored:
        return index_scores(*self._index_inputs(), self.layout.heads)

    def _index_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's query, keys in reach and head weights."""
        here, inputs = slice(self.begin, self.stop), self.inputs
        return inputs.index_query[:, here], inputs.index_keys[:, self.reach], inputs.head_weight[:, here]

    def parts(self) -> list[Part]:
        """The terms of this chunk's softmax; where there are entries, the last one holds them."""
        inputs, layout, here = self.inputs, self.layout, (self.begin, self.stop)
        parts = []
        if layout.has_local:
            block = layout.block(inputs.query.shape[2] // inputs.keys.shape[1], self.stop - self.begin)
            parts = [Tokens(inputs, layout, *here) if block is None else Window(inputs, layout, *here, block)]
        if self.gathers:
            parts.append(Gathered(inputs, layout, *here, self.chosen))
        elif self.num_entries:
            parts.append(InReach(inputs, layout, *here, lambda: self.attended))
        return parts

    @cached_property
    def attended(self) -> Tensor:
        """[B, Q, n] bool: the entries in reach that are attended to."""
        if not self.selects:
            return self.visible
        inside = torch.where(self.chosen < 0, -1, self.chosen - self.reach.start)
        return selection_mask(inside, self.num_entries)

    def learning(self) -> tuple[Scored, Tensor]:
        """Scores and attended entries that the KL compares: the chosen [B*Q, 1, K], or those in reach [B, Q, n]."""
        if not self.gathers:
            return self.scores_in_reach, self.attended
        query, _, head_weight = self._index_inputs()
        query, head_weight = (x.flatten(0, 1)[:, None] for x in (query, head_weight))
        scored = index_scores(query, take_rows(self.inputs.index_keys, self.chosen), head_weight, self.layout.heads)
        return scored, (self.chosen >= 0).flatten(0, 1)[:, None]

    def probabilities(self, part: InReach | Gathered, normaliser: Tensor) -> Tensor:
        """Weights of the entries under the whole softmax [B, Q, H], summed over all heads."""
        return self.layout.heads.reduce(part.entry_probabilities(normaliser))

    def learn(
        self, part: InReach | Gathered, local: list[Tensor], normaliser: Tensor, gradients: list[Tensor] | None
    ) -> Tensor:
        """(kl, uniform kl, recalled, recallable) of this chunk: fp32 [4].

        Args:
            part: the entries'; local: normalisers of the other parts; normaliser: of the whole. [B, Q, H] each.
            gradients: of the KL, for the indexer's query, keys and head weights: this chunk's are put there.
        """
        scored, attended = self.learning()
        probabilities = self.probabilities(part, normaliser).view(attended.shape)
        kl, uniform, score_gradient = indexer_kl(scored.scores, attended, probabilities)
        if gradients is not None:
            self._add(gradients, score_gradients(scored, score_gradient))
        return torch.stack([kl, uniform, *self._recall(scored.scores, probabilities, local)])

    def _add(self, gradients: list[Tensor], changes: tuple[Tensor, Tensor, Tensor]) -> None:
        query, keys, head_weight = changes
        here = slice(self.begin, self.stop)
        gradients[0][:, here] = query.view_as(gradients[0][:, here])
        gradients[2][:, here] = head_weight.view_as(gradients[2][:, here])
        if self.gathers:
            add_rows(gradients[1], self.chosen, keys)
        else:
            gradients[1][:, self.reach] += keys

    def _recall(self, scores: Tensor, probabilities: Tensor, local: list[Tensor]) -> list[Tensor]:
        """(recalled, recallable); of the dense attention's probabilities [B, Q, n], given where that is attended to."""
        if self.num_entries <= (top_k := self.layout.index.top_k):
            return [probabilities.new_zeros(())] * 2
        if not self.layout.selects:
            visible = self.visible
            chosen, step = select_top_k(scores, visible, top_k).clamp(min=0), 1
        else:  # the dense attention of every `step`-th query, so that a query's cost doesn't grow with the sequence
            step = -(-self.inputs.entries.shape[2] // MEASURED_ENTRIES)
            some = slice(-self.begin % step, None, step)
            chosen, visible = self.chosen[:, some], self.visible[:, some]
            dense = InReach(self.inputs, self.layout, self.begin, self.stop, lambda: self.visible, some)
            own = dense.restore(plain_normaliser(dense.term))
            normalisers = [own, *(normaliser[:, some] for normaliser in local)]
            probabilities = self.probabilities(dense, join(normalisers, self.inputs.sink))
            chosen = torch.where(chosen < 0, 0, chosen - self.reach.start)
        counts = visible.sum(-1) > top_k
        held = normalised(probabilities).gather(-1, chosen).sum(-1)
        return [step * (held * counts).sum(), step * counts.sum()]


def _chunks(inputs: Inputs, layout: Layout) -> Iterator[tuple[int, int]]:
    (batch, length), chunk = inputs.query.shape[:2], layout.chunk
    if layout.selects and inputs.entries.shape[2] >= GATHER_FROM * layout.index.top_k:
        gathered = batch * layout.index.top_k * inputs.entries.shape[-1]  # for one query of each row
        chunk = max(1, min(chunk, GATHERED // gathered))
    for begin in range(0, length, chunk):
        yield begin, min(begin + chunk, length)


def _weighted(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of values [B, Q, H, E] x exp(logs [B, Q, H]), which takes the place of the first values."""
    total = None
    for values, logs in parts:
        weight = torch.exp(logs)[..., None]
        total = values.mul_(weight) if total is None else total.addcmul_(values, weight)
    return total


def _few(kept: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """The weights of a term, and what belongs to them, unless they are many."""
    return None if kept is None or kept[0].numel() > HELD else kept


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, layout = arguments
        inputs = Inputs(*tensors)
        query, sink = inputs.query, inputs.sink
        batch, length, heads, _ = query.shape
        output = tensors[0].new_empty(batch, length, heads, layout.width)
        normaliser = full(query.new_empty(batch, length, heads))  # log-sum-exp, sink included
        measures = normaliser.new_zeros(4)
        index_gradients, selected = None, None
        if layout.learns and any(ctx.needs_input_grad[INDEX]):
            # An fp32 sum: many chunks add to the same key
            index_gradients = [torch.zeros_like(x) for x in tensors[INDEX]]
            index_gradients[1] = full(index_gradients[1])
        if layout.selects:
            width = min(layout.index.top_k, inputs.entries.shape[2])
            selected = torch.full((batch, length, width), -1, dtype=torch.int32, device=query.device)
        for begin, stop in _chunks(inputs, layout):
            chunk = _Chunk(inputs, layout, begin, stop, None)
            if chunk.selects:
                chunk.chosen = chunk.select()
                selected[:, begin:stop] = chunk.chosen
            parts = chunk.parts()
            softmaxes = [[part.restore(x) for x in part.term.softmax()] for part in parts]
            normalisers = [own for _, own in softmaxes]
            joint = join(normalisers, sink)
            normaliser[:, begin:stop] = joint
            output[:, begin:stop] = _weighted((values, own - joint) for values, own in softmaxes)
            if layout.learns and chunk.num_entries:
                measures += chunk.learn(parts[-1], normalisers[:-1], joint, index_gradients)
        kept = []  # weights of each part; of one chunk they are few and don't grow with the sequence
        if length <= stop - begin and any(ctx.needs_input_grad[:MAIN]):
            kept = [_few(part.term.kept) for part in parts]
        if index_gradients is not None:
            index_gradients = [g.to(x.dtype) for g, x in zip(index_gradients, tensors[INDEX], strict=True)]
        others = *(index_gradients or ()), *(x for pair in kept for x in pair or ())
        ctx.save_for_backward(*tensors[:MAIN], output, normaliser, selected, *others)
        ctx.layout, ctx.learns, ctx.keeps = layout, index_gradients is not None, [pair is not None for pair in kept]
        results = (output, *measures)
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient, kl_gradient, *_):
        saved = ctx.saved_tensors
        (*tensors, output, normaliser, selected), others = saved[: MAIN + 3], iter(saved[MAIN + 3 :])
        index_gradients = [next(others) * kl_gradient if ctx.learns else None for _ in range(3)]
        kept = [(next(others), next(others)) if keeps else None for keeps in ctx.keeps]  # of the only chunk
        if not any(ctx.needs_input_grad[:MAIN]):  # the indexer alone is trained
            return *[None] * MAIN, *index_gradients, None
        inputs, layout = Inputs(*tensors, None, None, None), ctx.layout
        # fp32 sums: many chunks add to the same key, but each has queries of its own
        *of_keys, sink_gradient = (
            None if x is None else torch.zeros_like(x, dtype=full_dtype(x)) for x in inputs[1:MAIN]
        )
        query_gradient = torch.empty_like(inputs.query)
        for begin, stop in _chunks(inputs, layout):
            of_output, whole, log_sum = (x[:, begin:stop] for x in (output_gradient, output, normaliser))
            of_output = full(of_output)
            along = torch.linalg.vecdot(full(whole), of_output)  # of each query: sum of weight x its gradient
            if inputs.sink is not None:
                sink_gradient -= (torch.exp(full(inputs.sink) - log_sum) * along).sum((0, 1))
            chosen = None if selected is None else selected[:, begin:stop].long()
            parts, of_query = _Chunk(inputs, layout, begin, stop, chosen).parts(), None
            for part, part_kept in zip(parts, kept or [None] * len(parts), strict=True):
                part.term.kept = part_kept
                given = (part.arrange(x) for x in (of_output, log_sum, whole, along))
                own, keys, values = part.term.backward(*given)
                own = full(part.restore(own))
                of_query = own if of_query is None else of_query.add_(own)
                part.add(of_keys, keys, values)
            query_gradient[:, begin:stop] = of_query
        gradients = [query_gradient, *of_keys, sink_gradient]
        gradients = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True)]
        return *gradients, *index_gradients, None
