"""Where the time of a training step goes: data, forward, backward, optimizer, and waiting for other ranks.

Parts nest and none counts what another inside it counts, so they sum to the time inside any of them. Time on a GPU is
that of its current stream, between events that are read once a step, when it has been waited for anyway.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from v4train.train.distributed import all_sum_tensor

BLOCKING = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "send",
    "recv",
    "barrier",
)
PARTS = ("data", "forward", "backward", "optimizer", "wait")


class StepTimes:
    """Stop-watch of this rank's steps."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._running: list[str] = []
        self._marks: list[tuple[Any, str | None]] = []  # a moment, and the part that ran until then

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time is `name`'s, but for that of parts inside."""
        self._mark()
        self._running.append(name)
        try:
            yield
        finally:
            self._mark()
            self._running.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """`function` as a part called so."""

        @wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return within

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        marks, self._marks = self._marks, []
        if self._on_device and marks:
            marks[-1][0].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (before, _), (after, name) in zip(marks, marks[1:], strict=False):
            if name is not None:
                seconds[name] += before.elapsed_time(after) / 1e3 if self._on_device else after - before
        return {name: seconds[name] for name in PARTS}

    def _mark(self) -> None:
        if self._on_device:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((moment, self._running[-1] if self._running else None))


@contextmanager
def timing_waits(times: StepTimes) -> Iterator[None]:
    """Inside, whatever waits for a collective or a message of torch.distributed is the part `wait`.

    On a CPU all of torch 2.13's, blocking or not, wait in `Work.wait`. On a GPU the stream waits, there or, for those
    that block, within the function itself.
    """
    originals = [(dist.Work, "wait", dist.Work.wait), *((dist, name, getattr(dist, name)) for name in BLOCKING)]
    for owner, name, original in originals:
        setattr(owner, name, times.timed("wait", original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def over_ranks(own: dict[str, float], seconds: float, device: torch.device) -> dict[str, Any]:
    """Mean of each part over the ranks, and of several ranks the one that was busy longest. Collective.

    Args:
        own: from `StepTimes.take`.
        seconds: of the whole step so far, on this rank. What it didn't wait it was busy.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    table = torch.zeros(world, len(PARTS) + 1, dtype=torch.float64, device=device)
    table[rank] = torch.tensor([*own.values(), seconds - own["wait"]], dtype=torch.float64)
    table = all_sum_tensor(table).cpu() if world > 1 else table.cpu()
    result: dict[str, Any] = {
        f"{name}_seconds": value for name, value in zip(PARTS, table.mean(0).tolist(), strict=False)
    }
    if world > 1:
        busy = table[:, -1]
        result["slowest_rank"] = int(busy.argmax())
        result["slowest_rank_excess"] = float(busy.max() / busy.mean() - 1)  # share of the mean that it was busy longer
    return result
