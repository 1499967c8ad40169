"""From settings to a finished run: what `launch/pretrain.py` calls on every rank."""

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from v4train import durable
from v4train.analysis.parameters import parameter_counts
from v4train.config import Settings
from v4train.data import Source, check_position
from v4train.errors import ConfigError
from v4train.model import build_model
from v4train.model.compiled import compile_model
from v4train.model.precision import has_fast_bf16
from v4train.parallel.deepspeed_config import check_zero_options
from v4train.parallel.engine import Engine
from v4train.parallel.layout import Layout
from v4train.parallel.pipeline import PipelineEngine
from v4train.parallel.topology import start_distributed, stop_distributed
from v4train.report import report
from v4train.report.page import PAGE
from v4train.train import checkpoint
from v4train.train.allocator import keep_freed_memory
from v4train.train.deterministic import make_deterministic
from v4train.train.distributed import gathered
from v4train.train.dry_run import dry_run
from v4train.train.evaluation import RunData, find_data
from v4train.train.heartbeat import Heartbeat
from v4train.train.lost_ranks import give_up, is_lost_peer
from v4train.train.metrics import write_summary
from v4train.train.progress import setup_logging, start_table
from v4train.train.restarts import launch_name, restarts
from v4train.train.run_directory import RunDirectory
from v4train.train.sample import generate
from v4train.train.signals import REQUEUE, StopRequest
from v4train.train.tracking import Tracker
from v4train.train.trainer import Trainer

logger = logging.getLogger("v4train")
T = TypeVar("T")


def pretrain(settings: Settings) -> dict[str, float]:
    """Join the process group, run, leave it: a whole program on this rank. See `run`; raises ConfigError too for what
    DeepSpeed refuses."""
    if settings.train.deterministic:
        make_deterministic()
    # A collective's own end, which leaves no stacks, comes after that by the watch
    start_distributed(settings.topology, timedelta(seconds=max(1800, 2 * settings.train.hang_timeout)))
    try:
        check_zero_options(settings.parallelism.deepspeed, settings.parallelism.zero_stage)
        return run(settings)
    except RuntimeError as error:
        if settings.topology.world_size == 1 or not is_lost_peer(error):
            raise
        give_up(settings.run.dir, settings.topology.rank, error)
    finally:
        stop_distributed()


def run(settings: Settings) -> dict[str, float]:
    """Train `settings` on this rank, from where its checkpoints left it, to the end; returns the final figures.

    Raises:
        ConfigError: the run directory holds another experiment, or must not be touched.
        SystemExit: with code REQUEUE after a signal or `train.max_minutes`, when all is saved.
    """
    if settings.train.dry_run:
        return dry_run(settings)
    started = time.perf_counter()
    minutes = settings.train.max_minutes
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    directory = RunDirectory(settings.run.dir)
    rank, launch = settings.topology.rank, launch_name(os.environ)
    setup_logging(None, rank)
    begin = _on_first_rank(settings, lambda: _find_start(directory, settings, launch))
    start = begin.checkpoint
    reader = checkpoint.Reader(start) if start else None
    if begin.ended:
        logger.info(
            "run %s is finished at step %d: %s\nto start anew: run.overwrite=true, or another run.name=",
            settings.run.name,
            reader.manifest["step"],
            directory.path,
        )
        return reader.manifest["state"]["validation"]
    heartbeat = Heartbeat(directory.heartbeat, rank, settings.topology.world_size)
    step = reader.manifest["step"] if reader else 0
    if begin.continues:
        heartbeat.beat(step, "starting")
    data = _data_of_all_ranks(settings, reader)
    _on_first_rank(settings, lambda: _prepare(directory, settings, launch, begin))
    setup_logging(directory.path, rank)
    heartbeat.beat(step, "starting")
    trainer = make_trainer(settings, data, directory, reader, heartbeat, deadline)
    _show_start(trainer, start, time.perf_counter() - started)
    try:
        trainer.fit()
        heartbeat.beat(trainer.step, "finishing")
        figures = _finish(trainer)
    except BaseException as error:
        stopped = isinstance(error, SystemExit) and error.code == REQUEUE
        heartbeat.beat(trainer.step, "stopped" if stopped else "failed")
        with StopRequest():  # torchrun's SIGTERM, once another rank has failed, would cut this off
            trainer.tracker.finish(REQUEUE if stopped else 1)
        raise
    heartbeat.beat(trainer.step, "finished" if trainer.finished else "stopped")
    return figures


class _Begin(NamedTuple):
    """What a run begins with. overwrite: whether what its folder holds goes; continues: whether it goes on instead;
    ended: whether there is nothing to go on with; held: what the folder held (`RunDirectory.holds`)."""

    checkpoint: Path | None
    overwrite: bool
    continues: bool
    ended: bool
    held: tuple[int, list[str]]


