"""Routers: scored with a selection bias, or hashed by token id (V4 report section 2.1, V4.md 2.5); V3's and gpt-oss's.

Shapes: B batch, S sequence, M hidden, E experts, K experts per token.
"""

from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.config import ModelConfig
from v4train.model.losses import Losses
from v4train.model.moe.balance import sequence_balance_loss
from v4train.model.precision import full, full_precision
from v4train.model.seams import Seams

TINY = 1e-30  # keeps the gradient of sqrt finite once softplus underflows (x = -110 in fp32)
GATE_EPS = 1e-20  # floor of the gate normaliser, as in the released code


def affinities(logits: Tensor, scoring: str) -> Tensor:
    """Positive scores [..., E], fp32, with a finite gradient everywhere: V4's sqrt(softplus(x)), V3's sigmoid(x), or
    gpt-oss's softmax over the experts (normalised over the chosen ones it is the softmax of their logits)."""
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    return logits.softmax(-1) if scoring == "softmax" else torch.sqrt(F.softplus(logits) + TINY)


def select(scores: Tensor, top_k: int, num_groups: int, top_k_groups: int) -> Tensor:
    """Indices [..., K] of the best experts among those of the best groups: [..., E] -> int64.

    A group's score is the sum of its two best (V3 report section 2.1.2, node-limited routing). One group is none.
    """
    if num_groups > 1:
        grouped = scores.unflatten(-1, (num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(top_k_groups, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        scores = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    return scores.topk(top_k, dim=-1).indices


def gates(scores: Tensor, chosen: Tensor, scaling: float) -> Tensor:
    """Weights of the chosen experts, normalised over them and scaled: [.., E], [.., K] -> [.., K]."""
    weights = scores.gather(-1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + GATE_EPS) * scaling


def router_scores(x: Tensor, weight: Tensor, logit_bias: Tensor | None, scoring: str) -> Tensor:
    """Affinities of hidden states [..., M] to experts, weight [E, M]: fp32 [..., E]."""
    with full_precision(x.device.type):
        return affinities(F.linear(full(x), full(weight), None if logit_bias is None else full(logit_bias)), scoring)


class Router(nn.Module):
    """Gate weights of all experts [E, M], and a count of the tokens that were sent to each."""

    def __init__(self, config: ModelConfig, losses: Losses) -> None:
        super().__init__()
        self.options, self.losses = config.moe, losses
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))
        self.load: Tensor | None = None  # [E] tokens sent to each expert since `take_load`

    def count(self, chosen: Tensor, valid: Tensor) -> None:
        """Add the tokens of a training pass that are `valid` [B, S]: padding is not counted, nor a recomputation."""
        if not self.losses.recording:
            return
        counts = torch.bincount(chosen[valid].flatten(), minlength=self.options.num_experts)
        self.load = counts if self.load is None else self.load + counts

    def take_load(self) -> Tensor:
        """Tokens sent to each expert since the last call, [E] int64."""
        none = torch.zeros(self.options.num_experts, dtype=torch.long, device=self.weight.device)
        load, self.load = none if self.load is None else self.load, None
        return load


class ScoreRouter(Router):
    """Top-K of affinity + bias. The bias only selects; it is moved against the load after each step (loss-free).

    `coming` holds experts [B, S, K] that were chosen beforehand, int16 on the CPU, one tensor for each of the next
    forward passes (anticipatory routing, V4.md 2.9); while it is empty, each pass chooses for itself.
    """

    seams = Seams()

    def __init__(self, config: ModelConfig, losses: Losses, num_routers: int) -> None:
        super().__init__(config, losses)
        self.loss_share = 1 / num_routers  # the balance loss is the mean over score-routed layers
        self.logit_bias = nn.Parameter(torch.empty(config.moe.num_experts)) if config.moe.router_bias else None
        self.register_buffer("bias", torch.empty(config.moe.num_experts, dtype=torch.float32))
        self.coming: deque[Tensor] = deque()

    def forward(
        self, x: Tensor, input_ids: Tensor, document_ids: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Experts [B, S, K] int64 and their weights [B, S, K] fp32 for hidden states [B, S, M].

        chosen: the experts, if somebody has chosen them; the weights are always those of `x`.
        """
        options = self.options
        scores = router_scores(x, self.weight, self.logit_bias, options.scoring)
        if chosen is None:
            chosen = select(scores.detach() + self.bias, options.top_k, options.num_groups, options.top_k_groups)
        weights = gates(scores, chosen, self.options.routed_scaling_factor)
        if self.training:
            valid = document_ids >= 0
            self.count(chosen, valid)
            balance = sequence_balance_loss(scores, self.options.top_k, valid, self.seams.sequence)
            weight = self.losses.balance_weight * self.loss_share
            weights = self.losses.attach(weights, "balance_loss", balance, weight)
        return chosen, weights

    @torch.no_grad()
    def update_bias(self, load: Tensor, speed: float) -> None:
        """b += speed * sign(mean load - load), over the load of the global batch (V4.md 2.5)."""
        load = load.to(self.bias)
        self.bias += speed * torch.sign(load.mean() - load)


class HashRouter(Router):
    """Experts fixed by token id; the weight is trained all the same, since it gives the gate values."""

    def __init__(self, config: ModelConfig, losses: Losses) -> None:
        super().__init__(config, losses)
        self.register_buffer("table", torch.empty(config.vocab_size, config.moe.top_k, dtype=torch.long))

    def forward(self, x: Tensor, input_ids: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [B, S, K] int64 and their weights [B, S, K] fp32 for hidden states [B, S, M]."""
        scores = router_scores(x, self.weight, None, self.options.scoring)
        chosen = self.table[input_ids]
        if self.training:
            self.count(chosen, document_ids >= 0)
        return chosen, gates(scores, chosen, self.options.routed_scaling_factor)


def balanced_table(vocab_size: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Seeded hash table [vocab_size, K]: K different experts a token, each expert in equally many rows (+-1).

    DeepSeek's own hash is not disclosed (V4.md 0, trap 7). Token v takes K consecutive slots of an endless deal of
    shuffled decks, where a deck that would repeat an expert within a token is dealt with those moved to its end.
    """
    table, hand = torch.empty(vocab_size, top_k, dtype=torch.long, device="cpu"), []
    for token in range(vocab_size):
        carried = hand
        if len(hand) < top_k:
            deck = torch.randperm(num_experts, generator=generator, device="cpu").tolist()
            hand = carried + [e for e in deck if e not in carried] + [e for e in deck if e in carried]
        table[token] = torch.tensor(hand[:top_k], device="cpu")
        hand = hand[top_k:]
    return table[torch.randperm(vocab_size, generator=generator, device="cpu")]
