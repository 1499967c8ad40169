"""Context parallelism: each rank of a group has a shard of every row, S of its C S tokens, in order (V4.md 5).

A query needs tokens of earlier shards: those of its window, those that its compression block began with, and all
entries. The first two come from the rank before; entries, and tokens where a query sees the whole document, are
gathered. Documents are known for the whole row, so that every rank lays it out alike.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from v4train.model.seams import Sequence
from v4train.parallel.collectives import Group, from_previous, gather, gathered, total


class Shards(Sequence):
    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._documents: tuple[Tensor, Tensor] | None = None  # of a shard and its row, as last gathered

    def begin(self, length: int) -> int:
        return self.rank * length

    def whole(self, document_ids: Tensor) -> Tensor:
        if self._documents is None or self._documents[0] is not document_ids:
            self._documents = document_ids, gathered(document_ids, 1, self.group)
        return self._documents[1]

    def before(self, x: Tensor, count: int | None, dim: int) -> Tensor:
        if count == 0:
            return x
        length = x.shape[dim]
        if count is None or count > length:
            begin = self.begin(length)
            first = 0 if count is None else max(0, begin - count)
            return gather(x, dim, self.group).narrow(dim, first, begin + length - first)
        x = x.movedim(dim, 0)
        tail = from_previous(x[length - count :], self.group)
        return torch.cat([tail, x]).movedim(0, dim)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        return gather(x, dim, self.group)

    def total(self, x: Tensor) -> Tensor:
        return total(x, self.group)
