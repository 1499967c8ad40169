"""Pipeline stages: which parts of a model are on which rank, balanced by what they cost."""

from collections.abc import Sequence

from torch import nn

from v4train.analysis.flops import part_flops
from v4train.model import Transformer
from v4train.model.embedding import Embedding
from v4train.parallel.topology import Topology


class Stages:
    """Consecutive parts of `model.parts()` on each stage; head and MTP, which calls it, stay together.

    Attributes:
        bounds: first part of each stage, and one past the last.
        parts: this stage's.
        here: modules whose parameters this stage has: its parts, and the embedding where MTP or the head needs it.
        shared_embedding: the embedding, on the two stages that both have it.
    """

    def __init__(self, model: Transformer, topology: Topology, sequence_length: int) -> None:
        self.count, self.index = topology.sizes.pipeline, topology.index("pipeline")
        flops = part_flops(model.config, sequence_length)
        together = len(model.blocks) + 1  # the head and what follows it
        units = [*flops[:together], sum(flops[together:])]
        self.bounds = balanced(units, self.count)
        all_parts = model.parts()
        self.units = [[part] for part in all_parts[:together]] + [all_parts[together:]]
        self.parts = [
            part for unit in self.units[self.bounds[self.index] : self.bounds[self.index + 1]] for part in unit
        ]
        self.here: list[nn.Module] = list(self.parts)
        self.shared_embedding: Embedding | None = None
        if (model.mtp is not None or model.config.tie_embedding) and (self.first or self.last):
            self.shared_embedding = model.embedding
            self.here += [model.embedding] if self.last else []

    @property
    def copies_embedding(self) -> bool:
        """Whether the embedding here is a copy of the first stage's."""
        return self.shared_embedding is not None and not self.first

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Bounds of `count` runs of consecutive costs, none empty, whose dearest is as cheap as can be."""
    best: list[list[tuple[float, list[int]] | None]] = [[None] * (len(costs) + 1) for _ in range(count + 1)]
    best[0][0] = (0.0, [0])
    for run in range(1, count + 1):
        for stop in range(run, len(costs) + 1):
            choices = [
                (max(before[0], sum(costs[start:stop])), [*before[1], stop])
                for start in range(run - 1, stop)
                if (before := best[run - 1][start]) is not None
            ]
            best[run][stop] = min(choices)
    return best[count][len(costs)][1]
