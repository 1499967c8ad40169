"""A sweep: its jobs, each a run of `launch/pretrain.py`, and what came of them in `sweep.csv` and `comparison/`."""

import csv
import io
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, open_dict

from v4train import durable
from v4train.errors import ConfigError, SweepFailed
from v4train.overrides import complete
from v4train.parallel.topology import read_ranks
from v4train.train.metrics import read_metrics, read_summary
from v4train.train.progress import format_duration
from v4train.train.run_directory import RunDirectory
from v4train.train.signals import REQUEUE

# Hydra's overrides that jobs don't get
OF_THE_SWEEP = re.compile(r"[+~]*hydra[./](launcher|sweeper|sweep|mode|job\.(num|id|chdir|override_dirname))\b")

logger = logging.getLogger("v4train")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    command: program and arguments that each rank runs. log: what they all say.
    """

    number: int
    overrides: tuple[str, ...]
    name: str
    run_dir: Path
    command: tuple[str, ...]
    log: Path

    def say(self, text: str, *values: object, level: int = logging.INFO) -> None:
        logger.log(level, f"job {self.number} ({self.name}) {text}", *values)


@dataclass(frozen=True)
class Outcome:
    """How a job ended. code: None for one that was never started."""

    job: Job
    code: int | None
    seconds: float

    @property
    def status(self) -> str:
        if self.code is None:
            return "not started"
        return {0: "finished", REQUEUE: "interrupted"}.get(self.code, "failed")

    @property
    def waits(self) -> bool:
        """Whether the same command would continue it."""
        return self.status in ("interrupted", "not started")

    @property
    def figures(self) -> dict[str, Any]:
        """Final figures of the run; those of its last validation where it ended before its time (stop_at_step)."""
        directory = RunDirectory(self.job.run_dir)
        if self.status != "finished":
            return {}
        if directory.summary.is_file():
            return read_summary(directory.summary)
        if not directory.metrics.is_file():  # a dry run
            return {}
        return next((record for record in reversed(read_metrics(directory.metrics)) if "val_loss" in record), {})

    @property
    def error(self) -> str:
        """What a failed job said last: its line of error, where it said one."""
        if self.status != "failed":
            return ""
        lines = [line for line in self.job.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"exit code {self.code}"])[-1].strip()


def refuse_on_ranks(arguments: Sequence[str]) -> None:
    """Under torchrun or srun every rank would run the whole sweep. Raises ConfigError with the right command."""
    _, ranks, _ = read_ranks(os.environ)
    if "RANK" in os.environ or ranks > 1:
        key = "hydra.launcher." + ("tasks_per_node" if "hydra/launcher=slurm" in arguments else "nproc")
        given = any(argument.startswith(f"{key}=") for argument in arguments)
        own = shlex.join([*arguments, *([] if given else [f"{key}={ranks}"])])
        rule = f"under torchrun or srun each of the {ranks} ranks would run the whole sweep"
        remedy = f"it starts torchrun for each job itself: python {own}"
        raise ConfigError("hydra.mode", "MULTIRUN", rule, remedy)


class Sweep:
    """The jobs of one command, as a sweeper asks for them, and their outcomes.

    Args:
        config: Hydra's, of the whole sweep.
        objective: figure that a sweeper minimises or maximises.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader, objective: str) -> None:
        self.config, self.loader, self.objective = config, loader, objective
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.outcomes: dict[int, Outcome] = {}

    @property
    def table(self) -> Path:
        return self.folder / "sweep.csv"

    def jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Jobs with these overrides, numbered from `first`.

        Raises:
            ConfigError: two that differ would write to the same folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = [self._job(number, tuple(overrides)) for number, overrides in enumerate(job_overrides, first)]
        owners: dict[Path, Job] = {}
        for job in jobs:
            owner = owners.setdefault(job.run_dir, job)
            if owner.overrides != job.overrides:
                rule = f"jobs {owner.number} and {job.number} of the sweep would both write there"
                remedy = "let run.name be made from the overrides, or depend on what is swept: run.name='mine_${seed}'"
                raise ConfigError("run.dir", job.run_dir, rule, remedy)
        return jobs

    def run(self, jobs: Sequence[Job], start: Callable[[list[Job]], Iterable[Outcome]]) -> None:
        """Run each job once, although a sampler may ask for the same twice, and compare.

        Args:
            start: runs jobs, giving each one's outcome when it ends.

        Raises:
            SystemExit: with code REQUEUE where jobs wait to be continued.
            SweepFailed: others have failed besides.
        """
        same: dict[Path, list[Job]] = {}
        for job in jobs:
            same.setdefault(job.run_dir, []).append(job)
        for outcome in start([own[0] for own in same.values()]):
            for job in same[outcome.job.run_dir]:
                self._record(replace(outcome, job=replace(job, log=outcome.job.log)))
        self._compare()
        if any(self.outcomes[job.number].waits for job in jobs):
            raise self.failure() or SystemExit(REQUEUE)

    @property
    def _only_lists(self) -> bool:
        """Whether the sweeper is Hydra's own, which asks for no objective."""
        return str(self.config.hydra.sweeper._target_).endswith(".BasicSweeper")

    def objective_of(self, job: Job) -> float | None:
        """What a sweeper gets of a finished job: of one that has diverged the worst value there is.

        Raises:
            ConfigError: the run has no figure of that name.
        """
        figures = self.outcomes[job.number].figures
        if self.objective not in figures and self._only_lists:
            return None
        if self.objective not in figures:
            rule = f"job {job.number} ({job.name}) has no such figure"
            known = ", ".join(key for key in figures if key != "run")
            raise ConfigError("hydra.launcher.objective", self.objective, rule, f"use one of {known}")
        value = float(figures[self.objective])
        worst = -math.inf if self.config.hydra.sweeper.get("direction") == "maximize" else math.inf
        return worst if math.isnan(value) else value

    def failure(self) -> SweepFailed | None:
        """Which jobs have failed, and why."""
        failed = [outcome for _, outcome in sorted(self.outcomes.items()) if outcome.status == "failed"]
        if not failed:
            return None
        which = "; ".join(f"job {outcome.job.number} ({outcome.job.name}): {outcome.error}" for outcome in failed)
        return SweepFailed(f"{len(failed)} of {len(self.outcomes)} jobs failed: {which}; see {self.table}")

    def _record(self, outcome: Outcome) -> None:
        self.outcomes[outcome.job.number] = outcome
        after = f"after {format_duration(outcome.seconds)}"
        if outcome.status == "failed":
            outcome.job.say("failed %s: %s", after, outcome.error, level=logging.ERROR)
        elif outcome.status == "finished":
            outcome.job.say("finished %s: %s %s", after, self.objective, outcome.figures.get(self.objective))
        else:
            outcome.job.say("%s %s; the same command continues it", outcome.status, after)
        durable.replace(self.table, table_of(self.outcomes.values()).encode())

    def _compare(self) -> None:
        """A page that compares the runs which have trained at all."""
        runs = [outcome.job.run_dir for _, outcome in sorted(self.outcomes.items())]
        runs = [path for path in dict.fromkeys(runs) if RunDirectory(path).metrics.is_file()]
        if runs:
            from v4train.report import compare  # with matplotlib, which takes a second

            logger.info("comparison: %s", compare(runs, self.folder / "comparison"))
        logger.info("table: %s", self.table)

    def _job(self, number: int, overrides: tuple[str, ...]) -> Job:
        config = self.loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        complete(config, list(overrides))
        command = (str(Path(sys.argv[0]).absolute()), *_for_jobs(config), *self._tracked(config), *overrides)
        run_dir = Path(config.run.dir).absolute()
        return Job(number, overrides, config.run.name, run_dir, command, self.folder / f"{number}.log")

    def _tracked(self, config: DictConfig) -> list[str]:
        """W&B shows the runs of a sweep together, unless the user has a group for them."""
        given = config.tracking.group is not None or "WANDB_RUN_GROUP" in os.environ
        return [] if given else [f"tracking.group={quoted(self.folder.name)}"]


