"""Token embedding, copied into the residual streams."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.config import ModelConfig
from v4train.model.seams import Seams


class Lookup(nn.Module):
    """Rows of a matrix [V, M] by token id: [...] int64 -> [..., M]."""

    seams = Seams()

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: Tensor) -> Tensor:
        vocabulary = self.seams.vocabulary
        if vocabulary.count == 1:
            return F.embedding(token_ids, self.weight)
        rows = token_ids - vocabulary.index * len(self.weight)
        here = (rows >= 0) & (rows < len(self.weight))
        return vocabulary.reduce(F.embedding(torch.where(here, rows, 0), self.weight) * here[..., None])


class Embedding(nn.Module):
    """First part of the model: token ids to streams. `lookup.weight` is [V, M]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_streams = config.num_streams
        self.lookup = Lookup(config.vocab_size, config.hidden_size)

    def forward(
        self, streams: None, input_ids: Tensor, document_ids: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Streams [B, S, C, M]: the embedding copied C times (V4.md 2.1)."""
        embedded = self.lookup(input_ids)[:, :, None].expand(-1, -1, self.num_streams, -1)
        return embedded.contiguous(), input_ids, document_ids, targets
