"""Where documents begin in a packed batch, and how their tokens fall into compression blocks (DESIGN 3).

Shapes: B batch, S sequence, N compressed entries a row, m compression ratio.
`document_ids` [B, S] int64 is constant within a document and changes at each start; -1 is padding, each padded
position a document of its own that sees only itself.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4train.model.seams import Sequence

WHOLE = Sequence()


def document_starts(document_ids: Tensor) -> Tensor:
    """Index of the first token of each token's document: [B, S] -> [B, S] int64."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    previous = torch.nn.functional.pad(document_ids[:, :-1], (1, 0), value=-1)
    begins = (document_ids != previous) | (document_ids < 0)
    begins[:, 0] = True
    return torch.where(begins, index, 0).cummax(dim=1).values


@dataclass
class Place:
    """Where the tokens of a forward pass stand."""

    starts: Tensor  # [B, S] first token of each token's document, as an index into the row (0 behind a cache)
    positions: Tensor  # [B, S] position within the document
    previous: int  # tokens of each row that come before these: a cache has seen them, or other ranks have them
    documents: Tensor  # [B, T] documents of the whole row, of which these are a shard; of these alone behind a cache

    def starts_among(self, tokens: int) -> Tensor:
        """`starts` as indices into the last `tokens` tokens up to the end of these, negative where before them."""
        return self.starts + (tokens - self.starts.shape[1] - self.previous)


