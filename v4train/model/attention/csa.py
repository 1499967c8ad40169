"""`csa`: compressed sparse attention (V4 report section 2.3.1, eqs. 9-19)."""

import torch
from torch import Tensor

from v4train.model.attention.compressor import Compressor
from v4train.model.attention.core import IndexUse, attend
from v4train.model.attention.indexer import Indexer
from v4train.model.attention.shared_kv import SharedKVAttention
from v4train.model.config import ModelConfig
from v4train.model.documents import compression_blocks
from v4train.model.losses import Losses
from v4train.model.rope import rotate, rotations


class CompressedSparseAttention(SharedKVAttention):
    """The window and the top-k entries of an overlapped 4-to-1 compression.

    `mode` is `sparse`, `dense` (all visible entries, no indexer) or `indexer_warmup` (dense attention, while the
    indexer learns from all visible entries).
    """

    def __init__(self, config: ModelConfig, losses: Losses) -> None:
        super().__init__(config, config.attention.compressed_rope)
        options = config.attention
        self.losses, self.mode = losses, "sparse"
        self.ratio = options.csa_compression
        self.loss_share = 1 / config.layer_kinds.count("csa")  # the loss is the mean over the layers that have it
        self.compressor = Compressor(config.hidden_size, options.head_dim, self.ratio, True, config.norm_eps)
        self.indexer = Indexer(config, self.ratio)

    def mix(self, x, latent, query, kv, starts, rotation, document_ids) -> Tensor:
        options = self.options
        blocks = compression_blocks(document_ids, self.ratio)
        entry_rotation = rotations(blocks.positions, options.rope_dim, self.rope)
        entries = rotate(self.compressor(x, blocks), entry_rotation)
        learning = self.training and self.mode != "dense"
        scored = index = None
        if learning or self.mode == "sparse":
            # The indexer learns by its own loss alone, so nothing flows back from it (V4.md 2.3).
            with torch.set_grad_enabled(learning and torch.is_grad_enabled()):
                scored = self.indexer(x.detach(), latent.detach(), blocks, rotation, entry_rotation)
            index = IndexUse(options.indexer.top_k, select=self.mode == "sparse", with_loss=learning)
        output, kl = attend(
            query, kv, self.sink, starts, options.window, entries, blocks, scored, index, chunk=options.query_chunk
        )
        if learning:
            kl = self.losses.mean("indexer_kl", kl, (blocks.end > blocks.first).sum())
            output = self.losses.attach(output, "indexer_kl", kl, options.indexer.loss_weight * self.loss_share)
        return output
