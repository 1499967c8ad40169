"""Jobs of a sweep as one job array of SLURM, submitted through submitit, each queued again until its run is finished.

What a rank runs is a process of its own: submitit's handlers of signals, which checkpoint a Python object and requeue
at once, would end a run before its ranks have agreed on a step and saved.
"""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4train import durable
from v4train.errors import ConfigError, wants_traceback
from v4train.launching.sweep import Job, Outcome
from v4train.train.restarts import slurm_job
from v4train.train.signals import REQUEUE

SUBMITIT = ".submitit"  # folder in that of the sweep

logger = logging.getLogger("v4train")


@dataclass
class SlurmConfig:
    """Values and their meaning: conf/hydra/launcher/slurm.yaml."""

    name: str
    nodes: int
    tasks_per_node: int
    cpus_per_task: int | None
    gpus_per_node: int | None
    mem_gb: int | None
    timeout_min: int
    signal_delay_s: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    array_parallelism: int
    setup: list[str]
    additional_parameters: dict[str, Any]
    poll_seconds: float
    objective: str

    def __post_init__(self) -> None:
        for key in ("nodes", "tasks_per_node", "timeout_min", "signal_delay_s", "array_parallelism"):
            if getattr(self, key) < 1:
                raise ConfigError(f"hydra.launcher.{key}", getattr(self, key), "it must be at least 1", "use 1")
        if self.signal_delay_s >= 60 * self.timeout_min:
            rule = f"a job would be told to save before it begins, as it has {self.timeout_min} minutes"
            raise ConfigError("hydra.launcher.signal_delay_s", self.signal_delay_s, rule, "make it smaller")


@dataclass(frozen=True)
class Rank:
    """What submitit pickles, and each task of a job calls: one rank of the run.

    Returns its exit code where that is 0 or REQUEUE, else raises RuntimeError, so that SLURM's job is a failed one too.
    """

    command: tuple[str, ...]
    log: Path

    def __call__(self) -> int:
        # SLURM signals the process group, so the rank has it too. A handler, unlike SIG_IGN, is not inherited.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
            signal.signal(number, lambda *_: None)
        import submitit

        # Of an earlier start: it would hide that this one has died
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            code = subprocess.run(self.command, stdout=log, stderr=subprocess.STDOUT).returncode
            if code < 0:
                ended = f"error: rank {os.environ['SLURM_PROCID']} was ended by {signal.Signals(-code).name}\n"
                log.write(ended.encode())
        if -code in (signal.SIGTERM, signal.SIGUSR1):
            code = REQUEUE  # it was not yet training, so there was nothing to save
        if code == REQUEUE and os.environ["SLURM_PROCID"] == "0":
            _requeue(slurm_job(os.environ))
        if code not in (0, REQUEUE):
            raise RuntimeError(f"the run ended with {code}: {self.log}")
        return code


def _requeue(job: str) -> None:
    """Unless SLURM is ending the job, by scancel or preemption, and so decides itself."""
    state = subprocess.run(["squeue", "--noheader", "--format=%T", f"--jobs={job}"], capture_output=True, text=True)
    if state.stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=True)


