"""Start a program that measures something on several ranks of this machine, and collect what each of them found."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from v4train.launching.local import cores
from v4train.train.allocator import tuned_environment

TIME_LIMIT = 300  # seconds


def on_ranks(program: Sequence[str], ranks: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a Python program on `ranks` ranks, which share out the cores (or OMP_NUM_THREADS)."""
    launcher = ["-m", "v4train.launching.ranks", str(ranks)]
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores()) // ranks
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads))}
    return [sys.executable, *launcher, *program], tuned_environment(environment)


def collected(program: Sequence[str], ranks: int) -> list[Any]:
    """What `report` was given on each rank of `program`, which gets the folder to report to as its last argument.

    Raises:
        RuntimeError: fewer ranks reported, with what they said last; or they took longer than TIME_LIMIT.
    """
    with tempfile.TemporaryDirectory() as folder:
        command, environment = on_ranks([*program, folder], ranks)
        done = _ended(command, environment)
        results = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    if len(results) < ranks:  # an exit code says less: some launches abort at exit (deepspeed 0.19.8)
        raise RuntimeError(f"the ranks ended with {done.returncode}\n{done.stderr[-2000:]}")
    return results


def _ended(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as launcher:
        try:
            said = launcher.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired as error:
            launcher.terminate()  # it hands this on to the ranks, which a SIGKILL of its own would leave behind
            try:
                launcher.wait(30)
            except subprocess.TimeoutExpired:
                for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                    process.kill()
            raise RuntimeError(f"the ranks took longer than {TIME_LIMIT} s") from error
    return subprocess.CompletedProcess(command, launcher.returncode, *said)


def report(folder: str, rank: int, found: Any) -> None:
    """One rank's part of `collected`: anything that JSON has."""
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
