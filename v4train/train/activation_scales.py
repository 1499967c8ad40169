"""How large each layer's output is in a step: what shows that a weight is broken before any loss does."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from v4train.model import Transformer
from v4train.model.recompute import passes_on


class ActivationScales:
    """Root mean square of what comes out of each block, over a step's tokens (of all streams)."""

    def __init__(self, model: Transformer) -> None:
        self._blocks = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
        self._squares: dict[str, list[Tensor]] = defaultdict(list)  # mean square of each micro-batch

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the passes of a step."""
        self._squares.clear()
        handles = [block.register_forward_hook(self._hook(name)) for name, block in self._blocks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sums(self) -> dict[tuple[str, str], Tensor | float]:
        """Of this rank's part of the step, to be summed over all ranks whose tokens or layers differ."""
        own = self._squares.items()
        squares: dict[tuple[str, str], Tensor | float] = {("square", name): torch.stack(of).sum() for name, of in own}
        return squares | {("number", name): float(len(of)) for name, of in own}

    @staticmethod
    def scales(sums: Mapping[tuple[str, str], float]) -> dict[str, float]:
        """Root mean squares by layer (`blocks.3`), in the model's order, of what `sums` gave in total."""
        found = {
            name: math.sqrt(total / sums["number", name]) for (kind, name), total in sums.items() if kind == "square"
        }
        return dict(sorted(found.items(), key=lambda of: int(of[0].partition(".")[2])))

    def _hook(self, name: str) -> Callable:
        def record(module: nn.Module, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
            if module.training:
                streams = outputs[0].detach()
                norm = torch.linalg.vector_norm(streams, dtype=torch.float32)
                self._squares[name].append(norm.square() / streams.numel())

        return passes_on(record)
