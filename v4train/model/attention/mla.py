"""`mla`: multi-head latent attention of DeepSeek V2 and V3 (arXiv 2405.04434 section 2.1; V4.md 3).

Queries come from a latent, keys and values from another one that all heads share, and one rotated key a token carries
the position. Trained in expanded form, each head with keys and values of its own; decoded in absorbed form, where each
query goes to the latent space and only latent and rotated key are cached. `dsa` trains in absorbed form too, so that
its heads share the tokens that they gather.

Shapes: B batch, S sequence, M hidden, H heads, L latent (kv_lora_rank), P nope_dim, R rope_dim, E value_dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.attention.cache import LayerCache
from v4train.model.attention.local import attend_locally, local_buffers, reach
from v4train.model.attention.tokens import Tokens
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.documents import place
from v4train.model.linear import SharedOutLinear
from v4train.model.losses import Losses
from v4train.model.norm import RMSNorm
from v4train.model.precision import product_dtype
from v4train.model.rope import rotate, rotations
from v4train.model.seams import Seams


class HeadsFromLatent(nn.Module):
    """One matrix [D, L] a head, as one weight [H * D, L]."""

    def __init__(self, num_heads: int, latent: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(num_heads * width, latent))
        self.weight.head_rows = width

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """A latent of all heads [B, S, L], or one a head [B, S, H, L], to [B, S, H, D]; transposed, the way back."""
        if x.dim() == 3:
            return F.linear(x, self.weight).unflatten(-1, (-1, self.width))
        weight = self.weight.unflatten(0, (-1, self.width))
        return torch.einsum("bshd,hdl->bshl" if transposed else "bshl,hdl->bshd", x, weight)


class MultiHeadLatentAttention(nn.Module):
    """Low-rank queries, keys and values, with decoupled RoPE."""

    seams = Seams()

    def __init__(self, config: ModelConfig, losses: Losses, layer: LayerAttention) -> None:
        super().__init__()
        options, hidden = layer.options, config.hidden_size
        self.options, self.chunk = options, config.attention.query_chunk
        self.scale = options.logit_factor * (options.nope_dim + options.rope_dim) ** -0.5
        heads, latent = options.num_heads, options.kv_lora_rank
        self.query_down = nn.Linear(hidden, options.q_lora_rank, bias=False)
        self.query_norm = RMSNorm(options.q_lora_rank, config.norm_eps)
        self.query_up = nn.Linear(options.q_lora_rank, heads * (options.nope_dim + options.rope_dim), bias=False)
        self.query_up.weight.head_rows = options.nope_dim + options.rope_dim
        self.kv_down = nn.Linear(hidden, latent, bias=False)
        self.kv_norm = RMSNorm(latent, config.norm_eps)
        self.rope_key = nn.Linear(hidden, options.rope_dim, bias=False)
        self.key_up = HeadsFromLatent(heads, latent, options.nope_dim)
        self.value_up = HeadsFromLatent(heads, latent, options.value_dim)
        self.output = SharedOutLinear(heads * options.value_dim, hidden, bias=False)
        self.sink = nn.Parameter(torch.empty(heads)) if options.sink else None

    def forward(self, x: Tensor, document_ids: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attention of normalised hidden states [B, S, M] within documents [B, S]; returns [B, S, M]."""
        options, heads, sequence = self.options, self.seams.heads, self.seams.sequence
        x = x.to(product_dtype(x))  # once, and not for each product, whose gradients are summed in this dtype
        where = place(document_ids, None if cache is None else cache.length, sequence)
        rotation = rotations(where.positions, options.rope_dim, options.rope)
        query_latent = self.query_norm(self.query_down(x))
        query = self.query_up(heads.copy(query_latent)).unflatten(-1, (-1, options.nope_dim + options.rope_dim))
        query = rotate(query, rotation)
        latent = self.kv_norm(self.kv_down(x))
        rope_key = rotate(self.rope_key(x), rotation)
        if cache is None and sequence.count > 1:  # what all heads share, before each makes its keys of it
            both = sequence.before(torch.cat([latent, rope_key], dim=-1), reach(options), dim=1)
            latent, rope_key = both.split([options.kv_lora_rank, options.rope_dim], dim=-1)
        latent, rope_key = heads.copy(latent), heads.copy(rope_key)
        absorbed = self.absorbs or cache is not None
        if not absorbed:
            shared = rope_key[:, :, None].expand(-1, -1, query.shape[2], -1)
            keys = torch.cat([self.key_up(latent), shared], dim=-1).transpose(1, 2)
            values = self.value_up(latent).transpose(1, 2)
        else:
            plain, rotated = query.split([options.nope_dim, options.rope_dim], dim=-1)
            query = torch.cat([self.key_up(plain, transposed=True), rotated], dim=-1)
            keys, values = torch.cat([latent, rope_key], dim=-1)[:, None], None
        tokens = Tokens(x, query_latent, document_ids, where, rotation)
        output = self.mix(query, keys, values, tokens, cache)
        if absorbed:
            output = self.value_up(output)
        if cache is not None:
            cache.length += x.shape[1]
        return self.output(output.flatten(-2))

    @property
    def absorbs(self) -> bool:
        """Whether training goes by the latent too."""
        return False

    def mix(
        self, query: Tensor, keys: Tensor, values: Tensor | None, tokens: Tokens, cache: LayerCache | None
    ) -> Tensor:
        """The softmax, [B, S, H, E]; in absorbed form over [B, 1, S, L + R], whose first L channels are values."""
        inputs = (query, keys, values, tokens.place, cache)
        numbers = {"scale": self.scale, "value_width": self.options.kv_lora_rank, "chunk": self.chunk}
        return attend_locally(self.options, *inputs, sink=self.sink, **numbers)

    def new_cache(self, batch: int, max_length: int) -> LayerCache:
        """Empty cache of this layer for `batch` rows of at most `max_length` tokens."""
        width = self.options.kv_lora_rank + self.options.rope_dim
        return LayerCache(local_buffers(self.options, batch, 1, max_length, keys=width))
