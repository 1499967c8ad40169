"""`hydra/launcher=local` and `hydra/launcher=slurm`, where Hydra looks for plugins.

Hydra imports this file at every start of every program that uses Hydra: what is heavy waits until a sweep begins.
"""

import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from v4train.launching.local import LocalConfig
    from v4train.launching.slurm import SlurmConfig
    from v4train.launching.sweep import Job, Outcome


class SweepLauncher(Launcher):
    """What both have in common: a job is a command of its own, and its result lies in the folder of its run."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from v4train.launching.sweep import Sweep, refuse_on_ranks

        refuse_on_ranks(sys.argv)
        self.checked, self.config = self.check(), config
        self.sweep = Sweep(config, hydra_context.config_loader, self.options["objective"])

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from v4train.train.progress import setup_logging

        setup_globals()
        jobs = self.sweep.jobs(job_overrides, initial_job_idx)
        setup_logging(self.sweep.folder, rank=0)
        self.sweep.run(jobs, self.run_jobs)
        return [self._returned(job) for job in jobs]

    @abstractmethod
    def check(self) -> Any:
        """The options, typed. Raises ConfigError: there is something wrong with them, before anything is written."""

    @abstractmethod
    def run_jobs(self, jobs: "list[Job]") -> "Iterator[Outcome]":
        """Run them all; the outcome of each when it ends."""

    def _returned(self, job: "Job") -> JobReturn:
        """To a sweeper a failed job is an exception, any other its objective."""
        outcome, returned = self.sweep.outcomes[job.number], JobReturn(overrides=job.overrides)
        returned.status = JobStatus.FAILED if outcome.status == "failed" else JobStatus.COMPLETED
        returned.return_value = self.sweep.failure() if outcome.status == "failed" else self.sweep.objective_of(job)
        return returned


class LocalLauncher(SweepLauncher):
    """On this machine. Options: conf/hydra/launcher/local.yaml."""

    def check(self) -> "LocalConfig":
        from v4train.launching.local import LocalConfig
        from v4train.structured import structured

        return structured(LocalConfig, self.options, "hydra.launcher")

    def run_jobs(self, jobs: "list[Job]") -> "Iterator[Outcome]":
        from v4train.launching.local import run_jobs, visible_gpus

        return run_jobs(jobs, self.checked, visible_gpus(self.config.device))


class SlurmLauncher(SweepLauncher):
    """As one job array of SLURM. Options: conf/hydra/launcher/slurm.yaml."""

    def check(self) -> "SlurmConfig":
        from v4train.launching.slurm import SlurmConfig, check_installed
        from v4train.structured import structured

        check_installed()
        return structured(SlurmConfig, self.options, "hydra.launcher")

    def run_jobs(self, jobs: "list[Job]") -> "Iterator[Outcome]":
        from v4train.launching.slurm import run_jobs

        return run_jobs(jobs, self.checked, self.sweep.folder)
