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
class Blocks:
    """Compression blocks of m tokens that restart at each document; a document's last partial block is dropped.

    Entries of a row are numbered in order of their blocks, documents one after another, N = S // m slots.
    """

    tokens: Tensor  # [B, N, m] index of each block's tokens (0 where the slot is unused)
    valid: Tensor  # [B, N] bool, slot in use
    has_previous: Tensor  # [B, N] bool, the block before it belongs to the same document
    positions: Tensor  # [B, N] position of the block's first token within its document
    first: Tensor  # [B, S] first entry of the token's document
    end: Tensor  # [B, S] one past the last entry visible to the token
    slot: Tensor  # [B, S] entry * m + offset that holds the token; N * m if its block is dropped

    def visible(self, begin: int, stop: int) -> Tensor:
        """Which entries queries begin..stop-1 may see: [B, stop - begin, N] bool.

        Entry s of a document is visible to its 0-based token t iff s < floor((t + 1) / m) (V4.md 0, trap 2).
        """
        entry = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (entry >= self.first[:, begin:stop, None]) & (entry < self.end[:, begin:stop, None])


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
    return Blocks(tokens, valid, positions > 0, positions, first, end, slot)


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
