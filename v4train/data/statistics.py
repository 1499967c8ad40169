"""What a loss is held against: the entropy of token counts, and bytes of text."""

import numpy as np
import torch

from v4train.data.packing import IGNORED_TARGET


def target_counts(targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """int64 [vocab_size]: how often each token is a target (any shape, -100 left out). Counts of batches add up."""
    return torch.bincount(targets[targets != IGNORED_TARGET].flatten(), minlength=vocab_size)


def unigram_entropy(counts: torch.Tensor | np.ndarray) -> float:
    """Nats a target: the loss of the best model that ignores context, on the targets that were counted."""
    p = torch.as_tensor(counts, dtype=torch.float64)
    p = p / p.sum()
    return float(-torch.special.xlogy(p, p).sum())


def target_bytes(targets: torch.Tensor, bytes_per_token: np.ndarray) -> int:
    """UTF-8 bytes of text that the targets (any shape, -100 left out) stand for; a special token stands for none."""
    table = torch.as_tensor(bytes_per_token, device=targets.device)
    return int(table[targets[targets != IGNORED_TARGET]].sum())
