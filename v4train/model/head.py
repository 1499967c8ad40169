"""End of the network: streams to one, norm, output matrix, and the language-model loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.config import ModelConfig
from v4train.model.cross_entropy import TokenLosses, linear_cross_entropy, token_losses
from v4train.model.losses import Losses
from v4train.model.norm import RMSNorm
from v4train.model.precision import full
from v4train.model.residual import COLLAPSES
from v4train.model.seams import Seams


class OutputNorm(nn.Module):
    """Collapse the streams and normalise: [B, S, C, M] -> [B, S, M]. The MTP block has its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.collapse = COLLAPSES[config.residual.kind](config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, streams: Tensor) -> Tensor:
        return self.norm(self.collapse(streams))


class LMHead(nn.Module):
    """Output matrix [V, M], read only here: logits, or the loss without them."""

    seams = Seams()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(
        self, x: Tensor, targets: Tensor | None, each: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | TokenLosses:
        """fp32 logits [B, S, V]; with targets [B, S], (sum of the loss in nats, number of valid targets), or with
        `each` the losses of every target, [B, S]."""
        vocabulary = self.seams.vocabulary
        if targets is None:
            return vocabulary.gather(full(F.linear(x, self.weight)))
        if each:
            found = token_losses(x.flatten(0, 1), self.weight, targets.flatten(), vocabulary)
            return TokenLosses(*(values.view(targets.shape) for values in found))
        x = vocabulary.copy(x).flatten(0, 1)
        total = linear_cross_entropy(x, self.weight, targets.flatten(), vocabulary)
        return total, (targets != -100).sum()


class Head(nn.Module):
    """Last part of the main model: records `lm_loss`, hands its inputs on unchanged."""

    def __init__(self, config: ModelConfig, losses: Losses) -> None:
        super().__init__()
        self.losses = losses
        self.output_norm = OutputNorm(config)
        self.lm_head = LMHead(config)

    def forward(
        self, streams: Tensor, input_ids: Tensor, document_ids: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = targets[:, : streams.shape[1]]  # there may be a look-ahead
        x = self.output_norm(streams)
        total, count = self.lm_head(x, own)
        if self.losses.tokens is not None:
            self.losses.tokens.append(self.lm_head(x, own, each=True))
        self.losses.record("lm_loss", self.losses.mean("lm_loss", total, count))
        return streams, input_ids, document_ids, targets
