"""Anticipatory routing (V4 report 4.2.3; V4.md 2.9): step t computes with its own parameters, and its tokens go to the
experts that the parameters of step t - D have chosen; the gate values are those of the new parameters.

So batch t is read at step t - D already, and a forward pass without gradients chooses its experts in every score-routed
layer, MTP's too. Where the mode begins, the parameters of that step choose for the D steps to come as well.

Shapes: B batch, S sequence, K experts per token.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from v4train.data import Batch, EndOfData, Loader
from v4train.errors import ConfigError
from v4train.parallel.engine import Engine
from v4train.parallel.slices import Box, Slice
from v4train.parallel.topology import Topology
from v4train.train.checkpoint import ROUTING, Reader
from v4train.train.distributed import all_max

Choice = dict[str, list[Tensor]]  # of a step: by router, [B, S, K] int16 on the CPU of each micro-batch


class Anticipation:
    """The experts chosen for coming steps, on one rank. Every rank calls the same methods at the same steps."""

    def __init__(self, engine: Engine, loader: Loader, topology: Topology) -> None:
        self._engine, self._loader, self._topology = engine, loader, topology
        routers = engine.model.routers()
        self._routed = bool(routers)  # of pipeline stages one may have none
        self._routers = {name: router for name, router in routers.items() if not router.bias.is_meta}
        self._queue: deque[Choice] = deque()  # the next step's first
        self._ended = False  # the data have, before what was looked for
        self.given = False  # whether the last step's experts were chosen beforehand

    @property
    def steps(self) -> int:
        """Coming steps whose experts are chosen."""
        return len(self._queue)

    def look_ahead(self, steps: int) -> None:
        """Choose for all of the next `steps` steps that have no experts yet. Leaves the model in evaluation mode."""
        while self._routed and len(self._queue) < steps and not self._ended:
            batches = self._batches(len(self._queue))
            if batches is None:
                self._ended = True
            else:
                self._queue.append(self._choose(batches))

    def give(self) -> None:
        """Let the routers take the experts that were chosen for the step that is trained now, if there are any."""
        self.given = bool(self._queue)
        for name, chosen in self._queue.popleft().items() if self._queue else ():
            self._routers[name].coming.extend(chosen)

    def keep(self, steps: int) -> None:
        """Forget what was chosen for steps after the next so many: their rows are to be others."""
        while len(self._queue) > steps:
            self._queue.pop()
        self._ended = False

    def snapshot(self) -> list[Choice]:
        return list(self._queue)

    def roll_back(self, snapshot: list[Choice]) -> None:
        self._queue, self._ended = deque(snapshot), False

    def _batches(self, steps: int) -> list[Batch] | None:
        """This rank's micro-batches of the step after so many; None on every rank where one has none."""
        try:
            batches = self._loader.look_ahead(steps)
        except (EndOfData, ConfigError):  # comes again in its turn
            batches = None
        return None if all_max(float(batches is None), self._topology.device) else batches

    def _choose(self, batches: list[Batch]) -> Choice:
        chosen: Choice = {name: [] for name in self._routers}
        hooks = [
            router.register_forward_hook(lambda *args, own=chosen[name]: own.append(args[-1][0].to("cpu", torch.int16)))
            for name, router in self._routers.items()
        ]
        index, count = self._topology.index("context"), self._topology.sizes.context
        self._engine.model.eval()
        try:
            for batch in batches:
                self._engine.validation_loss(batch.shard(index, count, self._topology.device))
        finally:
            for hook in hooks:
                hook.remove()
        return chosen

    def local_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(ROUTING, key, flat int16) for a checkpoint, of what this rank is to save: slices of [rows, tokens, K]."""
        if self._topology.index("tensor"):  # others have the same
            return
        for number, of_step in enumerate(self._queue):
            for name, chosen in of_step.items():
                for box, own in zip(self._boxes(), chosen, strict=True):
                    yield ROUTING, Slice(f"{number}.{name}", box, 0).key(), own.flatten()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **self._shape()}

    def load(self, state: dict[str, Any], reader: Reader) -> None:
        """What was chosen before a checkpoint, by any layout; nothing where steps have another shape by now."""
        steps = state["steps"] if state == {"steps": state["steps"], **self._shape()} else 0
        self.roll_back(
            [
                {name: [reader.routing(f"{number}.{name}", box) for box in self._boxes()] for name in self._routers}
                for number in range(steps)
            ]
        )

    def _shape(self) -> dict[str, int]:
        return {"rows": self._loader.batch.total, "tokens": self._loader.sequence_length}

    def _boxes(self) -> list[Box]:
        """Where in a step's rows and tokens each micro-batch of this rank lies."""
        length = self._loader.sequence_length // self._topology.sizes.context
        begin = self._topology.index("context") * length
        top_k = self._engine.model.config.moe.top_k
        tokens = (slice(begin, begin + length), slice(0, top_k))
        return [(slice(rows.start, rows.stop), *tokens) for rows in self._loader.batch.rows(0)]
