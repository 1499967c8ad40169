"""KV compressors of CSA (overlapped, V4 report eqs. 9-12) and HCA (not overlapped, eqs. 20-23).

Shapes: B batch, S sequence, M hidden, N entries, m compression ratio, c entry width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.attention.cache import BlockTail
from v4train.model.documents import Blocks, Shard, compression_blocks, gather_blocks, tokens_before
from v4train.model.linear import StackedLinear
from v4train.model.norm import RMSNorm
from v4train.model.precision import full
from v4train.model.seams import Seams


def compress(kv: Tensor, gate: Tensor, position_bias: Tensor, blocks: Blocks, overlap: bool) -> Tensor:
    """Gated mean over each block, one softmax per channel (V4 report eqs. 11-12; 22-23).

    Args:
        kv, gate: [B, S, 2c] with overlap (channels [:c] serve the NEXT block's entry, [c:] the block's own), else
            [B, S, c].
        position_bias: [m, 2c] or [m, c], added to the gate of the j-th token of a block.
        blocks: layout from `compression_blocks`.

    Returns:
        Entries [B, N, c] in kv's dtype, before norm and rotation. The softmax is fp32.
    """
    kv = gather_blocks(kv, blocks)
    gate = full(gather_blocks(gate, blocks)) + full(position_bias)
    if overlap:
        kv_next, kv = kv.chunk(2, dim=-1)
        gate_next, gate = gate.chunk(2, dim=-1)
        gate_previous = _shift(gate_next).masked_fill(~blocks.has_previous[..., None, None], -torch.inf)
        kv = torch.cat([_shift(kv_next), kv], dim=2)
        gate = torch.cat([gate_previous, gate], dim=2)
    return (kv * gate.softmax(dim=2).to(kv.dtype)).sum(dim=2).to(kv.dtype)  # CUDA autocast sums in fp32


def _shift(x: Tensor) -> Tensor:
    """Entry n takes what entry n - 1 held; entry 0 takes zeros."""
    return nn.functional.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)) if x.shape[1] else x


class Compressor(nn.Module):
    """Turns every m tokens of hidden states [B, S, M] into one normalised entry: [B, N, c], not yet rotated."""

    seams = Seams()

    def __init__(self, hidden_size: int, entry_dim: int, ratio: int, overlap: bool, eps: float) -> None:
        super().__init__()
        parts = 2 if overlap else 1
        self.overlap, self.ratio, self.entry_dim = overlap, ratio, entry_dim
        self.kv = StackedLinear(parts, hidden_size, entry_dim)
        self.gate = StackedLinear(parts, hidden_size, entry_dim)
        self.position_bias = nn.Parameter(torch.empty(ratio, parts * entry_dim))
        self.norm = RMSNorm(entry_dim, eps)

    def forward(self, x: Tensor, shard: Shard | None = None, tail: BlockTail | None = None) -> Tensor:
        """Entries of a packed batch laid out by `shard`; or, with `tail`, those that the next tokens of a document
        complete, while the rest waits there."""
        if tail is not None:
            return self._extend(x, tail)
        kv, gate = self.kv(x), self.gate(x)
        if (sequence := self.seams.sequence).count > 1:
            before = tokens_before(self.ratio, self.overlap)
            kv, gate = sequence.before(torch.cat([kv, gate], dim=-1), before, dim=1).chunk(2, dim=-1)
        return self.norm(compress(kv, gate, self.position_bias, shard.own, self.overlap)[:, shard.leading :])

    def _extend(self, x: Tensor, tail: BlockTail) -> Tensor:
        new = torch.stack([self.kv(x), self.gate(x)])
        tokens = torch.cat([tail.waiting[:, :, : tail.count], new.to(tail.waiting.dtype)], dim=2)
        complete = tokens.shape[2] // self.ratio
        blocks, waiting = tokens.split([complete * self.ratio, tokens.shape[2] - complete * self.ratio], dim=2)
        tail.count = waiting.shape[2]
        tail.waiting[:, :, : tail.count] = waiting
        if not complete:
            return new.new_empty(x.shape[0], 0, self.entry_dim)
        before = self.overlap and tail.blocks > 0
        if before:  # a block in front, whose own entry exists already
            blocks = torch.cat([F.pad(tail.previous, (0, self.entry_dim)), blocks], dim=2)
        if self.overlap:
            tail.previous.copy_(blocks[:, :, -self.ratio :, : self.entry_dim])
        tail.blocks += complete
        kv, gate = blocks.to(new.dtype)
        documents = torch.zeros(kv.shape[:2], dtype=torch.long, device=x.device)
        entries = compress(kv, gate, self.position_bias, compression_blocks(documents, self.ratio), self.overlap)
        return self.norm(entries[:, 1:] if before else entries)

    def new_tail(self, batch: int) -> BlockTail:
        """For the start of a document."""
        return BlockTail(batch, self.ratio, 2 if self.overlap else 1, self.entry_dim)
