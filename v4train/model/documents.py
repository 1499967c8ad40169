"""Where documents begin in a packed batch, and how their tokens fall into compression blocks (DESIGN 3).

Shapes: B batch, S sequence, N compressed entries a row, m compression ratio.
`document_ids` [B, S] int64 is constant within a document and changes at each start; -1 is padding, each padded
position a document of its own that sees only itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    previous: int  # tokens of each row that a cache has seen already


def place(document_ids: Tensor, previous: int | None = None) -> Place:
    """Place of the tokens [B, S] of a packed batch, or of one document a row that goes on after `previous` tokens."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    if previous is not None:
        return Place(torch.zeros_like(index), index + previous, previous)
    starts = document_starts(document_ids)
    return Place(starts, index - starts, 0)


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


def global_tokens(document_ids: Tensor, starts: Tensor, count: int, window: int, dilation: int) -> GlobalTokens:
    """The first `count` tokens of each document of a packed batch [B, S]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    chosen = (index - starts < count) & (document_ids >= 0)
    slots = int(chosen.sum(1).max())
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :slots]  # the chosen ones first, in order
    used = torch.arange(slots, device=order.device) < chosen.sum(1, keepdim=True)
    return GlobalTokens(order, torch.where(used, starts.gather(1, order), -1), index, starts, window, dilation)


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
