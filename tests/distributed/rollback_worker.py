"""training_worker.py, where runs whose name begins with `spoilt` are spoilt on the way and go back.

At some steps everything that a rank trains on is changed behind the step, and the detector sees a spike, once each.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed import training_worker
from v4train.train.recovery import Recovery
from v4train.train.snapshots import KEPT, Snapshots
from v4train.train.spike_guard import Spike

SPOILT = {3: 2, 8: 2}  # the step after which it happens, and how many steps that makes bad
IN_PHASES = {3: 2, 7: 4, 10: 4}  # back over a change of the batch, into the phase before, and from the last into that

spiked, take = Recovery.spiked, Snapshots.take


def spoilt_at(name: str) -> dict[int, int]:
    """Of a run."""
    return IN_PHASES if "phases" in name else SPOILT


def spoil_once(recovery: Recovery, record: dict[str, Any]) -> bool:
    trainer, step = recovery.trainer, record["step"]
    done = trainer.__dict__.setdefault("spoilt", set())
    name = trainer.settings.run.name
    if name.startswith("spoilt") and step in spoilt_at(name).keys() - done:
        done.add(step)
        spoil(trainer)
        recovery.guard.detector.observe = lambda *figures: Spike(spoilt_at(name)[step], "spoilt")
        try:
            return spiked(recovery, record)
        finally:
            del recovery.guard.detector.observe
    return spiked(recovery, record)


@torch.no_grad()
def spoil(trainer: Any) -> None:
    """Weights, optimizer state, router biases and random numbers."""
    for holder, state in trainer.engine._held_states():
        holder.data.mul_(1.5)
        for tensor in state.values():
            tensor.add_(1)
    trainer.engine._state.finish()
    for name, buffer in trainer.own_buffers():
        if name.endswith("bias"):
            buffer.add_(torch.arange(len(buffer)))
    torch.manual_seed(99)


def take_in_place(snapshots: Snapshots) -> None:
    """The copy that is dropped leaves its memory to the new one."""
    dropped = set(_tensors(snapshots, 0)) if len(snapshots.steps) == KEPT else set()
    take(snapshots)
    assert dropped <= set(_tensors(snapshots, -1))
    if snapshots.trainer.step:  # the optimizer has its state
        size = sum(tensor.nbytes for tensor in _tensors(snapshots, -1).values())
        assert 0.5 < size / snapshots.trainer.engine.snapshot_bytes() < 1.5  # what is frozen has none


def _tensors(snapshots: Snapshots, number: int) -> dict[int, torch.Tensor]:
    """Of a copy, by address."""
    engine = snapshots._kept[number].engine
    return {tensor.data_ptr(): tensor for weight, state in engine for tensor in (weight, *state.values())}


if __name__ == "__main__":
    Recovery.spiked, Snapshots.take = spoil_once, take_in_place
    training_worker.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
