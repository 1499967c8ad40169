"""One decoder block: residual(attention), residual(ffn)."""

from functools import partial

import torch
from torch import Tensor, nn

from v4train.model.attention import KINDS
from v4train.model.attention.cache import LayerCache
from v4train.model.config import LayerAttention, ModelConfig
from v4train.model.ffn import SwiGLU
from v4train.model.losses import Losses
from v4train.model.moe import MoE
from v4train.model.norm import RMSNorm
from v4train.model.recompute import forget, recomputed
from v4train.model.residual import RESIDUALS


class Block(nn.Module):
    """Maps (streams [B, S, C, M], input ids, document ids, targets) to the same tuple; only the streams change.

    ffn: `dense` or `moe`, whose router is a table of token ids where `hashed`. `recompute` is a level of recompute.py,
    heeded in training only.
    """

    def __init__(self, config: ModelConfig, losses: Losses, attention: LayerAttention, ffn: str, hashed: bool) -> None:
        super().__init__()
        self.recompute = "none"
        residual = RESIDUALS[config.residual.kind]
        self.attention_residual = residual(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = KINDS[attention.kind](config, losses, attention)
        self.ffn_residual = residual(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.is_moe = ffn == "moe"
        if self.is_moe:
            self.ffn = MoE(config, losses, hashed)
        else:
            self.ffn = SwiGLU(config.hidden_size, config.ffn.intermediate_size, config.ffn.swiglu_limit)

    def forward(
        self,
        streams: Tensor,
        input_ids: Tensor,
        document_ids: Tensor,
        targets: Tensor | None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self._recomputes("block", cache):
            streams = recomputed(self._streams, streams, input_ids, document_ids)
        else:
            streams = self._streams(streams, input_ids, document_ids, cache)
        return streams, input_ids, document_ids, targets

    def _streams(
        self, streams: Tensor, input_ids: Tensor, document_ids: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        x, streams, coefficients = _entered(self.attention_residual, self.attention_norm, streams)
        if self._recomputes("attention", cache):
            x = recomputed(self.attention, x, document_ids)
        else:
            x = self.attention(x, document_ids, cache)
        merge = partial(self.attention_residual.merge, streams, x, coefficients)
        between = merge()
        x, streams, coefficients = _entered(self.ffn_residual, self.ffn_norm, between)
        x = self.ffn(x, input_ids, document_ids) if self.is_moe else self.ffn(x)
        output = self.ffn_residual.merge(streams, x, coefficients)
        forget(between, merge, needed_by=output)
        return output

    def _recomputes(self, level: str, cache: LayerCache | None) -> bool:
        return self.recompute == level and self.training and torch.is_grad_enabled() and cache is None


def _entered(residual: nn.Module, norm: RMSNorm, streams: Tensor) -> tuple[Tensor, Tensor, tuple | None]:
    """A sub-layer's normalised input [B, S, M]; the streams and the coefficients, as the residual module gives them."""
    x, streams, coefficients = residual(streams)
    normalised = norm(x)
    if coefficients is not None:  # or x is a view of the streams
        forget(x, partial(residual.collapse, streams, coefficients), needed_by=normalised)
    return normalised, streams, coefficients