def _data_of_all_ranks(settings: Settings, reader: checkpoint.Reader | None) -> RunData:
    """Nothing was touched so far: what one rank refuses, all do."""
    data, problem = None, None
    try:
        data = find_data(settings)
        if reader:
            check_position(reader.manifest["state"]["loader"], data.corpus, settings.data, settings.seed)
    except ConfigError as error:
        problem = error
    for error in gathered(problem):
        if error is not None:
            raise error
    return data


def _on_first_rank(settings: Settings, work: Callable[[], T]) -> T:
    """What rank 0 gets from work on the run directory; all ranks get its answer, or its error."""
    answer: list[object] = [None]
    if settings.topology.rank == 0:
        try:
            answer[0] = work()
        except ConfigError as error:
            answer[0] = error
        except OSError as error:
            rule = f"it can't be written ({error.strerror or error})"
            answer[0] = ConfigError("run.dir", settings.run.dir, rule, "name a folder that can")
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _find_start(directory: RunDirectory, settings: Settings, launch: str | None) -> _Begin:
    """Writes nothing."""
    held = directory.holds()
    again = restarts(os.environ) > 0 and directory.begun_by(launch)
    overwrite = settings.run.overwrite and not again
    start = directory.find_start(settings.checkpoint.resume, overwrite, settings.resolved, again)
    continues, ended = directory.holds_run() and not overwrite, False
    if start:
        manifest = checkpoint.read_manifest(start)
        step = manifest["step"]
        settings.plan.check_continues(step, manifest["state"].get("history"))
        if continues and step >= settings.plan.total_steps:
            directory.check_ended(start, settings.resolved)
            ended = directory.summary.is_file()
        if step > settings.plan.total_steps and not ended:
            raise _too_short(settings, start, continues)
    return _Begin(start, overwrite, continues, ended, held)


def _too_short(settings: Settings, start: Path, continues: bool) -> ConfigError:
    """Names the key that decides where the run ends, which is before its checkpoint."""
    train, plan = settings.train, settings.plan
    key, value = "schedule.phases", [phase.name for phase in plan.phases]
    if train.max_steps == plan.total_steps:
        key, value = "train.max_steps", train.max_steps
    elif train.max_tokens is not None and plan.total_tokens >= train.max_tokens:
        key, value = "train.max_tokens", train.max_tokens
    rule = f"the run would end at step {plan.total_steps}, before checkpoint {start}"
    other = "use another run.name" if continues else "start from an earlier checkpoint"
    return ConfigError(key, value, rule, f"make it longer, or {other}")


def _prepare(directory: RunDirectory, settings: Settings, launch: str | None, begin: _Begin) -> None:
    """Raises ConfigError where another job has begun in the folder while this one read its data. One that trained there
    before is noticed by its next checkpoint only."""
    if directory.holds() != begin.held:
        rule = "another job has begun or gone on with it meanwhile"
        raise ConfigError("run.dir", directory.path, rule, "run one job at a time in a folder")
    directory.prepare(begin.overwrite, settings.resolved, launch)


def make_trainer(
    settings: Settings,
    data: RunData,
    directory: RunDirectory,
    reader: checkpoint.Reader | None,
    heartbeat: Heartbeat,
    deadline: float | None,
) -> Trainer:
    topology, train = settings.topology, settings.train
    if topology.device.type == "cpu":
        keep_freed_memory()
        if settings.precision == "bf16" and not has_fast_bf16():
            logger.warning("precision=bf16: this CPU has no bf16 instructions, so products are slower than with fp32")
    with torch.device("meta"):
        model = build_model(settings.model)
    layout = Layout(model, topology, train.sequence_length)
    layout.materialise(model)
    model.recompute = train.recompute
    if settings.compile:
        compile_model(model)
    first = settings.plan.at(0)
    micro_batch = settings.micro_batch(first)
    engine = (PipelineEngine if topology.sizes.pipeline > 1 else Engine)(
        model,
        settings.optimizer,
        settings.parallelism,
        topology,
        layout,
        micro_batch_size=micro_batch,
        accumulation_steps=first.global_batch_size // (micro_batch * topology.sizes.data),
        grad_clip=train.grad_clip,
        precision=settings.precision,
    )
    if topology.rank == 0:
        data.tokenizer.save(directory.tokenizer)
    else:
        settings.tracking.mode = "disabled"
    continues = reader and reader.path.parent.resolve() == directory.checkpoints.resolve()  # not another run's
    run_id = reader.manifest["state"]["wandb_id"] if continues else None
    tracker = Tracker(settings.tracking, directory.path, settings.run.name, settings.resolved, run_id)
    peak = matmul_peak(topology.device, settings.precision) * topology.world_size
    trainer = Trainer(settings, model, engine, data, directory, tracker, heartbeat, peak, deadline)
    if reader:
        trainer.restore(reader)
        reader.close()  # what it has mapped takes room on the disk, removed or not
    elif trainer.metrics is not None:
        trainer.metrics.truncate_after(0)  # what a run killed before its first checkpoint left
    if not continues:
        trainer.recovery.begin_run()
    trainer.recovery.cut_events()
    return trainer


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product here and now, the best of a few: what `mfu` is measured against."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _show_start(trainer: Trainer, start: Path | None, seconds: float) -> None:
    if trainer.topology.rank != 0:
        return
    settings, train, topology = trainer.settings, trainer.train, trainer.topology
    total, active = parameter_counts(settings.model)
    sizes = {name: getattr(topology.sizes, name) for name in ("pipeline", "context", "tensor", "expert")}
    others = "".join(f" x {name} {size}" for name, size in sizes.items() if size > 1)
    layout = f"data {topology.sizes.data}{others}, ZeRO {settings.parallelism.zero_stage}, {topology.device.type}"
    split = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in trainer.engine.parameter_counts.items())
    plan = trainer.plan
    phases = plan.lines()
    if len(phases) == 1:
        batch = f"{train.global_batch_size} x {train.sequence_length} tokens a step"
    else:
        batch = f"{len(phases)} phases"
    rows = [
        ("model", f"{settings.model.name}: {' '.join(settings.model.layer_kinds)}"),
        ("parameters", f"{total / 1e6:.2f} M, of which {active / 1e6:.2f} M active for a token"),
        ("data", ", ".join(map(_shown_source, trainer.corpus.sources.values()))),
        ("training", f"{plan.total_steps} steps, {plan.total_tokens:,} tokens, {batch}"),
        *(phases if len(phases) > 1 else []),
        ("layout", f"{layout}, {settings.precision}"),
        ("optimizer", split),
        ("tracking", trainer.tracker.location),
        ("run directory", str(trainer.directory.path)),
        ("start", f"{f'from {start}' if start else 'new run'}, after {seconds:.1f} s"),
    ]
    start_table(rows, f"v4train: {settings.run.name}")


