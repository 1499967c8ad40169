"""One decoder block: residual(attention), residual(ffn)."""

from torch import Tensor, nn

from v4train.model.attention import KINDS
from v4train.model.config import ModelConfig
from v4train.model.losses import Losses
from v4train.model.moe import MoE
from v4train.model.norm import RMSNorm
from v4train.model.residual import RESIDUALS


class Block(nn.Module):
    """Maps (streams [B, S, C, M], input ids, document ids, targets) to the same tuple; only the streams change."""

    def __init__(self, config: ModelConfig, losses: Losses, kind: str, hashed: bool) -> None:
        super().__init__()
        residual = RESIDUALS[config.residual.kind]
        self.attention_residual = residual(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = KINDS[kind](config, losses)
        self.ffn_residual = residual(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = MoE(config, losses, hashed)

    def forward(
        self, streams: Tensor, input_ids: Tensor, document_ids: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, coefficients = self.attention_residual(streams)
        x = self.attention(self.attention_norm(x), document_ids)
        streams = self.attention_residual.merge(streams, x, coefficients)
        x, coefficients = self.ffn_residual(streams)
        x = self.ffn(self.ffn_norm(x), input_ids, document_ids)
        streams = self.ffn_residual.merge(streams, x, coefficients)
        return streams, input_ids, document_ids, targets
