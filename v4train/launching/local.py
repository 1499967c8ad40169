"""Jobs of a sweep on this machine: each one torchrun, in a process group of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from v4train.errors import ConfigError, user_environment
from v4train.launching.sweep import Job, Outcome
from v4train.train.signals import REQUEUE, SIGNALS


@dataclass
class LocalConfig:
    """Values and their meaning: conf/hydra/launcher/local.yaml."""

    nproc: int
    jobs: int
    objective: str

    def __post_init__(self) -> None:
        for key in ("nproc", "jobs"):
            if getattr(self, key) < 1:
                raise ConfigError(f"hydra.launcher.{key}", getattr(self, key), "it must be at least 1", "use 1")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def run_jobs(jobs: list[Job], config: LocalConfig, gpus: list[str]) -> Iterator[Outcome]:
    """Run `config.jobs` of the jobs at once; their outcomes in the order in which they end.

    A signal is handed to the jobs that run, which save and end, and no other one is started.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them; empty for jobs on the CPU.
    """
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for environment in slot_environments(config, gpus, os.environ):
        slots.put(environment)
    with _signals_for_jobs() as running, ThreadPoolExecutor(config.jobs) as pool:
        for ended in as_completed([pool.submit(_run, job, config.nproc, slots, running) for job in jobs]):
            yield ended.result()


def slot_environments(config: LocalConfig, gpus: list[str], environ: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of `config.jobs` jobs at once finds in its environment besides the user's: cores and GPUs of its own.

    Raises:
        ConfigError: there are GPUs, but not enough for all.
    """
    if gpus and len(gpus) < config.jobs * config.nproc:
        rule = f"{config.jobs} x {config.nproc} ranks need {config.jobs * config.nproc} GPUs, there are {len(gpus)}"
        raise ConfigError("hydra.launcher.jobs", config.jobs, rule, "run fewer at once, or use device=cpu")
    common = {}
    if "OMP_NUM_THREADS" not in environ:
        common["OMP_NUM_THREADS"] = str(max(1, cores() // (config.jobs * config.nproc)))
    own = [gpus[slot * config.nproc :][: config.nproc] for slot in range(config.jobs)]
    return [common | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if gpus else {}) for devices in own]


class _Running:
    """The jobs that run now, for whoever has a signal for them."""

    def __init__(self) -> None:
        self.lock, self.processes = threading.RLock(), set[subprocess.Popen]()
        self.signalled: int | None = None

    def start(self, command: list[str], **options: object) -> subprocess.Popen | None:
        """None after a signal."""
        with self.lock:
            if self.signalled is not None:
                return None
            process = subprocess.Popen(command, start_new_session=True, **options)
            self.processes.add(process)
            return process

    def signal(self, number: int) -> None:
        with self.lock:
            self.signalled = number
            for process in self.processes:
                with suppress(ProcessLookupError):
                    process.send_signal(number)


@contextmanager
def _signals_for_jobs() -> Iterator[_Running]:
    running = _Running()
    previous = {number: signal.signal(number, lambda number, _: running.signal(number)) for number in SIGNALS}
    try:
        yield running
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(job: Job, nproc: int, slots: queue.Queue[dict[str, str]], running: _Running) -> Outcome:
    slot = slots.get()
    try:
        started = time.monotonic()
        command = [sys.executable, "-m", "v4train.launching.ranks", str(nproc), *job.command]
        with job.log.open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            process = running.start(command, env=user_environment() | slot, **streams)
        if process is None:
            return Outcome(job, None, 0.0)
        job.say("started: %s", job.log)
        code = process.wait()
        with running.lock:
            running.processes.discard(process)
        code = code if code >= 0 else 128 - code
        if running.signalled is not None and code == 128 + running.signalled:
            code = REQUEUE  # it was not yet training, so there was nothing to save
        return Outcome(job, code, time.monotonic() - started)
    finally:
        slots.put(slot)


def visible_gpus(device: str) -> list[str]:
    """GPUs that jobs with `device` may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
