"""The training loop: next batch, step, log, validate, save (DESIGN, "How a run flows")."""

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from v4train.analysis.flops import training_flops_per_token
from v4train.config import Settings
from v4train.data import Batch, BatchConfig, Loader
from v4train.model import Transformer
from v4train.model.losses import Recorded, share
from v4train.model.moe.balance import relative_loads
from v4train.parallel.engine import Engine
from v4train.train import checkpoint
from v4train.train.activation_scales import ActivationScales
from v4train.train.balance import Balance
from v4train.train.distributed import all_max, all_sum, gathered
from v4train.train.evaluation import Evaluation, RunData
from v4train.train.feed import Feed
from v4train.train.hang_watch import HangWatch
from v4train.train.heartbeat import Heartbeat
from v4train.train.layer_statistics import LayerStatistics
from v4train.train.metrics import MetricsFile
from v4train.train.phases import Stage
from v4train.train.profiler import StepProfiler
from v4train.train.progress import Progress
from v4train.train.recovery import Recovery
from v4train.train.run_directory import RunDirectory
from v4train.train.saving import Saving
from v4train.train.signals import REQUEUE, StopRequest
from v4train.train.step_times import StepTimes, over_ranks, timing_waits
from v4train.train.tracking import Tracker
from v4train.train.validation import Validation

logger = logging.getLogger("v4train")


