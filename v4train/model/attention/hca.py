"""`hca`: heavily compressed attention (V4 report section 2.3.2, eqs. 20-26)."""

from torch import Tensor

from v4train.model.attention.cache import LayerCache
from v4train.model.attention.compressor import Compressor
from v4train.model.attention.core import Entries, Local, attend
from v4train.model.attention.shared_kv import SharedKVAttention, compressed, new_entry_buffers
from v4train.model.attention.tokens import Tokens
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.losses import Losses


class HeavilyCompressedAttention(SharedKVAttention):
    """The window and every visible entry of a 128-to-1 compression."""

    def __init__(self, config: ModelConfig, losses: Losses, layer: LayerAttention) -> None:
        super().__init__(config, layer, layer.options.compressed_rope)
        options = layer.options
        ratio = options.hca_compression
        self.compressor = Compressor(config.hidden_size, options.head_dim, ratio, False, config.norm_eps)

    def mix(self, query: Tensor, local: Local, tokens: Tokens, cache: LayerCache | None) -> Tensor:
        options = self.options
        keys, seen = compressed(self.compressor, tokens, self.rope, options.rope_dim, cache, "entries")
        entries = Entries(keys[:, None], None, seen)
        return attend(query, local=local, entries=entries, sink=self.sink, chunk=options.query_chunk).output

    def new_cache(self, batch: int, max_length: int) -> LayerCache:
        cache = super().new_cache(batch, max_length)
        cache.buffers |= new_entry_buffers(self.compressor, batch, max_length, "entries")
        return cache