def quoted(value: str) -> str:
    """The value as an override has it, whatever is in it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def table_of(outcomes: Iterable[Outcome]) -> str:
    """CSV, a line a job by number: how it ended, what was swept (a column a key), figures, and where to look."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.job.number)
    given = [dict(override.split("=", 1) for override in outcome.job.overrides) for outcome in outcomes]
    keys = dict.fromkeys(key for overrides in given for key in overrides)
    swept = [key for key in keys if len({overrides.get(key) for overrides in given}) > 1]
    rows = [
        {"job": outcome.job.number, "run": outcome.job.name, "status": outcome.status}
        | {"seconds": round(outcome.seconds, 1)}
        | {key: overrides.get(key, "") for key in swept}
        | {key: value for key, value in outcome.figures.items() if key != "run"}
        | {"error": outcome.error, "run_dir": outcome.job.run_dir, "log": outcome.job.log}
        for outcome, overrides in zip(outcomes, given, strict=True)
    ]
    last = ("error", "run_dir", "log")
    columns = dict.fromkeys(key for row in rows for key in row if key not in last)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *last], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _for_jobs(config: DictConfig) -> list[str]:
    """Of the command line of a sweep, what is Hydra's and matters to its jobs: where configurations are, for one."""
    arguments = []
    if config.hydra.job.config_name != "pretrain":
        arguments += ["--config-name", config.hydra.job.config_name]
    for source in config.hydra.runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", source.path]
    arguments.append("hydra.mode=RUN")  # an experiment's file may say MULTIRUN; options have to come before overrides
    return arguments + [override for override in config.hydra.overrides.hydra if not OF_THE_SWEEP.match(override)]