class Trainer:
    """One run on one rank. Every rank calls the same methods in the same order; rank 0 writes.

    Args:
        peak_flops: FLOP/s that `mfu` is a share of, over all ranks.
        deadline: when to stop as for a signal, on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        settings: Settings,
        model: Transformer,
        engine: Engine,
        data: RunData,
        directory: RunDirectory,
        tracker: Tracker,
        heartbeat: Heartbeat,
        peak_flops: float,
        deadline: float | None = None,
    ) -> None:
        self.settings, self.train, self.topology = settings, settings.train, settings.topology
        self.model, self.engine, self.plan = model, engine, settings.plan
        self.corpus, self.tokenizer = data.corpus, data.tokenizer
        self.directory, self.tracker, self.heartbeat = directory, tracker, heartbeat
        self.stage = self.plan.at(0)  # of the step under way, or the last
        length, batch = self.stage.sequence_length, self._batch(self.stage)
        self.loader = Loader(self.corpus, settings.data, self.tokenizer, length, batch, settings.seed)
        self.feed = Feed(self.loader, self.topology)
        # Of ranks with the same tokens one counts
        self.counts = not self.topology.index("tensor")
        self.saving = Saving(directory.checkpoints, settings.checkpoint, self.topology.rank)
        self.step = 0
        self.deadline = deadline
        self.interrupted = self.dry = False  # dry: the data have ended
        self.validation: dict[str, float] = {}
        self.validator = Validation(settings, engine, self.corpus, self.tokenizer, lambda: self._beat("validating"))
        self.evaluation = Evaluation(settings, engine, data, lambda: self._beat("evaluating"))
        self.balance = Balance(model, self.topology)
        self.metrics = MetricsFile(directory.metrics) if self.topology.rank == 0 else None
        parts = {
            "data": (self.loader, "next_step"),
            "normalisation": (self, "_set_normalisation"),
            "engine": (engine, "train"),
            "optimizer": (engine, "step"),
            "routers": (self.balance, "update"),
        }
        profiled = self.train.profile if self.topology.rank == 0 else None
        self.profiler = StepProfiler(profiled, directory.profile, model, parts)
        self.times = StepTimes(self.topology.device)
        engine.time_parts(self.times.timed)
        sizes = {name: shape.numel() for name, shape in engine.layout.shapes.items()}
        self.scales = ActivationScales(model)
        self.activations: dict[str, float] = {}  # root mean square of each layer's output in the last step
        self.layers = LayerStatistics(model, sizes, self.counts, self.topology.device)
        place = (self.topology.rank, self.topology.world_size)
        self.hang_watch = HangWatch(directory.stacks, *place, self.train.hang_timeout)
        self.peak_flops = peak_flops
        self.flops_per_token = training_flops_per_token(settings.model, length, self.stage.attention_mode)
        self.recovery = Recovery(self)
        self._set_attention_mode(self.stage.attention_mode)
        self._set_weights(self.stage)

    @property
    def last_step(self) -> int:
        """Step at which this process ends: the run's length, or train.stop_at_step."""
        return min(self.plan.total_steps, self.train.stop_at_step or self.plan.total_steps)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train, as opposed to a pause."""
        return self.step >= self.plan.total_steps or self.dry

    @property
    def last_stage(self) -> Stage:
        """Of the last step that the weights have seen: `stage` may be the next one's, after going back."""
        return self.plan.at(max(0, self.step - 1))

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all ranks."""
        return self.loader.progress.tokens

    def fit(self) -> None:
        """Train to `last_step`, or to the step edge after a signal; then validate and save."""
        validated = self.validation.get("step")
        progress = Progress(self.plan.total_steps, self.step, self.topology.rank)
        with (
            progress,
            StopRequest(self.deadline) as stop,
            self.profiler,
            timing_waits(self.times),
            self.hang_watch,
            self.saving,
        ):
            self.recovery.begin()
            while self.step < self.last_step and not self.interrupted:
                with self.profiler.step(self.step + 1):
                    record = self.train_step(stop)
                if record is None:
                    progress.note(f"the data have ended after step {self.step}: data.epochs, data.when_dry")
                    break
                if self.recovery.spiked(record):
                    continue
                progress.update(self.step, record["loss"], record["tokens_per_second"], lr=record["lr"])
                if self.step % self.train.log_every == 0 or self.step == self.last_step or self.interrupted:
                    self.log(record)
                if _due(self.step, self.train.validate_every):
                    self.validate(progress)
                    validated = self.step
                if _due(self.step, self.train.evaluate_every):
                    self.log({"step": self.step, "tokens": self.tokens, **self.evaluation.figures(self.stage)})
                due = _due(self.step, self.settings.checkpoint.every) or self.saving.retry
                if self.recovery.lets_save(due) and self.step < self.last_step and not self.interrupted:
                    self.save()
            if validated != self.step and not self.interrupted:
                self.validate(progress)
            progress.note(f"checkpoint {self.save_last()}")
            for line in self.feed.left_out():
                progress.note(line)
            if self.interrupted:
                why = "a signal" if stop.signalled else "train.max_minutes, or another rank's signal"
                progress.note(f"stopped by {why} after step {self.step}; the same command continues from there")

    def train_step(self, stop: StopRequest) -> dict[str, Any] | None:
        """One optimizer step on the global batch; returns what is logged of it. None where the data have ended."""
        started = time.perf_counter()
        self._beat("training")
        self.times.take()  # what validation left
        self.enter(self.plan.at(self.step))
        self.recovery.prepare()
        self.model.train()
        with self.times.part("data"):
            batches = self.feed.next_batches()
        if batches is None:
            self.dry = True
            return None
        self._set_normalisation(batches)
        self.recovery.anticipation.give()
        looks_inside = _due(self.step + 1, self.train.layers_every)
        with self.scales.measuring(), self.layers.measuring() if looks_inside else nullcontext():
            recorded = self.engine.train(batches)
            with self.times.part("optimizer"):
                result = self.engine.step(self.stage.learning_rate)
        if not result.finite:
            logger.warning("step %d: the gradient is not finite; the update is skipped", self.step + 1)
        learning = result.finite and self.stage.attention_mode != "indexer_warmup"  # the routers too
        loads = self.balance.update(self.stage.bias_update_speed if learning else 0.0)
        self.step += 1
        times = over_ranks(self.times.take(), time.perf_counter() - started, self.topology.device)
        values, data, stopping = self._over_ranks(recorded, stop.requested)
        inside = {}
        if looks_inside:
            inside = {"layers": self.layers.take(self.activations), "expert_load": relative_loads(loads)}
        self.loader.count(data)
        progress = self.loader.progress
        self.interrupted = stopping and self.step < self.last_step
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "tokens": self.tokens,
            **values,
            "lr": self.stage.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": not result.finite,
            "tokens_per_second": self.stage.tokens / seconds,
            "mfu": self.stage.tokens / seconds * self.flops_per_token / self.peak_flops,
            "memory_gib": all_max(_peak_memory_gib(self.topology.device), self.topology.device),
            **self.balance.figures(loads),
            "phase": self.stage.index,
            "phase_name": self.stage.name,
            "attention_mode": self.stage.attention_mode,
            "sequence_length": self.stage.sequence_length,
            "global_batch_size": self.stage.global_batch_size,
            "data_tokens": dict(progress.by_source),
            "batch_tokens": {name[len("tokens/") :]: int(n) for name, n in data.items() if name.startswith("tokens/")},
            "data_hash": progress.data_hash,
            "epoch": self.feed.epochs(),
            "padding": progress.padding / max(1, progress.tokens),
            "truncated": progress.truncated / max(1, progress.documents),
            "step_seconds": seconds,
            **times,
            **inside,
        }

    def enter(self, stage: Stage) -> None:
        """Between steps, on every rank: make the data, the engine and the model what the next step needs."""
        before, self.stage = self.stage, stage
        if stage.index != before.index:
            logger.info("from step %d on: phase %d, %s", self.step + 1, stage.index, stage.name)
        batch = self._batch(stage)
        if (stage.sequence_length, batch) != (self.loader.sequence_length, self.loader.batch):
            self.loader.load_state_dict(self.feed.state())  # its rows may lie in other lanes
            self.loader.set_batch(batch)
            self.loader.set_sequence_length(stage.sequence_length)
            self.engine.set_batch(batch.micro, self.accumulation)
        work = (stage.sequence_length, stage.attention_mode)
        if work != (before.sequence_length, before.attention_mode):
            self.flops_per_token = training_flops_per_token(self.settings.model, *work)
        if stage.attention_mode != before.attention_mode:
            self._set_attention_mode(stage.attention_mode)
        self._set_weights(stage)
        self.recovery.enter(before, stage)

    def _batch(self, stage: Stage) -> BatchConfig:
        """This rank's rows of its steps."""
        sizes = (stage.global_batch_size, self.settings.micro_batch(stage))
        return BatchConfig(*sizes, self.topology.index("data"), self.topology.sizes.data)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.loader.batch.total // (self.loader.batch.micro * self.loader.batch.world)

    def _set_weights(self, stage: Stage) -> None:
        self.model.losses.mtp_weight, self.model.losses.balance_weight = stage.mtp_weight, stage.balance_weight

    def _beat(self, doing: str) -> None:
        """This rank has got on."""
        self.hang_watch.beat()
        self.heartbeat.beat(self.step, doing)

    def _over_ranks(self, recorded: Recorded, stop: bool) -> tuple[dict[str, float], dict[str, float], bool]:
        """Of a step, over all ranks: what is logged of its losses, the loader's counts, and whether to stop.

        Sets `activations`, too.
        """
        flags = {"stop": stop, **self.saving.flags()}
        values: dict[Any, Any] = {("flag", name): float(flag) for name, flag in flags.items()}
        values |= {("data", name): count for name, count in self.feed.own_counts().items()}
        if self.counts:
            values |= {(name, "sum"): total for name, total in recorded.sums.items()}
            values |= {(name, "count"): count for name, count in recorded.counts.items()}
            values |= {(name, i): part for name, pair in recorded.shares.items() for i, part in enumerate(pair)}
            values |= {("activations", name): value for name, value in self.scales.sums().items()}
        differ = self.topology.sizes.tensor * self.topology.sizes.pipeline > 1
        sums = all_sum(values, self.topology.device, same_names=not differ)
        agreed = {name: sums.pop(("flag", name)) > 0 for name in flags}
        self.saving.agreed(agreed)
        data = {name: sums.pop(("data", name)) for name in self.loader.counts}
        own = [name for kind, name in sums if kind == "activations"]
        self.activations = self.scales.scales({name: sums.pop(("activations", name)) for name in own})
        means = {name: total / sums[name, "count"] for (name, of), total in sums.items() if of == "sum"}
        parts = {name: part for (name, of), part in sums.items() if of == 0}
        shares = {name: share(part, sums[name, 1]).item() for name, part in parts.items()}
        return means | shares, data, agreed["stop"]

    def validate(self, progress: Progress) -> None:
        """Log what held-out text says."""
        self.validation = {"step": self.step, **self.validator.figures(self.stage)}
        progress.note(
            f"step {self.step}: validation loss {self.validation['val_loss']:.4f} nats/token, "
            f"{self.validation['val_bits_per_byte']:.4f} bits/byte, "
            f"{self.validation['val_gain_over_unigram']:.4f} below the unigram entropy "
            f"{self.validation['unigram_entropy']:.4f}"
        )
        self.log({"tokens": self.tokens, **self.validation})

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to W&B."""
        if self.metrics is not None:
            self.metrics.write(record)
            self.tracker.log(record, self.step)

    def save(self) -> None:
        """Begin to write a checkpoint of everything that the next step depends on (DESIGN 10); training may go on."""
        self._beat("saving")
        state = {
            "tokens": self.tokens,
            "loader": self.feed.state(),
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
            "validation": self.validation,
            "attention_mode": self.last_stage.attention_mode,
            "history": self.plan.history(self.step),
            "guard": self.recovery.state_dict(),
            "wandb_id": self.tracker.run_id,
            "config": self.settings.resolved,
            "layout": asdict(self.topology.sizes),
        }
        own = {name: buffer.detach().cpu() for name, buffer in self.own_buffers()}
        first = not any(self.topology.index(axis) for axis in ("data", "tensor", "context"))  # of a pipeline stage
        tensors = chain(self.engine.local_state(), self.recovery.local_state())
        self.saving.begin(self.step, tensors, own if first else {}, state)
        if self.metrics is not None:
            self.metrics.flush()

    def own_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that are here: router biases and hash tables, by canonical name."""
        return ((name, buffer) for name, buffer in self.model.named_buffers() if not buffer.is_meta)

    def save_last(self) -> Path:
        """Have a checkpoint of this step on disk. Raises SystemExit with one line where it can't be written."""
        path, problem = self.saving.finish(self.step, self.save)
        if problem is not None:
            if self.topology.rank == 0:
                print(
                    f"error: checkpoint {path} can't be written ({problem}): the run ends without it; make room, and "
                    "the same command continues from the last one",
                    file=sys.stderr,
                    flush=True,
                )
            gathered(None)  # not before that is said: torchrun ends all ranks with the first
            raise SystemExit(REQUEUE if self.interrupted else 1)
        return path

    def restore(self, reader: checkpoint.Reader) -> None:
        """Continue from a checkpoint: weights, optimizer, router biases, data position, RNG; cut the metrics file."""
        self.engine.load_named_state(reader.parameter)
        saved = reader.buffers()
        with torch.no_grad():
            for name, buffer in self.own_buffers():
                buffer.copy_(saved[name])
        state = reader.manifest["state"]
        self.step = self.saving.last = reader.manifest["step"]
        self.loader.load_state_dict(state["loader"])
        self.enter(self.last_stage)  # as after the step that was saved
        self.recovery.restore(reader)
        self.validation = state["validation"]
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))
        if self.metrics is not None:
            self.metrics.truncate_after(self.step)

    def _set_normalisation(self, batches: list[Batch]) -> None:
        """Make every loss a mean over the global batch (DESIGN 7): the engine averages over ranks and micro-batches."""
        counts: dict[str, Any] = {}
        for batch in batches:
            for name, value in self.model.count(batch.input_ids, batch.document_ids, batch.targets).items():
                counts[name] = counts.get(name, 0) + value
        parts = self.accumulation * self.topology.sizes.replicas
        counts = counts if self.counts and not self.topology.index("pipeline") else dict.fromkeys(counts, 0.0)
        totals = all_sum(counts, self.topology.device)
        self.model.losses.denominators = {name: max(total, 1.0) / parts for name, total in totals.items()}
        self.model.losses.scale = 1 / self.accumulation

    def _set_attention_mode(self, mode: str) -> None:
        """Of the model, and what is frozen in it: the indexers where none is used, all else where they learn alone."""
        self.model.attention_mode = mode
        frozen = {"dense": {True}, "indexer_warmup": {False}, "sparse": set()}[mode]
        self.engine.freeze(group.name for group in self.engine.groups if group.indexer in frozen)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