def _shown_source(source: Source) -> str:
    size = "streamed" if source.num_tokens is None else f"{source.num_tokens:,} training tokens"
    return f"{source.name}, {size}"


def _finish(trainer: Trainer) -> dict[str, float]:
    """Sample, plot, summary and the closing lines, unless the run only paused; returns the final figures."""
    if not trainer.finished:
        trainer.tracker.finish(REQUEUE if trainer.interrupted else 0)
        if trainer.interrupted:
            gathered(None)  # rank 0 has done its last: torchrun ends all ranks with the first
            raise SystemExit(REQUEUE)
        return trainer.validation
    text = _sample(trainer)
    summary = {
        "run": trainer.settings.run.name,
        "step": trainer.step,
        "tokens": trainer.tokens,
        **trainer.validation,
    }
    if trainer.topology.rank == 0:
        directory = trainer.directory
        _report(trainer)
        trainer.tracker.summary(summary)
        trainer.tracker.artifact("checkpoint", directory.checkpoints / f"step_{trainer.step:08d}", trainer.step)
        trainer.tracker.artifact("tokenizer", directory.tokenizer, trainer.step)
        _show_end(trainer, text)
        with durable.optional(directory.summary):
            write_summary(directory.summary, summary)  # last: a run that has one is finished
    trainer.tracker.finish()
    gathered(None)  # rank 0 has done its last: srun --wait ends what still runs a minute after the first rank
    return trainer.validation


def _report(trainer: Trainer) -> None:
    """Page and pictures under report/, and the pictures to W&B. A run is never lost for them."""
    directory = trainer.directory
    try:
        report(directory.path, directory.report)
    except Exception as error:  # a full disk
        logger.warning("%s is not complete: %s", directory.report, " ".join(str(error).split()))
    for picture in sorted(directory.report.glob("*.png")):
        trainer.tracker.image(f"report/{picture.stem}", picture, trainer.step)


def _sample(trainer: Trainer) -> str:
    """Generated text; every rank takes part, since a forward may hold collectives."""
    train = trainer.train
    if not train.sample_tokens:
        return ""
    trainer.model.eval()

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        return trainer.engine.logits(ids.to(trainer.topology.device))

    prompt, length, temperature = train.sample_prompt, train.sample_tokens, train.sample_temperature
    text = generate(logits_of, trainer.tokenizer, prompt, length, temperature, trainer.settings.seed)
    if trainer.topology.rank == 0:
        with durable.optional(trainer.directory.samples):
            trainer.directory.samples.write_text(text + "\n", encoding="utf-8")
        trainer.tracker.table("samples", ["prompt", "text"], [[prompt, text]], trainer.step)
    return text


def _show_end(trainer: Trainer, text: str) -> None:
    figures = trainer.validation
    if text:
        logger.info("sample:\n%s", text)
    logger.info("report: %s", trainer.directory.report / PAGE)
    logger.info(
        "final validation loss %.4f nats/token (%.4f bits/byte): %.4f below the unigram entropy %.4f of its tokens",
        figures["val_loss"],
        figures["val_bits_per_byte"],
        figures["val_gain_over_unigram"],
        figures["unigram_entropy"],
    )
