"""`csa`: compressed sparse attention (V4 report section 2.3.1, eqs. 9-19)."""

from dataclasses import replace

import torch
from torch import Tensor

from v4train.model.attention.cache import LayerCache
from v4train.model.attention.compressor import Compressor
from v4train.model.attention.core import Entries, IndexUse, Local
from v4train.model.attention.indexer import Indexer, attend_indexed
from v4train.model.attention.shared_kv import SharedKVAttention, compressed, new_entry_buffers
from v4train.model.attention.tokens import Tokens
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.documents import EntryRange, Shard, lay_out
from v4train.model.losses import Losses


class CompressedSparseAttention(SharedKVAttention):
    """The window and the top-k entries of an overlapped 4-to-1 compression.

    `mode` is `sparse`, `dense` (all visible entries, no indexer) or `indexer_warmup` (dense attention, while the
    indexer learns from all visible entries).
    """

    def __init__(self, config: ModelConfig, losses: Losses, layer: LayerAttention) -> None:
        super().__init__(config, layer, layer.options.compressed_rope)
        options = layer.options
        self.losses, self.mode = losses, "sparse"
        self.loss_count = "indexer_kl_csa"  # what the loss is a mean over, among `losses.denominators`
        ratio = options.csa_compression
        self.loss_share = 1 / len(config.indexed_kinds)  # the loss is the mean over the layers that have it
        self.compressor = Compressor(config.hidden_size, options.head_dim, ratio, True, config.norm_eps)
        self.indexer = Indexer(config, ratio)

    def mix(self, query: Tensor, local: Local, tokens: Tokens, cache: LayerCache | None) -> Tensor:
        options = self.options
        laid_out = None
        if cache is None:
            laid_out = lay_out(tokens.place, options.csa_compression, True, self.seams.sequence)
        keys, seen = compressed(self.compressor, tokens, self.rope, options.rope_dim, cache, "entries", laid_out)
        learning = self.training and self.mode != "dense" and cache is None
        scored = index = None
        if learning or self.mode == "sparse" or cache is not None:
            # The indexer learns by its own loss alone, so nothing flows back from it (V4.md 2.3).
            with self.losses.for_indexer(), torch.set_grad_enabled(learning and torch.is_grad_enabled()):
                scored = self._index(tokens, cache, laid_out)
        if learning or self.mode == "sparse":
            index = IndexUse(options.indexer.top_k, select=self.mode == "sparse", with_loss=learning)
        return attend_indexed(
            self.losses,
            query,
            local=local,
            entries=Entries(keys[:, None], None, seen),
            sink=self.sink,
            scored=scored,
            index=index,
            mean_over=(self.loss_count, (seen.end > seen.first).sum()),
            weight=options.indexer.loss_weight * self.loss_share,
            heads=self.seams.heads,
            chunk=options.query_chunk,
        )

    def _index(
        self, tokens: Tokens, cache: LayerCache | None, laid_out: tuple[Shard, EntryRange] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        apart = replace(tokens, x=tokens.x.detach(), latent=tokens.latent.detach())
        keys, _ = compressed(self.indexer.compressor, apart, self.rope, self.options.rope_dim, cache, "index", laid_out)
        return self.indexer(apart.x, apart.latent, tokens.rotation, keys)

    def new_cache(self, batch: int, max_length: int) -> LayerCache:
        cache = super().new_cache(batch, max_length)
        cache.buffers |= new_entry_buffers(self.compressor, batch, max_length, "entries")
        cache.buffers |= new_entry_buffers(self.indexer.compressor, batch, max_length, "index")
        return cache
