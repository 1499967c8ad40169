"""Pipeline stages: which parts of a model are on which rank, balanced by what they cost."""

from torch import nn

from v4train.analysis.stages import stage_bounds
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
        together = len(model.blocks) + 1  # the head and what follows it
        self.bounds = stage_bounds(model.config, sequence_length, self.count)
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
