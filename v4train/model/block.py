"""One decoder block: residual(attention), residual(ffn)."""

from collections.abc import Callable
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
from v4train.model.residual import RESIDUALS, Coefficients


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
        chosen = self.ffn.take_coming() if self.is_moe else None  # here, where no recomputation comes by again
        if self._recomputes("block", cache):
            streams = recomputed(self._streams, streams, input_ids, document_ids, chosen)
        else:
            streams = self._streams(streams, input_ids, document_ids, chosen, cache)
        return streams, input_ids, document_ids, targets

    def _streams(
        self,
        streams: Tensor,
        input_ids: Tensor,
        document_ids: Tensor,
        chosen: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x, unmixed, coefficients = self.attention_residual(streams)
        normalised = self.attention_norm(x)
        if self._recomputes("attention", cache):
            attended = recomputed(self.attention, normalised, document_ids)
        else:
            attended = self.attention(normalised, document_ids, cache)
        if coefficients is not None:  # or x is a view of the streams
            again = _input_again(self.attention_residual, self.attention_norm, unmixed, coefficients)
            forget(x, normalised, again=again, needed_by=attended, inside=self, hidden=x)

        merge = partial(self.attention_residual.merge, unmixed, attended, coefficients)
        between = merge()
        x, unmixed, coefficients = self.ffn_residual(between)
        normalised = self.ffn_norm(x)
        transformed = self.ffn(normalised, input_ids, document_ids, chosen) if self.is_moe else self.ffn(normalised)
        output = self.ffn_residual.merge(unmixed, transformed, coefficients)
        if coefficients is not None:
            again = _input_again(self.ffn_residual, self.ffn_norm, unmixed, coefficients)
            forget(x, normalised, again=again, needed_by=transformed, inside=self, hidden=x)
            forget(between, again=lambda into: merge(into=into), needed_by=output, inside=self, hidden=x)
        return output

    def _recomputes(self, level: str, cache: LayerCache | None) -> bool:
        return self.recompute == level and self.training and torch.is_grad_enabled() and cache is None


def _input_again(
    residual: nn.Module, norm: RMSNorm, streams: Tensor, coefficients: Coefficients
) -> Callable[[Tensor, Tensor], None]:
    """What writes the input [B, S, M] of a sub-layer, and what its norm makes of it, once more."""

    def again(x: Tensor, normalised: Tensor) -> None:
        residual.collapse(streams, coefficients, into=x)
        normalised.copy_(norm(x))

    return again
