"""DeepSeekMoE of V4: routed experts plus a shared one (V4 report section 2.1)."""

import torch
from torch import Tensor, nn

from v4train.model.config import ModelConfig
from v4train.model.ffn import SwiGLU
from v4train.model.losses import Losses
from v4train.model.moe.experts import Experts
from v4train.model.moe.router import HashRouter, ScoreRouter
from v4train.model.seams import Rows, Seams


def num_score_routers(config: ModelConfig) -> int:
    """MoE layers that are not hash-routed, MTP block included: those that have a balance loss."""
    layers = config.ffn_kinds[config.moe.num_hash_layers :] + [config.mtp_ffn] * config.mtp.num_layers
    return layers.count("moe")


class MoE(nn.Module):
    """y = sum_e g_e E_e(x) + E_shared(x); hash-routed in the first `num_hash_layers` layers, else score-routed."""

    seams = Seams()

    def __init__(self, config: ModelConfig, losses: Losses, hashed: bool) -> None:
        super().__init__()
        moe = config.moe
        self.num_experts = moe.num_experts
        self.router = HashRouter(config, losses) if hashed else ScoreRouter(config, losses, num_score_routers(config))
        self.experts = Experts(config)
        self.shared = None
        if moe.num_shared_experts:
            width = moe.intermediate_size * moe.num_shared_experts
            self.shared = SwiGLU(config.hidden_size, width, moe.swiglu_limit)

    def take_coming(self) -> Tensor | None:
        """The experts [B, S, K] that were chosen beforehand for this forward pass, taken from the router's `coming`."""
        if not isinstance(self.router, ScoreRouter) or not self.router.coming:
            return None
        return self.router.coming.popleft().to(self.router.bias.device, torch.long)

    def forward(self, x: Tensor, input_ids: Tensor, document_ids: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, M] of tokens `input_ids` [B, S] to [B, S, M]. chosen: what `take_coming` gave."""
        heads = self.seams.heads
        given = () if chosen is None else (chosen,)  # to a score router
        chosen, weights = self.router(x, input_ids, document_ids, *given)
        x, weights = heads.copy(x), heads.copy(weights)
        rows = Rows(x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1))
        sent = self.seams.experts.dispatch(rows, self.num_experts)
        shared = None if self.shared is None else self.shared.share(x)
        routed = sent.back(self.experts(*sent.arrived())).view_as(x)
        return heads.reduce(routed if shared is None else routed + shared)
