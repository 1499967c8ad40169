"""Expert balance: the sequence-wise loss and the load statistic (V4.md 2.5; V3 report eqs. 17-20)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from v4train.model.seams import Sequence

WHOLE = Sequence()


def sequence_balance_loss(scores: Tensor, top_k: int, valid: Tensor, sequence: Sequence = WHOLE) -> Tensor:
    """sum_e f_e P_e of each row, averaged over rows; 1 when perfectly balanced.

    f_e = E / (K T) * #{t: e in the top-K of the UNBIASED affinities}, without gradient;
    P_e = mean over t of affinity_e / sum of affinities. T counts the row's valid tokens.

    Args:
        scores: [B, S, E] fp32 affinities.
        valid: [B, S] bool, False on padding.
        sequence: which tokens of each row these are; the sums are over all of them.

    Returns:
        Scalar fp32.
    """
    num_experts = scores.shape[-1]
    tokens = sequence.total(valid.sum(1, keepdim=True)).clamp(min=1)
    chosen = scores.detach().topk(top_k, dim=-1).indices
    counts = torch.zeros_like(scores[:, 0]).scatter_add_(
        1, chosen.flatten(1), valid[..., None].expand_as(chosen).flatten(1).to(scores.dtype)
    )
    frequency = sequence.total(counts) * num_experts / (top_k * tokens)
    share = scores / scores.sum(-1, keepdim=True)
    mean_share = sequence.total((share * valid[..., None]).sum(1)) / tokens
    return (frequency * mean_share).sum(-1).mean()


def max_violation(load: Tensor) -> Tensor:
    """max_e load_e / mean load - 1, the imbalance of one layer (arXiv 2408.15664): [E] -> scalar fp32."""
    load = load.float()
    return load.max() / _mean(load) - (load.sum() > 0).float()


def relative_loads(loads: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Load of each expert over the mean of its layer, to three decimals, for the log: [E] by router's name."""
    return {name: [round(x, 3) for x in (load / _mean(load.float())).tolist()] for name, load in loads.items()}


def _mean(load: Tensor) -> Tensor:
    """Of the experts; 1 where none has any."""
    mean = load.mean()
    return torch.where(mean > 0, mean, 1.0)
