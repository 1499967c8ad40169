"""`mha`, `mqa`, `gqa`: softmax attention over keys and values of their own; they differ in the number of KV heads.

Sources: arXiv 1706.03762 (mha), 1911.02150 (mqa), 2305.13245 (gqa). Options of a layer: a window, a dilation of it
(arXiv 2004.05150), global tokens, an attention sink (gpt-oss), full or partial RoPE with YaRN, norms of queries and
keys (Qwen 3).

Shapes: B batch, S sequence, M hidden, H heads, G KV heads, D head width.
"""

import torch
from torch import Tensor, nn

from v4train.model.attention.cache import LayerCache
from v4train.model.attention.local import attend_locally, local_buffers, reach
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.documents import place
from v4train.model.linear import SharedOutLinear
from v4train.model.losses import Losses
from v4train.model.norm import RMSNorm
from v4train.model.rope import rotate, rotations
from v4train.model.seams import Seams


class GroupedQueryAttention(nn.Module):
    """H query heads in G groups, each group with one key and one value head; G = H is mha, G = 1 mqa."""

    seams = Seams()

    def __init__(self, config: ModelConfig, losses: Losses, layer: LayerAttention) -> None:
        super().__init__()
        options = layer.options
        self.options, self.chunk = options, config.attention.query_chunk
        self.num_kv_heads = layer.num_kv_heads
        width, kv_width = options.num_heads * options.head_dim, self.num_kv_heads * options.head_dim
        self.query = nn.Linear(config.hidden_size, width, bias=options.bias)
        self.key = nn.Linear(config.hidden_size, kv_width, bias=options.bias)
        self.value = nn.Linear(config.hidden_size, kv_width, bias=options.bias)
        self.output = SharedOutLinear(width, config.hidden_size, bias=options.bias)
        self.query_norm = RMSNorm(options.head_dim, config.norm_eps) if options.qk_norm else None
        self.key_norm = RMSNorm(options.head_dim, config.norm_eps) if options.qk_norm else None
        self.sink = nn.Parameter(torch.empty(options.num_heads)) if options.sink else None

    def forward(self, x: Tensor, document_ids: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attention of normalised hidden states [B, S, M] within documents [B, S]; returns [B, S, M]."""
        options, heads, sequence = self.options, self.seams.heads, self.seams.sequence
        where = place(document_ids, None if cache is None else cache.length, sequence)
        rotation = rotations(where.positions, options.rope_dim, options.rope)
        shared = self.shares_kv(heads.count)
        mine = heads.copy(x)  # for projections to the heads at hand
        query, key, value = (
            projection(x if shared and projection is not self.query else mine).unflatten(-1, (-1, options.head_dim))
            for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query, heads), self.key_norm(key, None if shared else heads)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if shared:  # all key-value heads are here: take the one of the heads at hand
            one = heads.index * self.num_kv_heads // heads.count
            key, value = (heads.copy(part)[:, :, one : one + 1] for part in (key, value))
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        if cache is None and sequence.count > 1:
            keys, values = (sequence.before(part, reach(options), dim=2) for part in (keys, values))
        inputs = (query, keys, values, where, cache)
        output = attend_locally(self.options, *inputs, sink=self.sink, chunk=self.chunk)
        if cache is not None:
            cache.length += x.shape[1]
        return self.output(output.flatten(-2))

    def shares_kv(self, shares: int) -> bool:
        """Whether each of so many shares of the heads needs all key-value projections, there being fewer of them."""
        return shares > 1 and self.num_kv_heads % shares > 0

    def new_cache(self, batch: int, max_length: int) -> LayerCache:
        """Empty cache of this layer for `batch` rows of at most `max_length` tokens."""
        width = self.options.head_dim
        return LayerCache(local_buffers(self.options, batch, self.num_kv_heads, max_length, keys=width, values=width))
