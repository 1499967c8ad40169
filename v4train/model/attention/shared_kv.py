"""Shared-KV attention, the common part of V4's layer kinds (V4 report section 2.3, V4.md 2.2).

One KV head serves as key and value of all query heads. `swa` sees a window; `csa` adds entries compressed 4 to 1, of
which the lightning indexer selects the top-k; `hca` adds all entries compressed 128 to 1.

Shapes: B batch, S sequence, M hidden, H heads, D head width.
"""

import torch
from torch import Tensor, nn

from v4train.model.attention.core import attend
from v4train.model.config import ModelConfig, RopeConfig
from v4train.model.documents import document_starts
from v4train.model.linear import GroupedLinear
from v4train.model.norm import RMSNorm, rms_norm
from v4train.model.rope import rotate, rotations


class SharedKVAttention(nn.Module):
    """Queries, the shared KV head, sink and grouped output projection; subclasses add compressed entries."""

    def __init__(self, config: ModelConfig, rope: RopeConfig) -> None:
        super().__init__()
        attention = config.attention
        width = attention.num_heads * attention.head_dim
        self.options, self.rope, self.eps = attention, rope, config.norm_eps
        self.query_down = nn.Linear(config.hidden_size, attention.q_lora_rank, bias=False)
        self.query_norm = RMSNorm(attention.q_lora_rank, config.norm_eps)
        self.query_up = nn.Linear(attention.q_lora_rank, width, bias=False)
        self.kv = nn.Linear(config.hidden_size, attention.head_dim, bias=False)
        self.kv_norm = RMSNorm(attention.head_dim, config.norm_eps)
        self.sink = nn.Parameter(torch.empty(attention.num_heads))
        self.output_down = GroupedLinear(attention.o_groups, width // attention.o_groups, attention.o_lora_rank)
        self.output_up = nn.Linear(attention.o_groups * attention.o_lora_rank, config.hidden_size, bias=False)

    def forward(self, x: Tensor, document_ids: Tensor) -> Tensor:
        """Attention of normalised hidden states [B, S, M] within documents [B, S]; returns [B, S, M]."""
        starts = document_starts(document_ids)
        positions = torch.arange(x.shape[1], device=x.device) - starts
        rotation = rotations(positions, self.options.rope_dim, self.rope)
        latent = self.query_norm(self.query_down(x))
        query = rms_norm(self.query_up(latent).unflatten(-1, (self.options.num_heads, -1)), self.eps)
        query = rotate(query, rotation)
        kv = rotate(self.kv_norm(self.kv(x)), rotation)
        output = self.mix(x, latent, query, kv, starts, rotation, document_ids)
        output = rotate(output, rotation.conj())
        grouped = output.flatten(-2).unflatten(-1, (self.options.o_groups, -1))
        return self.output_up(self.output_down(grouped).flatten(-2))

    def mix(
        self,
        x: Tensor,
        latent: Tensor,
        query: Tensor,
        kv: Tensor,
        starts: Tensor,
        rotation: Tensor,
        document_ids: Tensor,
    ) -> Tensor:
        """The softmax over what this kind of layer sees, [B, S, H, D]: here the window alone."""
        options = self.options
        return attend(query, kv, self.sink, starts, options.window, chunk=options.query_chunk)[0]
