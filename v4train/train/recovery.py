"""What a run does about a spike: back to a snapshot, past the rows that spiked, on with anticipatory routing.

Every rank takes part in all of it, and has the same figures to decide by (spike_guard.py). Rank 0 writes.

<run dir>/events.jsonl  one JSON object for each update that was skipped, each outlier that was let pass, each time a
                        run went back, the end of anticipatory routing after that, and the run's:
                        step (that the run is at afterwards), event, why, seen_at, passed_over (rows)
"""

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from v4train.train import checkpoint
from v4train.train.anticipation import Anticipation
from v4train.train.distributed import gathered
from v4train.train.metrics import MetricsFile
from v4train.train.phases import Stage
from v4train.train.signals import SPIKED
from v4train.train.snapshots import Snapshots, place_for
from v4train.train.spike_guard import Spike, SpikeGuard

if TYPE_CHECKING:
    from v4train.train.trainer import Trainer

logger = logging.getLogger("v4train")


class Recovery:
    """Of one run, on one rank: the spike guard's hands."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.config = trainer, trainer.settings.guard
        self.guard = SpikeGuard(self.config)
        self.anticipation = Anticipation(trainer.engine, trainer.loader, trainer.topology)
        self.snapshots = Snapshots(trainer, self.guard.detector, self.anticipation)
        self._place = place_for(trainer) if self.config.enabled else "disk"
        self._events = 0  # lines of events.jsonl
        self._put_off = False  # a checkpoint is due

    def prepare(self) -> None:
        """Before a step: take a snapshot where one is due, and choose experts for coming steps."""
        trainer, config, guard = self.trainer, self.config, self.guard
        step = trainer.step
        watches = config.enabled and self._place == "memory" and not guard.detector.bad
        if watches and self.snapshots.due(step, config.snapshot_every):
            self.snapshots.take()
        if config.anticipate == "after_spike" and step == guard.anticipate_until > 0:
            self._note({"step": step, "event": "anticipation ended", "seen_at": step})
        if guard.anticipates(step) and trainer.stage.attention_mode != "indexer_warmup":  # where routers don't learn
            end = self._change_of_rows(step)
            end = end if config.anticipate == "always" else min(end, guard.anticipate_until)
            self.anticipation.look_ahead(min(config.anticipation_steps + 1, end - step))

    def begin(self) -> None:
        """Before the first step here: where a spike goes back to checkpoints there is to be one from before it."""
        trainer = self.trainer
        if self.config.enabled and self._place == "disk" and trainer.settings.checkpoint.every:
            if not gathered(trainer.topology.rank == 0 and any(checkpoint.whole(trainer.saving.folder)))[0]:
                trainer.save()

    def enter(self, before: Stage, stage: Stage) -> None:
        """From here on steps may be of another kind."""
        if _kind(before) != _kind(stage):
            self.guard.detector.settle()
        if self._rows(before) != self._rows(stage):
            self.anticipation.keep(0)

    def _rows(self, stage: Stage) -> tuple:
        """What the experts that are chosen beforehand depend on."""
        return (*_kind(stage), stage.global_batch_size, self.trainer.settings.micro_batch(stage))

    def _change_of_rows(self, step: int) -> int:
        """The first step after `step` whose experts must be chosen anew by then, or the run's end."""
        plan = self.trainer.plan
        end = plan.next_change(step)
        while end < plan.total_steps and self._rows(plan.at(end)) == self._rows(plan.at(step)):
            end = plan.next_change(end)
        return end

    def lets_save(self, due: bool) -> bool:
        """Whether to write the checkpoint that is due, now or since earlier: not where a spike may have begun."""
        due = due or self._put_off
        self._put_off = due and self.guard.detector.bad > 0
        return due and not self._put_off

    def figures(self) -> dict[str, Any]:
        """For a step's line of metrics."""
        counts = {"skipped_steps": self.guard.skipped, "rollbacks": self.guard.rollbacks}
        return counts | {"outliers": self.guard.outliers, "anticipatory": self.anticipation.given}

    def spiked(self, record: dict[str, Any]) -> bool:
        """Whether the step that was taken completes a spike, and the run has gone back to before it.

        Raises SystemExit(SPIKED), in one line, when it has gone back often enough: with a checkpoint to go on from.
        """
        trainer, step = self.trainer, record["step"]
        stage, plan = trainer.stage, trainer.plan
        first_row = trainer.loader.progress.rows - trainer.loader.batch.total
        # What the weights of other losses, which phases change, don't enter
        loss = record["indexer_kl" if stage.attention_mode == "indexer_warmup" else "lm_loss"]
        last = step < plan.total_steps and _kind(plan.at(step)) != _kind(stage)
        finite, activations = not record["skipped"], trainer.activations
        spike = self.guard.observe(step, loss, record["grad_norm"], finite, first_row, last, activations)
        record |= self.figures()
        if record["skipped"]:
            self._note({"step": step, "event": "update skipped", "seen_at": step, "grad_norm": record["grad_norm"]})
        if spike is None:
            if why := " and ".join(self.guard.detector.reasons):
                self._note({"step": step, "event": "outlier", "seen_at": step, "why": why})
            return False
        self._recover(spike, step)
        return True

    def _recover(self, spike: Spike, seen_at: int) -> None:
        trainer, guard = self.trainer, self.guard
        ends, rollbacks, gaps = guard.exhausted, guard.rollbacks, trainer.loader.gaps
        rows = [guard.first_row, trainer.loader.progress.rows] if self.config.skip_data else []
        target = self._go_back(seen_at - spike.steps + 1)
        if target is None:
            self._note({"step": seen_at, "event": "gave up", "seen_at": seen_at, "why": spike.why, "passed_over": []})
            self._stop(
                f"step {seen_at}: {spike.why}; there is no snapshot to go back to: set a smaller checkpoint.every, or "
                "guard.snapshot=memory"
            )
        # That rows are passed over was decided since, and is no part of the position that was gone back to
        for gap in sorted([*gaps, rows] if rows else gaps):
            self._pass_over(*gap)
        self._put_off = False
        event = {"step": target, "seen_at": seen_at, "why": spike.why, "passed_over": rows}
        if ends:
            guard.gave_up()
            trainer.saving.last = None  # a checkpoint of this step may lie there, with the count as it was
            self._note(event | {"event": "gave up"})
            trainer.save_last()
            self._remove_later(target)
            self._stop(
                f"step {seen_at}: {spike.why}, after going back {rollbacks} times (guard.max_rollbacks); saved at "
                f"step {target}, from where the same command continues; to lower the learning rate too give "
                f"run.name={trainer.settings.run.name} with it, or see guard.*"
            )
        guard.went_back(seen_at, target)
        self._note(event | {"event": "went back"})
        if trainer.topology.rank == 0:
            logger.warning("step %d: %s; back to step %d, %s", seen_at, spike.why, target, self._plan(seen_at))
        if trainer.settings.checkpoint.every:  # or a kill would bring back what has just been left
            trainer.save()
            if trainer.saving.settle() is None:
                self._remove_later(target)

    def _pass_over(self, first: int, end: int) -> None:
        loader = self.trainer.loader
        if [first, end] not in loader.gaps:
            self.anticipation.keep(loader.steps_before(first))
            loader.pass_over(first, end)

    def _plan(self, seen_at: int) -> str:
        data = "passing over the rows that spiked" if self.config.skip_data else "to the same rows again"
        until = min(self.guard.anticipate_until, self.trainer.plan.total_steps)
        return data + (f"; anticipatory routing up to step {until}" if until > self.trainer.step else "")

    def _go_back(self, first_bad: int) -> int | None:
        """To a step before this one; None if there is none. Returns the step.

        To the newest copy in memory that no spike has led to already, else to the newest such checkpoint; where there
        is none either, as far back as there is anything.
        """
        in_memory, on_disk = self.snapshots.steps, {}
        target = self.guard.choose(in_memory, first_bad)
        if target is None:
            on_disk = self._checkpoints(first_bad)
            target = self.guard.choose(on_disk, first_bad)
        if target is None:
            target = min((step for step in [*in_memory, *on_disk] if step < first_bad), default=None)
        if target in in_memory:
            self.snapshots.put_back(target)
        elif target is not None:
            self._go_back_on_disk(on_disk[target])
        return target

    def _checkpoints(self, first_bad: int) -> dict[int, Path]:
        """By step, from before step `first_bad`, newest first up to one that no spike has led to already."""
        self.trainer.saving.settle()
        found: dict[int, Path] = {}
        if self.trainer.topology.rank == 0:
            for path in checkpoint.whole(self.trainer.saving.folder):
                step = checkpoint.step_of(path)
                if step < first_bad and not _suspect(path):
                    found[step] = path
                    if self.guard.choose([step], first_bad) is not None:
                        break
        return gathered(found)[0]

    def _go_back_on_disk(self, path: Path) -> None:
        guard, events = self.guard.state_dict(), self._events
        reader = checkpoint.Reader(path)
        self.trainer.restore(reader)
        reader.close()
        detector = self.guard.state_dict()["detector"]
        self.guard.load_state_dict(guard | {"detector": detector})
        self._events = events

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
        of_guard = self.guard.state_dict() | {"kind": list(_kind(self.trainer.last_stage))}
        return of_guard | {"events": self._events, "anticipation": self.anticipation.state_dict()}

    def restore(self, reader: checkpoint.Reader) -> None:
        """Go on from a checkpoint, whose loader state is loaded already. One that older versions wrote has no guard."""
        state = reader.manifest["state"].get("guard")
        self.snapshots.clear()
        self.anticipation.roll_back([])
        if state is None:
            return
        self.guard.load_state_dict(state)
        self.guard.detector.begin_anew()
        if state.get("kind") != list(_kind(self.trainer.stage)):  # absent: of an older version, with another loss
            self.guard.detector.settle()
        self._events = state["events"]
        if self.guard.anticipates(self.trainer.step):
            self.anticipation.load(state["anticipation"], reader)

    def begin_run(self) -> None:
        """What another run has noted and gone back from is not this one's."""
        self._events = 0
        self.guard.gave_up()

    def cut_events(self) -> None:
        """Leave those events in the file that were before the point the run starts from."""
        path = self.trainer.directory.events
        if self.trainer.topology.rank == 0 and path.is_file():
            with MetricsFile(path) as file:
                file.keep_first(self._events)


def _kind(stage: Stage) -> tuple[int, str]:
    """Steps of one kind have losses and gradients that can be compared."""
    return stage.sequence_length, stage.attention_mode


def _suspect(path: Path) -> bool:
    """Whether a checkpoint was written with outliers just before: at a signal, say."""
    guard = checkpoint.read_manifest(path)["state"].get("guard")  # absent: of an older version
    return guard is not None and guard["detector"]["outliers"] > 0