def run_jobs(jobs: list[Job], config: SlurmConfig, folder: Path) -> Iterator[Outcome]:
    """Submit the jobs and wait for them; their outcomes in the order in which they end.

    Those that an earlier call has submitted and that are still in the queue are waited for, not submitted again.

    Args:
        folder: of the sweep, seen by all nodes; what submitit writes lies under `.submitit` there.
    """
    started, record = time.monotonic(), folder / "slurm_jobs.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    alive = queued()
    if alive is None:  # who can't see what runs would start it a second time
        raise ConfigError("hydra/launcher", "slurm", "squeue doesn't answer", "try again when SLURM does")
    ids = {job.run_dir: known[str(job.run_dir)] for job in jobs if known.get(str(job.run_dir)) in alive}
    new = [job for job in jobs if job.run_dir not in ids]
    ids |= dict(zip((job.run_dir for job in new), _submit(new, config, folder), strict=True))
    durable.replace(record, json.dumps(known | {str(path): number for path, number in ids.items()}, indent=2).encode())
    logger.info("SLURM jobs %s, of which %d are new", ", ".join(ids.values()), len(new))
    waiting = list(jobs)
    try:
        while waiting:
            time.sleep(config.poll_seconds)
            alive = queued()
            for job in [] if alive is None else [job for job in waiting if ids[job.run_dir] not in alive]:
                waiting.remove(job)
                code = _exit_code(ids[job.run_dir], folder / SUBMITIT, job.log)
                yield Outcome(job, code, time.monotonic() - started)
    except KeyboardInterrupt:
        logger.info("the jobs stay in the queue (squeue --me); the same command waits for them again")
        raise


def queued() -> set[str] | None:
    """Jobs of this user that wait, run or are about to be queued again, those of an array as `ARRAY_INDEX`.

    None where SLURM does not answer. Not submitit's look-up, which is sacct's and so needs a database of accounts.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i", "--me"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def check_installed() -> None:
    """Raises ConfigError where there is no SLURM, or no submitit."""
    if shutil.which("sbatch") is None:
        remedy = "start the sweep on a machine of the cluster, or use hydra/launcher=local"
        raise ConfigError("hydra/launcher", "slurm", "there is no sbatch here", remedy)
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("hydra/launcher", "slurm", "submitit is not installed", "pip install 'v4train[slurm]'")


def _submit(jobs: list[Job], config: SlurmConfig, folder: Path) -> list[str]:
    """Ids of the jobs, which are one array where there are several."""
    if not jobs:
        return []
    import submitit

    executor = submitit.SlurmExecutor(folder / SUBMITIT)
    for job in jobs:
        job.log.write_bytes(b"")
    try:
        executor.update_parameters(**parameters(config))
        with executor.batch():
            submitted = [executor.submit(Rank((sys.executable, *job.command), job.log)) for job in jobs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        rule = " ".join(str(error).split())
        raise ConfigError("hydra/launcher", "slurm", rule, "conf/hydra/launcher/slurm.yaml has the options") from error
    return [job.job_id for job in submitted]


def parameters(config: SlurmConfig) -> dict[str, Any]:
    """As submitit names them."""
    setup = list(config.setup)
    if not wants_traceback():
        setup.append("unset HYDRA_FULL_ERROR")  # of the program that submits
    if config.cpus_per_task is not None:
        # Since SLURM 22.05 srun does not take the number from sbatch
        setup += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK"]
    given = {
        "job_name": config.name,
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks_per_node,
        "cpus_per_task": config.cpus_per_task,
        "gpus_per_node": config.gpus_per_node,
        "mem": None if config.mem_gb is None else f"{config.mem_gb}GB",
        "time": config.timeout_min,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "exclude": config.exclude,
        "array_parallelism": config.array_parallelism,
        "setup": setup,
        # submitit's signal is SIGUSR2, at which it would requeue at once
        "additional_parameters": {"signal": f"USR1@{config.signal_delay_s}", "requeue": True}
        | config.additional_parameters,
    }
    return {name: value for name, value in given.items() if value is not None}


def _exit_code(job: str, folder: Path, log: Path) -> int:
    """Of a job that has left the queue, by its first rank. Where SLURM ended it without a result, the log says so."""
    import submitit

    rank = submitit.SlurmJob(folder, job, tasks=[0])
    if rank.paths.result_pickle.name not in os.listdir(folder):  # NFS may remember that a file was not there
        with log.open("a") as file:
            file.write(f"error: SLURM has ended job {job} before its run did; see {rank.paths.stderr}\n")
        return 1
    try:
        return rank.result()
    except submitit.core.utils.FailedJobError:
        return 1
