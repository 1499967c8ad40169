"""Tensor parallelism: each rank of a group holds a share of the heads, of the inner channels and of the vocabulary.

The ranks have the same tokens and one loss. What they hold whole (norms, routers, mHC, compressors, the shared KV head)
sees the same everywhere, and has the same gradient everywhere because of `copy` at the edge to what is shared out.
"""

import torch.distributed as dist
from torch import Tensor

from v4train.model.seams import Heads, Vocabulary
from v4train.parallel.collectives import Group, copy, gathered, reduce


class SharedOutHeads(Heads):
    def __init__(self, group: Group) -> None:
        self.group = group
        self.index, self.count = dist.get_rank(group), dist.get_world_size(group)

    def copy(self, x: Tensor) -> Tensor:
        return copy(x, self.group) if x.requires_grad else x

    def reduce(self, x: Tensor) -> Tensor:
        return reduce(x, self.group)


class SharedOutVocabulary(SharedOutHeads, Vocabulary):
    def join(self, log_sum_exp: Tensor) -> Tensor:
        return gathered(log_sum_exp[None], 0, self.group).logsumexp(0)

    def gather(self, logits: Tensor) -> Tensor:
        return gathered(logits, -1, self.group).contiguous()
