"""`dsa`: DeepSeek sparse attention of V3.2, MLA over the top-k tokens that a lightning indexer picks (V4.md 3).

Shapes: B batch, S sequence, M hidden, T tokens, I indexer heads, J their width.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from v4train.model.attention.cache import LayerCache, TokenBuffer
from v4train.model.attention.core import Entries, IndexUse
from v4train.model.attention.indexer import attend_indexed
from v4train.model.attention.local import extend
from v4train.model.attention.mla import MultiHeadLatentAttention
from v4train.model.attention.tokens import Tokens
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.documents import EntryRange
from v4train.model.losses import Losses
from v4train.model.norm import LayerNorm
from v4train.model.rope import rotate
from v4train.model.seams import Seams

KEY_NORM_EPS = 1e-6  # of the LayerNorm, as released


class TokenIndexer(nn.Module):
    """One index key a token, LayerNorm with bias; queries from the attention's latent; one weight per head.

    The released model rotates the first channels in half-split order; here, as everywhere, the last ones in pairs,
    which is the same up to the order of channels. Its Hadamard rotation serves only quantisation: left out.
    """

    seams = Seams()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        options = config.attention.dsa
        self.head_dim = options.head_dim
        self.scale = options.num_heads**-0.5 * options.head_dim**-0.5
        self.query = nn.Linear(config.attention.mla.q_lora_rank, options.num_heads * options.head_dim, bias=False)
        self.query.weight.head_rows = options.head_dim
        self.key = nn.Linear(config.hidden_size, options.head_dim, bias=False)
        self.key_norm = LayerNorm(options.head_dim, KEY_NORM_EPS)
        self.head_weight = nn.Linear(config.hidden_size, options.num_heads, bias=False)

    def forward(self, x: Tensor, latent: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of `index_scores` from x [B, S, M] and the query latent [B, S, q_lora_rank], both detached; keys of
        the tokens before these too, where other ranks have them."""
        query = rotate(self.query(latent).unflatten(-1, (-1, self.head_dim)), rotation)
        keys = rotate(self.key_norm(self.key(x)), rotation)
        keys = self.seams.heads.copy(self.seams.sequence.before(keys, None, dim=1))
        return query, keys, self.head_weight(x) * self.scale


class DeepSeekSparseAttention(MultiHeadLatentAttention):
    """MLA whose keys are the top-k tokens. `mode` is `sparse`, `dense` or `indexer_warmup`, as in `csa`."""

    def __init__(self, config: ModelConfig, losses: Losses, layer: LayerAttention) -> None:
        super().__init__(config, losses, layer)
        self.options = replace(self.options, window=None, dilation=1, global_tokens=0)
        self.index_options = config.attention.dsa
        self.losses, self.mode = losses, "sparse"
        self.loss_count = "indexer_kl_dsa"  # what the loss is a mean over, among `losses.denominators`
        self.loss_share = 1 / len(config.indexed_kinds)  # the loss is the mean over the layers that have it
        self.indexer = TokenIndexer(config)

    @property
    def absorbs(self) -> bool:
        return self.mode == "sparse"

    def mix(
        self, query: Tensor, keys: Tensor, values: Tensor | None, tokens: Tokens, cache: LayerCache | None
    ) -> Tensor:
        options = self.index_options
        learning = self.training and self.mode != "dense" and cache is None
        scored = index = None
        if learning or self.mode == "sparse" or cache is not None:
            # The indexer learns by its own loss alone, so nothing flows back from it (V4.md 2.3).
            with self.losses.for_indexer(), torch.set_grad_enabled(learning and torch.is_grad_enabled()):
                scored = self.indexer(tokens.x.detach(), tokens.latent.detach(), tokens.rotation)
        if learning or self.mode == "sparse":
            index = IndexUse(options.top_k, select=self.mode == "sparse", with_loss=learning)
        if cache is not None:
            keys, values = extend(cache, keys, values)
            scored = (scored[0], cache["index"].extend(scored[1][:, None])[:, 0], scored[2])
        elif values is not None:  # or every chunk copies them
            keys, values = keys.contiguous(), values.contiguous()
        # Every token is an entry: visible from itself on.
        where = tokens.place
        end = torch.arange(1, query.shape[1] + 1, device=query.device).expand(query.shape[:2]) + where.previous
        seen = EntryRange(first=where.starts, end=end, ratio=1, offset=where.previous)
        return attend_indexed(
            self.losses,
            query,
            entries=Entries(keys, values, seen),
            sink=self.sink,
            scored=scored,
            index=index,
            mean_over=(self.loss_count, (tokens.document_ids >= 0).sum()),
            weight=options.loss_weight * self.loss_share,
            scale=self.scale,
            value_width=self.options.kv_lora_rank,
            heads=self.seams.heads,
            chunk=self.chunk,
        )

    def new_cache(self, batch: int, max_length: int) -> LayerCache:
        cache = super().new_cache(batch, max_length)
        cache.buffers["index"] = TokenBuffer(batch, 1, max_length, self.index_options.head_dim)
        return cache
