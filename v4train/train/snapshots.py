"""Copies in main memory of all that training goes on from, on one rank (docs/stability.md)."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from v4train.parallel.engine import EngineSnapshot
from v4train.train.anticipation import Anticipation, Choice
from v4train.train.host_memory import PART, fits
from v4train.train.spike_guard import SpikeDetector

if TYPE_CHECKING:
    from v4train.train.trainer import Trainer

KEPT = 2  # where the newer one is broken already there is an older one

logger = logging.getLogger("v4train")


@dataclass
class Snapshot:
    step: int
    engine: EngineSnapshot
    buffers: dict[str, Tensor]
    loader: dict[str, Any]
    random: Tensor
    validation: dict[str, float]
    detector: dict[str, Any]
    choices: list[Choice]


class Snapshots:
    """The last `KEPT` of a run. Every rank calls the same methods at the same steps."""

    def __init__(self, trainer: "Trainer", detector: SpikeDetector, anticipation: Anticipation) -> None:
        self.trainer, self.detector, self.anticipation = trainer, detector, anticipation
        self._kept: list[Snapshot] = []

    @property
    def steps(self) -> list[int]:
        """That can be gone back to, ascending."""
        return [own.step for own in self._kept]

    def due(self, step: int, every: int) -> bool:
        return not self._kept or step % every == 0 and self._kept[-1].step != step

    def clear(self) -> None:
        self._kept = []

    @torch.no_grad()
    def take(self) -> None:
        """Of the step that the run is at, in the place of the oldest."""
        trainer = self.trainer
        dropped = self._kept.pop(0).engine if len(self._kept) == KEPT else ()
        self._kept.append(
            Snapshot(
                trainer.step,
                trainer.engine.snapshot(into=dropped),
                {name: buffer.to("cpu", copy=True) for name, buffer in trainer.own_buffers()},
                trainer.loader.state_dict(),
                torch.get_rng_state(),
                dict(trainer.validation),
                self.detector.state_dict(),
                self.anticipation.snapshot(),
            )
        )

    @torch.no_grad()
    def put_back(self, step: int) -> None:
        """Go back to that of this step; later ones are forgotten."""
        trainer = self.trainer
        self._kept = [own for own in self._kept if own.step <= step]
        snapshot = self._kept[-1]
        trainer.step, trainer.validation = snapshot.step, dict(snapshot.validation)
        # First, since another phase settles the detector, drops the choices and moves the data's position, all of which
        # is put back below; and freezing drops what ZeRO 1-2 have staged for the groups that the phase leaves alone,
        # which must not come upon their old state afterwards.
        trainer.enter(trainer.plan.at(snapshot.step))
        trainer.engine.roll_back(snapshot.engine)
        for name, buffer in trainer.own_buffers():
            buffer.copy_(snapshot.buffers[name])
        trainer.loader.load_state_dict(snapshot.loader)
        torch.set_rng_state(snapshot.random)
        self.detector.load_state_dict(snapshot.detector)
        self.anticipation.roll_back(snapshot.choices)
        if trainer.metrics is not None:
            trainer.metrics.truncate_after(snapshot.step)


def place_for(trainer: "Trainer") -> str:
    """What `guard.snapshot` comes to: memory or disk. Collective where it is auto, and rank 0 says which and why."""
    asked = trainer.settings.guard.snapshot
    if asked != "auto":
        return asked
    fit, wanted, left = fits(KEPT * trainer.engine.snapshot_bytes())
    if trainer.topology.rank == 0:
        sizes = f"{KEPT} copies take {wanted / 2**30:.1f} of {left / 2**30:.1f} GiB available on a host"
        limit = f"more than {PART:.0%}" if not fit else f"up to {PART:.0%} are used"
        where = "the last checkpoint" if trainer.settings.checkpoint.every else "nothing, as checkpoint.every=0"
        logger.info("a spike goes back to %s: %s (%s; guard.snapshot)", "memory" if fit else where, sizes, limit)
    return "memory" if fit else "disk"
