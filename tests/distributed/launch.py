"""Start a module under torchrun on this machine's CPU, with a time limit and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, processes: int, arguments: list[str], folder: Path, timeout: float) -> None:
    """Run `python -m module *arguments` on `processes` gloo ranks; raise AssertionError unless every rank finished.

    A rank has finished when it called `finished(folder)`: some launches abort or hang after that, at exit (deepspeed
    0.19.8), which says nothing about the test. On failure the message holds every rank's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", f"--log-dir={folder / 'log'}", "--redirects=3"]
    command += ["-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONFAULTHANDLER"] = "1"  # SIGABRT prints the stack of every thread
    with open(folder / "torchrun.log", "w") as log:
        torchrun = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + timeout
            while torchrun.poll() is None and time.monotonic() < end:
                try:
                    torchrun.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    if _missing(folder, processes) == []:
                        end = min(end, time.monotonic() + 10)  # done; what is left is the way out
        finally:
            if _missing(folder, processes):
                _print_stacks(torchrun, module)
            _kill(torchrun)
    missing = _missing(folder, processes)
    if missing:
        logs = [folder / "torchrun.log", *sorted((folder / "log").rglob("*.log"))]
        text = "\n".join(f"--- {path.relative_to(folder)}\n{path.read_text()[-6000:]}" for path in logs)
        raise AssertionError(f"{module}: ranks {missing} of {processes} did not finish within {timeout} s\n{text}")


def finished(folder: Path) -> None:
    """Called by a rank when everything it has to say is on disk."""
    (folder / f"rank_{os.environ['RANK']}.finished").touch()


def _missing(folder: Path, processes: int) -> list[int]:
    return [rank for rank in range(processes) if not (folder / f"rank_{rank}.finished").exists()]


def _print_stacks(torchrun: subprocess.Popen, module: str) -> None:
    """Let each rank that still runs say where it is, in its log."""
    try:
        ranks = [rank for rank in psutil.Process(torchrun.pid).children() if module in rank.cmdline()]
    except psutil.NoSuchProcess:
        return
    for rank in ranks:
        rank.send_signal(signal.SIGABRT)
    psutil.wait_procs(ranks, timeout=5)


def _kill(torchrun: subprocess.Popen) -> None:
    # torchrun gives each rank a session of its own, so killing its process group would spare them.
    try:
        family = [*psutil.Process(torchrun.pid).children(recursive=True), psutil.Process(torchrun.pid)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    torchrun.wait()
