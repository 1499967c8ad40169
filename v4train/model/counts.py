"""Parameter counts of a model, without allocating it."""

import torch

from v4train.model.config import ModelConfig
from v4train.model.transformer import Transformer


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """(total, active for a token) without the MTP block.

    Active leaves out the input embedding and the experts that a token is not sent to, and keeps the output matrix:
    the V4 report's convention (V4.md 1.3: 284 B / 13 B, 1.6 T / 49 B).
    """
    with torch.device("meta"):
        model = Transformer(config)
    total = active = 0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            continue
        total += parameter.numel()
        if ".experts." in name:
            active += parameter.numel() // config.moe.num_experts * config.moe.top_k
        elif config.tie_embedding or not name.startswith("embedding."):
            active += parameter.numel()
    return total, active
