"""What a run does about a spike: back to a snapshot, past the rows that spiked, on with anticipatory routing.

Every rank takes part in all of it, and has the same figures to decide by (spike_guard.py). Rank 0 writes.

<run dir>/events.jsonl  one JSON object for each update that was skipped, each time a run went back, and its end:
                        step (that the run is at afterwards), event, why, seen_at, passed_over (rows)
"""

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from v4train.parallel.engine import EngineSnapshot
from v4train.train import checkpoint
from v4train.train.anticipation import Anticipation, Choice
from v4train.train.distributed import gathered
from v4train.train.metrics import MetricsFile
from v4train.train.signals import SPIKED
from v4train.train.spike_guard import Spike, SpikeGuard

if TYPE_CHECKING:
    from v4train.train.trainer import Trainer

KEPT = 2  # snapshots in memory: where the newer one is broken already there is an older one

logger = logging.getLogger("v4train")


@dataclass
class Snapshot:
    """All that training goes on from, on one rank."""

    step: int
    engine: EngineSnapshot
    buffers: dict[str, Tensor]
    loader: dict[str, Any]
    random: Tensor
    validation: dict[str, float]
    detector: dict[str, Any]
    choices: list[Choice]


class Recovery:
    """Of one run, on one rank: the spike guard's hands."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.config = trainer, trainer.settings.guard
        self.guard = SpikeGuard(self.config)
        self.anticipation = Anticipation(trainer.engine, trainer.loader, trainer.topology)
        self._snapshots: list[Snapshot] = []
        self._events = 0  # lines of events.jsonl

    def prepare(self) -> None:
        """Before a step: take a snapshot where one is due, and choose experts for coming steps."""
        step, config = self.trainer.step, self.config
        due = not self._snapshots or step % config.snapshot_every == 0 and self._snapshots[-1].step != step
        if config.enabled and config.snapshot == "memory" and due and not self.guard.detector.bad:
            del self._snapshots[: 1 - KEPT]  # first, for its memory
            self._snapshots.append(self._snapshot())
        if self.guard.anticipates(step):
            end = self.trainer.plan.next_change(step)
            end = end if config.anticipate == "always" else min(end, self.guard.anticipate_until)
            self.anticipation.look_ahead(min(config.anticipation_steps + 1, end - step))

    def settle(self) -> None:
        """From here on steps are others: another sequence length, batch size, attention mode or loss weight."""
        self.guard.detector.settle()
        self.anticipation.keep(0)

    def figures(self) -> dict[str, Any]:
        """For a step's line of metrics."""
        counts = {"skipped_steps": self.guard.skipped, "rollbacks": self.guard.rollbacks}
        return counts | {"anticipatory": self.anticipation.given}

    def spiked(self, record: dict[str, Any]) -> bool:
        """Whether the step that was taken completes a spike, and the run has gone back to before it.

        Raises SystemExit(SPIKED), in one line, when it has gone back often enough: with a checkpoint to go on from.
        """
        trainer, step = self.trainer, record["step"]
        rows = trainer.loader.batch.total
        first_row = trainer.loader.progress.rows - rows
        figures = (record["loss"], record["grad_norm"], not record["skipped"])
        spike = self.guard.observe(step, *figures, first_row)
        record |= self.figures()
        if record["skipped"]:
            self._note({"step": step, "event": "update skipped", "seen_at": step, "grad_norm": record["grad_norm"]})
        if spike is None:
            return False
        self._recover(spike, step)
        return True

    def _recover(self, spike: Spike, seen_at: int) -> None:
        trainer, guard = self.trainer, self.guard
        ends, rollbacks = guard.exhausted, guard.rollbacks
        rows = [guard.first_row, trainer.loader.progress.rows]
        target = self._go_back(seen_at - spike.steps + 1)
        if target is None:
            self._stop(f"step {seen_at}: {spike.why}; there is no {self.config.snapshot} snapshot to go back to")
        event = {"step": target, "seen_at": seen_at, "why": spike.why}
        if ends:
            guard.gave_up()
            trainer.saving.last = None  # a checkpoint of this step may lie there, with the count as it was
            self._note(event | {"event": "gave up"})
            trainer.save_last()
            self._remove_later(target)
            self._stop(
                f"step {seen_at}: {spike.why}, after going back {rollbacks} times (guard.max_rollbacks); saved at "
                f"step {target}, from where the same command continues: lower the learning rate, or see guard.*"
            )
        guard.went_back(seen_at, target)
        if self.config.skip_data:
            self.anticipation.keep(seen_at - spike.steps - target)
            trainer.loader.pass_over(*rows)
        self._note(event | {"event": "went back", "passed_over": rows if self.config.skip_data else []})
        if trainer.topology.rank == 0:
            logger.warning("step %d: %s; back to step %d, %s", seen_at, spike.why, target, self._plan(seen_at))
        if trainer.settings.checkpoint.every:  # or a kill would bring back what has just been left
            trainer.save()
            if trainer.saving.settle() is None:
                self._remove_later(target)

    def _plan(self, seen_at: int) -> str:
        data = "passing over the rows that spiked" if self.config.skip_data else "to the same rows again"
        until = min(self.guard.anticipate_until, self.trainer.plan.total_steps)
        return data + (f"; anticipatory routing up to step {until}" if until > self.trainer.step else "")

    def _go_back(self, first_bad: int) -> int | None:
        """To a step before this one; None if there is none. Returns the step."""
        if self.config.snapshot == "disk":
            return self._go_back_on_disk(first_bad)
        target = self.guard.choose((own.step for own in self._snapshots), first_bad)
        if target is None:
            return None
        self._snapshots = [own for own in self._snapshots if own.step <= target]
        self._put_back(self._snapshots[-1])
        return target

    def _go_back_on_disk(self, first_bad: int) -> int | None:
        trainer, path = self.trainer, None
        trainer.saving.settle()
        if trainer.topology.rank == 0:
            whole = {checkpoint.step_of(own): own for own in checkpoint.whole(trainer.saving.folder)}
            path = whole.get(self.guard.choose(whole, first_bad))
        path = gathered(path)[0]
        if path is None:
            return None
        guard, events = self.guard.state_dict(), self._events
        reader = checkpoint.Reader(path)
        trainer.restore(reader)
        reader.close()
        detector = self.guard.state_dict()["detector"]
        self.guard.load_state_dict(guard | {"detector": detector})
        self._events = events
        return trainer.step

    @torch.no_grad()
    def _snapshot(self) -> Snapshot:
        trainer = self.trainer
        return Snapshot(
            trainer.step,
            trainer.engine.snapshot(),
            {name: buffer.to("cpu", copy=True) for name, buffer in trainer.own_buffers()},
            trainer.loader.state_dict(),
            torch.get_rng_state(),
            dict(trainer.validation),
            self.guard.detector.state_dict(),
            self.anticipation.snapshot(),
        )

    @torch.no_grad()
    def _put_back(self, snapshot: Snapshot) -> None:
        trainer = self.trainer
        trainer.step, trainer.validation = snapshot.step, dict(snapshot.validation)
        trainer.enter(trainer.plan.at(snapshot.step))
        trainer.engine.roll_back(snapshot.engine)
        for name, buffer in trainer.own_buffers():
            buffer.copy_(snapshot.buffers[name])
        trainer.loader.load_state_dict(snapshot.loader)
        torch.set_rng_state(snapshot.random)
        self.guard.detector.load_state_dict(snapshot.detector)
        self.anticipation.roll_back(snapshot.choices)
        if trainer.metrics is not None:
            trainer.metrics.truncate_after(snapshot.step)

    def _remove_later(self, step: int) -> None:
        """Checkpoints of a future that was left."""
        if self.trainer.topology.rank == 0:
            for path in self.trainer.saving.folder.glob("step_*"):
                if checkpoint.step_of(path) > step:
                    shutil.rmtree(path, ignore_errors=True)

    def _note(self, event: dict[str, Any]) -> None:
        self._events += 1
        if self.trainer.topology.rank == 0:
            with MetricsFile(self.trainer.directory.events) as file:
                file.write(event)
            self.trainer.tracker.log({"rollbacks": self.guard.rollbacks, "event": event["event"]}, event["seen_at"])

    def _stop(self, text: str) -> None:
        """End the run on every rank, which rank 0 explains."""
        if self.trainer.topology.rank == 0:
            print(f"error: {text}", file=sys.stderr, flush=True)
            logger.error("%s", text, extra={"drawn": True})  # log.txt has it too
        self.trainer.tracker.finish(exit_code=SPIKED)
        gathered(None)  # not before that is said: torchrun ends all ranks with the first
        raise SystemExit(SPIKED)

    def local_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Tensors of this rank for a checkpoint."""
        return self.anticipation.local_state()

    def state_dict(self) -> dict[str, Any]:
        return self.guard.state_dict() | {"events": self._events, "anticipation": self.anticipation.state_dict()}

    def restore(self, reader: checkpoint.Reader) -> None:
        """Go on from a checkpoint, whose loader state is loaded already. One that older versions wrote has no guard."""
        state = reader.manifest["state"].get("guard")
        self._snapshots = []
        if state is not None:
            self.guard.load_state_dict(state)
            self.guard.detector.begin_anew()
            self._events = state["events"]
            self.anticipation.load(state["anticipation"], reader)

    def cut_events(self) -> None:
        """Leave those events in the file that were before the point the run starts from."""
        path = self.trainer.directory.events
        if self.trainer.topology.rank == 0 and path.is_file():
            with MetricsFile(path) as file:
                file.keep_first(self._events)
