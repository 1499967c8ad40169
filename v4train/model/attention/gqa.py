"""`mha`, `mqa`, `gqa`: softmax attention over keys and values of their own; they differ in the number of KV heads.

Sources: arXiv 1706.03762 (mha), 1911.02150 (mqa), 2305.13245 (gqa). Options of a layer: a window, a dilation of it
(arXiv 2004.05150), global tokens, an attention sink (gpt-oss), full or partial RoPE with YaRN, norms of queries and
keys (Qwen 3).

Shapes: B batch, S sequence, M hidden, H heads, G KV heads, D head width.
"""

import torch
from torch import Tensor, nn

from v4train.model.attention.cache import LayerCache
from v4train.model.attention.local import attend_locally, local_buffers
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.documents import place
from v4train.model.losses import Losses
from v4train.model.norm import RMSNorm
from v4train.model.rope import rotate, rotations


class GroupedQueryAttention(nn.Module):
    """H query heads in G groups, each group with one key and one value head; G = H is mha, G = 1 mqa."""

    def __init__(self, config: ModelConfig, losses: Losses, layer: LayerAttention) -> None:
        super().__init__()
        options = layer.options
        self.options, self.chunk = options, config.attention.query_chunk
        self.num_kv_heads = layer.num_kv_heads
        width, kv_width = options.num_heads * options.head_dim, self.num_kv_heads * options.head_dim
        self.query = nn.Linear(config.hidden_size, width, bias=options.bias)
        self.key = nn.Linear(config.hidden_size, kv_width, bias=options.bias)
        self.value = nn.Linear(config.hidden_size, kv_width, bias=options.bias)
        self.output = nn.Linear(width, config.hidden_size, bias=options.bias)
        self.query_norm = RMSNorm(options.head_dim, config.norm_eps) if options.qk_norm else None
        self.key_norm = RMSNorm(options.head_dim, config.norm_eps) if options.qk_norm else None
        self.sink = nn.Parameter(torch.empty(options.num_heads)) if options.sink else None

    def forward(self, x: Tensor, document_ids: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attention of normalised hidden states [B, S, M] within documents [B, S]; returns [B, S, M]."""
        where = place(document_ids, None if cache is None else cache.length)
        rotation = rotations(where.positions, self.options.rope_dim, self.options.rope)
        query = self.query(x).unflatten(-1, (self.options.num_heads, -1))
        key = self.key(x).unflatten(-1, (self.num_kv_heads, -1))
        value = self.value(x).unflatten(-1, (self.num_kv_heads, -1))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        inputs = (query, keys, values, document_ids, where, cache)
        output = attend_locally(self.options, *inputs, sink=self.sink, chunk=self.chunk)
        if cache is not None:
            cache.length += x.shape[1]
        return self.output(output.flatten(-2))

    def new_cache(self, batch: int, max_length: int) -> LayerCache:
        """Empty cache of this layer for `batch` rows of at most `max_length` tokens."""
        width = self.options.head_dim
        return LayerCache(local_buffers(self.options, batch, self.num_kv_heads, max_length, keys=width, values=width))