def place(document_ids: Tensor, previous: int | None = None, sequence: Sequence = WHOLE) -> Place:
    """Place of the tokens [B, S] of a packed batch, or of one document a row that goes on after `previous` tokens.

    sequence: which tokens of each row of the batch these are.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    if previous is not None:
        return Place(torch.zeros_like(index), index + previous, previous, document_ids)
    documents = sequence.whole(document_ids)
    begin = sequence.begin(document_ids.shape[1])
    starts = document_starts(documents)[:, begin : begin + document_ids.shape[1]]
    return Place(starts, index + begin - starts, begin, documents)


@dataclass(kw_only=True)
class EntryRange:
    """Which entries of a list each query sees: those from `first` up to, not including, `end`.

    The list grows by one entry every `ratio` tokens at most, `offset` tokens having come before the queries.
    """

    first: Tensor  # [B, S] int64
    end: Tensor  # [B, S] int64
    ratio: int
    offset: int = 0

    def reach(self, begin: int, stop: int) -> slice:
        """Entries that some query of begin..stop-1 may see: no other one does."""
        count = (self.offset + stop) // self.ratio
        # Reading a number back from a GPU would hold up its queue: there the masks alone say where documents begin.
        first = int(self.first[:, begin:stop].min()) if self.first.device.type == "cpu" else 0
        return slice(min(first, count), count)

    def visible(self, begin: int, stop: int, entries: slice) -> Tensor:
        """Which of these entries queries begin..stop-1 see: [B, stop - begin, n] bool."""
        entry = torch.arange(entries.start, entries.stop, device=self.first.device)
        return (entry >= self.first[:, begin:stop, None]) & (entry < self.end[:, begin:stop, None])


@dataclass(kw_only=True)
class Blocks(EntryRange):
    """Compression blocks of m tokens that restart at each document; a document's last partial block is dropped.

    Entries of a row are numbered in order of their blocks, documents one after another, N = S // m slots. Entry s of a
    document is visible to its 0-based token t iff s < floor((t + 1) / m) (V4.md 0, trap 2).
    """

    tokens: Tensor  # [B, N, m] index of each block's tokens (0 where the slot is unused)
    valid: Tensor  # [B, N] bool, slot in use
    has_previous: Tensor  # [B, N] bool, the block before it belongs to the same document
    positions: Tensor  # [B, N] position of the block's first token within its document
    slot: Tensor  # [B, S] entry * m + offset that holds the token; N * m if its block is dropped


def compression_blocks(document_ids: Tensor, ratio: int) -> Blocks:
    """Lay out blocks of `ratio` tokens for a packed batch [B, S]."""
    batch, length = document_ids.shape
    slots, device = length // ratio, document_ids.device
    index = torch.arange(length, device=device).expand(batch, length)
    starts = document_starts(document_ids)
    local = index - starts
    closes = ((local + 1) % ratio == 0) & (document_ids >= 0)
    end = closes.long().cumsum(1)
    before = end - closes.long()  # entries closed before the token
    first = before.gather(1, starts)

    # Scatter the closing token of each block into its slot; the spare last column takes everything else.
    last = torch.zeros(batch, slots + 1, dtype=torch.long, device=device)
    last.scatter_(1, torch.where(closes, before, slots), index)
    last = last[:, :slots]
    valid = torch.arange(slots, device=device) < end[:, -1:]
    positions = torch.where(valid, local.gather(1, last) - (ratio - 1), 0)
    tokens = last[..., None] - torch.arange(ratio - 1, -1, -1, device=device)
    tokens = torch.where(valid[..., None], tokens, 0)

    entry = first + local // ratio
    complete = (local // ratio < (_document_lengths(starts) // ratio)) & (document_ids >= 0)
    slot = torch.where(complete, entry * ratio + local % ratio, slots * ratio)
    return Blocks(
        first=first,
        end=end,
        ratio=ratio,
        tokens=tokens,
        valid=valid,
        has_previous=positions > 0,
        positions=positions,
        slot=slot,
    )


@dataclass
class Shard:
    """The part of `Blocks` that one shard of the row computes, and where all of them stand once they are gathered.

    A shard computes the entries whose last token it has, from its own tokens and some in front of them.
    """

    own: Blocks  # of the tokens at hand with those in front; `first` and `end` mean nothing
    leading: int  # first entries of `own` that serve the next ones only
    order: Tensor | None  # [B, N] where each entry stands among those of all shards, one after another; None: as is


def lay_out(place: Place, ratio: int, overlap: bool, sequence: Sequence = WHOLE) -> tuple[Shard, EntryRange]:
    """What the compressor of a packed batch computes of the tokens at hand, and what entries of the row these see."""
    blocks, begin = compression_blocks(place.documents, ratio), place.previous
    if sequence.count == 1:
        return Shard(blocks, 0, None), blocks
    length = place.starts.shape[1]
    shard = shard_blocks(blocks, begin, length, min(begin, tokens_before(ratio, overlap)), overlap)
    here = slice(begin, begin + length)
    return shard, EntryRange(first=blocks.first[:, here], end=blocks.end[:, here], ratio=ratio, offset=begin)


def tokens_before(ratio: int, overlap: bool) -> int:
    """How many tokens in front of a shard its entries may need."""
    return 2 * ratio - 1 if overlap else ratio - 1


def shard_blocks(blocks: Blocks, begin: int, length: int, before: int, overlap: bool) -> Shard:
    """The shard of `length` tokens from `begin` on, with `before` tokens in front. All shards are of this length."""
    ratio, device = blocks.ratio, blocks.tokens.device
    batch, entries = blocks.valid.shape
    if not entries:  # a row shorter than a block: one unused slot, so that there is something to index
        unused = torch.zeros(batch, 1, dtype=torch.long, device=device)
        blocks = replace(
            blocks,
            tokens=unused[..., None].expand(-1, -1, ratio),
            valid=unused.bool(),
            has_previous=unused.bool(),
            positions=unused,
        )
    last = torch.where(blocks.valid, blocks.tokens[..., -1], torch.iinfo(torch.long).max)
    shards = -(-blocks.slot.shape[1] // length)
    edges = torch.arange(shards, device=device) * length
    closed = (last[..., None] < edges).sum(1)  # [B, shards] entries closed before each shard begins
    slots = -(-length // ratio)  # at most so many are closed in one
    leading = int(overlap)

    index = closed[:, begin // length, None] - leading + torch.arange(slots + leading, device=device)
    inside = (index >= 0) & (index < blocks.valid.shape[1])
    index = index.clamp(0, blocks.valid.shape[1] - 1)
    tokens = blocks.tokens.gather(1, index[..., None].expand(-1, -1, ratio)) - (begin - before)
    valid = inside & blocks.valid.gather(1, index) & (tokens[..., 0] >= 0) & (tokens[..., -1] < before + length)
    tokens = torch.where(valid[..., None], tokens, 0)
    has_previous = blocks.has_previous.gather(1, index) & torch.nn.functional.pad(valid[:, :-1], (1, 0))
    unused = valid.shape[1] * ratio
    slot = torch.full((batch, before + length + 1), unused, device=device)
    places = torch.arange(unused, device=device).view(1, -1, ratio).expand_as(tokens)
    slot.scatter_(1, torch.where(valid[..., None], tokens, before + length).flatten(1), places.flatten(1))
    own = Blocks(
        first=blocks.first,
        end=blocks.end,
        ratio=ratio,
        tokens=tokens,
        valid=valid,
        has_previous=has_previous,
        positions=torch.where(valid, blocks.positions.gather(1, index), 0),
        slot=slot[:, :-1],
    )
    owner = torch.where(blocks.valid, last, 0) // length
    number = torch.arange(blocks.valid.shape[1], device=device) - closed.gather(1, owner)
    order = torch.where(blocks.valid, owner * slots + number, 0)[:, :entries]
    return Shard(own, leading, order)


@dataclass
class GlobalTokens:
    """The first tokens of each document, seen by all later ones of it: an extra list of entries.

    A query that has one of them in its window already does not see it twice.
    """

    tokens: Tensor  # [B, N] index of each global token in the row
    starts: Tensor  # [B, N] first token of its document; -1 where the slot is unused
    queries: Tensor  # [B, S] index of each query, counted as `tokens` are
    query_starts: Tensor  # [B, S] first token of its document
    window: int
    dilation: int

    def reach(self, begin: int, stop: int) -> slice:
        """Entries that queries begin..stop-1 may see, at most."""
        return slice(0, self.tokens.shape[1])

    def visible(self, begin: int, stop: int, entries: slice) -> Tensor:
        """Which of these entries queries begin..stop-1 see beside their window: [B, stop - begin, n] bool."""
        same = self.query_starts[:, begin:stop, None] == self.starts[:, None, entries]
        distance = self.queries[:, begin:stop, None] - self.tokens[:, None, entries]
        return same & (distance >= 0) & ~in_window(distance, self.window, self.dilation)


def global_tokens(place: Place, count: int, window: int, dilation: int) -> GlobalTokens:
    """The first `count` tokens of each document of a packed batch, up to the last of the tokens [B, S] at hand."""
    own = place.starts.shape[1]
    document_ids = place.documents[:, : place.previous + own]
    starts = document_starts(document_ids)
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    chosen = (index - starts < count) & (document_ids >= 0)
    slots = int(chosen.sum(1).max())
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :slots]  # the chosen ones first, in order
    used = torch.arange(slots, device=order.device) < chosen.sum(1, keepdim=True)
    token_starts = torch.where(used, starts.gather(1, order), -1)
    return GlobalTokens(order, token_starts, index[:, -own:], place.starts, window, dilation)


def in_window(distance: Tensor, window: int, dilation: int) -> Tensor:
    """Whether a token `distance` back is one of the `window` that are seen, every `dilation`-th one counting."""
    inside = (distance >= 0) & (distance < window * dilation)
    return inside & (distance % dilation == 0) if dilation > 1 else inside


def _document_lengths(starts: Tensor) -> Tensor:
    """Length of each token's document, [B, S] -> [B, S]."""
    counts = torch.zeros_like(starts).scatter_add_(1, starts, torch.ones_like(starts))
    return counts.gather(1, starts)


class _GatherBlocks(torch.autograd.Function):
    """Rows of x at `tokens`; each token sits in one slot at most, so backward is a gather too (no scatter-add)."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
        return x[batch, tokens]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (slot,) = ctx.saved_tensors
        rows = torch.nn.functional.pad(gradient.flatten(1, 2), (0, 0, 0, 1))
        batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
        return rows[batch, slot], None, None


def gather_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """Tokens of each block: [B, S, D] -> [B, N, m, D]. Unused slots hold copies of token 0, without gradient."""
    return _GatherBlocks.apply(x, blocks.tokens, blocks.slot)
