"""Shared-KV attention, the common part of V4's layer kinds (V4 report section 2.3, V4.md 2.2).

One KV head serves as key and value of all query heads. `swa` sees a window; `csa` adds entries compressed 4 to 1, of
which the lightning indexer selects the top-k; `hca` adds all entries compressed 128 to 1.

Shapes: B batch, S sequence, M hidden, H heads, D head width, N entries.
"""

import torch
from torch import Tensor, nn

from v4train.model.attention.cache import LayerCache, TokenBuffer, window_capacity
from v4train.model.attention.compressor import Compressor
from v4train.model.attention.core import Local, attend
from v4train.model.attention.tokens import Tokens
from v4train.model.config import LayerAttention, ModelConfig, RopeConfig
from v4train.model.documents import EntryRange, Shard, lay_out, place
from v4train.model.linear import GroupedLinear, SharedOutLinear
from v4train.model.norm import RMSNorm
from v4train.model.precision import product_dtype
from v4train.model.recompute import forget
from v4train.model.rope import rotate, rotate_normalised, rotations
from v4train.model.seams import Seams


class SharedKVAttention(nn.Module):
    """Queries, the shared KV head, sink and grouped output projection; subclasses add compressed entries."""

    seams = Seams()

    def __init__(self, config: ModelConfig, layer: LayerAttention, rope: RopeConfig) -> None:
        super().__init__()
        attention = layer.options
        width = attention.num_heads * attention.head_dim
        self.options, self.rope, self.eps = attention, rope, config.norm_eps
        self.query_down = nn.Linear(config.hidden_size, attention.q_lora_rank, bias=False)
        self.query_norm = RMSNorm(attention.q_lora_rank, config.norm_eps)
        self.query_up = nn.Linear(attention.q_lora_rank, width, bias=False)
        self.query_up.weight.head_rows = attention.head_dim  # to the optimizer, which may take each head alone
        self.kv = nn.Linear(config.hidden_size, attention.head_dim, bias=False)
        self.kv_norm = RMSNorm(attention.head_dim, config.norm_eps)
        self.sink = nn.Parameter(torch.empty(attention.num_heads))
        self.output_down = GroupedLinear(attention.o_groups, width // attention.o_groups, attention.o_lora_rank)
        self.output_up = SharedOutLinear(attention.o_groups * attention.o_lora_rank, config.hidden_size, bias=False)

    def forward(self, x: Tensor, document_ids: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attention of normalised hidden states [B, S, M] within documents [B, S]; returns [B, S, M]."""
        options, heads, sequence = self.options, self.seams.heads, self.seams.sequence
        x = x.to(product_dtype(x))  # once, and not for each product, whose gradients are summed in this dtype
        where = place(document_ids, None if cache is None else cache.length, sequence)
        rotation = rotations(where.positions, options.rope_dim, self.rope)
        latent = self.query_norm(self.query_down(x))
        query = self.query_up(heads.copy(latent)).unflatten(-1, (-1, options.head_dim))
        query = rotate_normalised(query, rotation, self.eps)
        kv = rotate(self.kv_norm(self.kv(x)), rotation)[:, None]
        tokens = Tokens(x, latent, document_ids, where, rotation)
        kv = cache["window"].extend(kv) if cache is not None else sequence.before(kv, options.window - 1, dim=2)
        local = Local(heads.copy(kv), None, where.starts_among(kv.shape[2]), options.window)
        output = self.mix(query, local, tokens, cache)
        turned = rotate(output, rotation.conj())
        grouped = turned.flatten(-2).unflatten(-1, (-1, options.num_heads // options.o_groups * options.head_dim))
        down = self.output_down(grouped)

        def turned_again(into: Tensor) -> None:
            into.copy_(rotate(output, rotation.conj()))

        forget(turned, again=turned_again, needed_by=down, inside=self, hidden=x)
        if cache is not None:
            cache.length += x.shape[1]
        return self.output_up(down.flatten(-2))

    def mix(self, query: Tensor, local: Local, tokens: Tokens, cache: LayerCache | None) -> Tensor:
        """The softmax over what this kind of layer sees, [B, S, H, D]: here the window alone."""
        return attend(query, local=local, sink=self.sink, chunk=self.options.query_chunk).output

    def new_cache(self, batch: int, max_length: int) -> LayerCache:
        """Empty cache of this layer for `batch` rows of at most `max_length` tokens."""
        capacity = window_capacity(self.options.window, 1, max_length)
        return LayerCache({"window": TokenBuffer(batch, 1, capacity, self.options.head_dim)})


def compressed(
    compressor: Compressor,
    tokens: Tokens,
    rope: RopeConfig,
    rope_dim: int,
    cache: LayerCache | None,
    name: str,
    laid_out: tuple[Shard, EntryRange] | None = None,
) -> tuple[Tensor, EntryRange]:
    """Rotated entries [B, N, c] of all tokens so far, and which of them each query sees.

    The cache holds them in the buffer `name`, and the tokens that wait in `<name>_tail`. laid_out: a packed batch, by
    `lay_out` for another compressor that is like this one.
    """
    seams = compressor.seams
    if cache is None:
        shard, seen = laid_out or lay_out(tokens.place, compressor.ratio, compressor.overlap, seams.sequence)
        positions = shard.own.positions[:, shard.leading :]
        entries = rotate(compressor(tokens.x, shard), rotations(positions, rope_dim, rope))
        if shard.order is not None:
            entries = torch.take_along_dim(seams.sequence.gather(entries, dim=1), shard.order[..., None], dim=1)
        return seams.heads.copy(entries), seen
    tail, positions = cache[f"{name}_tail"], tokens.place.positions
    first = tail.blocks
    new = compressor(tokens.x, tail=tail)
    starts = torch.arange(first, tail.blocks, device=new.device).expand(new.shape[:2]) * compressor.ratio
    entries = cache[name].extend(rotate(new, rotations(starts, rope_dim, rope))[:, None])[:, 0]
    end = (positions + 1) // compressor.ratio
    seen = EntryRange(first=torch.zeros_like(end), end=end, ratio=compressor.ratio, offset=tokens.place.previous)
    return entries, seen


def new_entry_buffers(compressor: Compressor, batch: int, max_length: int, name: str) -> dict:
    """Buffers of `compressed` for an empty cache."""
    entries = TokenBuffer(batch, 1, max_length // compressor.ratio, compressor.entry_dim)
    return {name: entries, f"{name}_tail": compressor.new_tail(batch)}
