"""What the parts of an attention layer share about the tokens of one forward pass.

Shapes: B batch, S sequence, M hidden, R rope_dim.
"""

from dataclasses import dataclass

from torch import Tensor

from v4train.model.documents import Place


@dataclass
class Tokens:
    """Queries come from `latent`, the indexer reads both it and `x`."""

    x: Tensor  # [B, S, M] normalised hidden states
    latent: Tensor  # [B, S, q_lora_rank]
    document_ids: Tensor  # [B, S]
    place: Place
    rotation: Tensor  # complex64 [B, S, R/2]
