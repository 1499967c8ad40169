"""A real SLURM of one node (`.ci/slurm`): submitted, told to save, preempted, continued; a sweep as a job array."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT
from tests.launch.sweeps import command, environment, page_of, read_table
from tests.runs import checkpoint_digests, losses, tiny
from v4train.train.metrics import read_metrics

LIMIT = 150  # seconds that a job may take, lives and pauses between them together
STEPS = 80
RANKS = 2

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(2 * LIMIT)]


def answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Skips without one."""
    reason = None
    if shutil.which("sbatch") is None:
        reason = "SLURM is not installed (.ci/slurm install)"
    elif not re.search(r"ClusterName\s*= v4train\b", answer("scontrol", "show", "config")):  # nor a cluster of others
        reason = "our own SLURM doesn't answer (.ci/slurm start DIR; export SLURM_CONF=DIR/slurm.conf)"
    if reason:
        pytest.skip(reason)
    yield
    subprocess.run(["scancel", "--me"], timeout=30)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder as a user's clone looks to `sbatch`."""
    base = tmp_path_factory.mktemp("slurm")
    (base / "launch").symlink_to(ROOT / "launch")
    return base


@pytest.fixture(scope="module")
def undisturbed(base) -> Path:
    """The run that no one interrupts, on as many ranks."""
    arguments = run_of(base, "undisturbed")
    ranks = [sys.executable, "-m", "v4train.launching.ranks", str(RANKS), "launch/pretrain.py", *arguments]
    subprocess.run(ranks, cwd=base, env=environment(), capture_output=True, timeout=LIMIT, check=True)
    return base / "undisturbed"


def run_of(base: Path, name: str, *overrides: str) -> list[str]:
    return tiny(base, name, f"train.max_steps={STEPS}", *overrides)


def submit(base: Path, *arguments: str) -> str:
    """Id of a job of `launch/slurm.sbatch`."""
    options = ["--parsable", f"--ntasks-per-node={RANKS}", "--cpus-per-task=1", "--time=10", "--output=%j.out"]
    sbatch = ["sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    result = subprocess.run(sbatch, cwd=base, env=environment(), capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def state(job: str) -> str:
    return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job)).group(1)


def exit_code(job: str) -> int:
    return int(re.search(r"ExitCode=(\d+):", slurm("scontrol", "show", "job", job)).group(1))


def until(what: Callable[[], bool], explain: Callable[[], str], limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end, explain()
        time.sleep(0.1)


def steps(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0


def assert_same(base: Path, name: str) -> None:
    """Bitwise the run that nobody disturbed."""
    assert losses(base, name) == losses(base, "undisturbed")
    assert checkpoint_digests(base, name, STEPS) == checkpoint_digests(base, "undisturbed", STEPS)


def test_a_job_told_to_save_and_then_preempted_ends_as_if_nothing_had_happened(base, undisturbed):
    job = submit(base, *run_of(base, "job"))
    output, run = base / f"{job}.out", base / "job"

    def said() -> str:
        return f"{state(job)}\n{output.read_text() if output.exists() else ''}"

    until(lambda: steps(run) >= 3, said)
    slurm("scancel", "--signal=USR1", job)  # as --signal=USR1@120 does two minutes before the end
    until(lambda: "stopped by a signal" in said(), said)
    first = steps(run)
    until(lambda: steps(run) >= first + 3, said)
    slurm("scontrol", "requeue", job)
    until(lambda: said().count("stopped by a signal") == 2, said)
    assert steps(run) < STEPS, "it was over before it was preempted: more steps are needed"
    until(lambda: state(job) in ("COMPLETED", "FAILED", "CANCELLED"), said)
    assert (state(job), exit_code(job)) == ("COMPLETED", 0), said()
    assert slurm("scontrol", "show", "job", job).count("Restarts=2") == 1
    assert said().count("v4train: job") == 3  # three lives
    assert f"data {RANKS}, ZeRO 1" in said()
    assert_same(base, "job")


def test_a_job_that_fails_or_is_cancelled_is_not_queued_again(base):
    failing = submit(base, *run_of(base, "failing", "train.global_batch_size=3"))
    running = submit(base, *run_of(base, "cancelled", "train.max_steps=100000"))
    until(lambda: state(failing) == "FAILED", lambda: (base / f"{failing}.out").read_text())
    assert exit_code(failing) == 2
    assert (base / f"{failing}.out").read_text().count("error: train.global_batch_size=3") == 1
    until(lambda: steps(base / "cancelled") >= 3, lambda: state(running))
    slurm("scancel", running)
    until(lambda: not slurm("squeue", "--noheader", f"--jobs={running}"), lambda: state(running))
    assert state(running) == "CANCELLED"
    assert "stopped by a signal" in (base / f"{running}.out").read_text()
    newest = max((base / "cancelled" / "checkpoints").iterdir())
    assert newest.name == f"step_{steps(base / 'cancelled'):08d}"


def test_a_sweep_is_a_job_array_whose_jobs_continue(base, undisturbed):
    """Three jobs: two are told to save, each queued again by its first rank alone, and continue; one fails."""
    overrides = ["hydra/launcher=slurm", f"hydra.launcher.tasks_per_node={RANKS}", "hydra.launcher.poll_seconds=0.5"]
    overrides += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10", f"train.max_steps={STEPS}"]
    overrides += [
        "train.global_batch_size=4,3,8",
        "run.name=swept_${train.global_batch_size}",
        f"run.dir={base}/${{run.name}}",
    ]
    sweep = subprocess.Popen(
        command(base, *overrides),
        cwd=base,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    runs = [base / "swept_4", base / "swept_8"]

    def log() -> str:
        return "\n".join(path.read_text() for path in (base / "multirun").rglob("*.log"))

    until(lambda: all(steps(run) >= 3 for run in runs), log)
    assert sweep.poll() is None
    (first,) = [number for number in slurm("squeue", "--noheader", "--array", "--format=%i").split() if "_0" in number]
    jobs = [first.removesuffix("0") + index for index in "012"]
    slurm("scancel", "--signal=USR1", jobs[0], jobs[2])  # of which one has the number of the array
    until(lambda: log().count("stopped by a signal") == 2, log)
    assert all(steps(run) < STEPS for run in runs), "it was over before it was stopped: more steps are needed"
    output, errors = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 1, errors
    _, rows = read_table(base)
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert rows[1]["error"].startswith("train.global_batch_size=3: it must be a multiple of")
    assert f"error: 1 of 3 jobs failed: job 1 (swept_3): {rows[1]['error']}" in errors
    assert ["Restarts=1 " in slurm("scontrol", "show", "job", job) for job in jobs] == [True, False, True]
    assert [state(job) for job in jobs] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert "swept_4" in page_of(output).read_text()
    assert_same(base, "swept_4")
