"""Token embedding, copied into the residual streams."""

from torch import Tensor, nn

from v4train.model.config import ModelConfig


class Embedding(nn.Module):
    """First part of the model: token ids to streams. `lookup.weight` is [V, M]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_streams = config.num_streams
        self.lookup = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(
        self, streams: None, input_ids: Tensor, document_ids: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Streams [B, S, C, M]: the embedding copied C times (V4.md 2.1)."""
        embedded = self.lookup(input_ids)[:, :, None].expand(-1, -1, self.num_streams, -1)
        return embedded.contiguous(), input_ids, document_ids, targets
