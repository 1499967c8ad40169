"""`hca`: heavily compressed attention (V4 report section 2.3.2, eqs. 20-26)."""

from torch import Tensor

from v4train.model.attention.compressor import Compressor
from v4train.model.attention.core import attend
from v4train.model.attention.shared_kv import SharedKVAttention
from v4train.model.config import ModelConfig
from v4train.model.documents import compression_blocks
from v4train.model.losses import Losses
from v4train.model.rope import rotate, rotations


class HeavilyCompressedAttention(SharedKVAttention):
    """The window and every visible entry of a 128-to-1 compression."""

    def __init__(self, config: ModelConfig, losses: Losses) -> None:
        super().__init__(config, config.attention.compressed_rope)
        options = config.attention
        self.ratio = options.hca_compression
        self.compressor = Compressor(config.hidden_size, options.head_dim, self.ratio, False, config.norm_eps)

    def mix(self, x, latent, query, kv, starts, rotation, document_ids) -> Tensor:
        options = self.options
        blocks = compression_blocks(document_ids, self.ratio)
        entries = rotate(self.compressor(x, blocks), rotations(blocks.positions, options.rope_dim, self.rope))
        return attend(query, kv, self.sink, starts, options.window, entries, blocks, chunk=options.query_chunk)[0]
