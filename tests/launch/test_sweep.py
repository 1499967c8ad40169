"""`python launch/pretrain.py -m`: every job by torchrun, what is left of them, and what the exit code says."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.distributed.launch import ROOT
from tests.launch.sweeps import LIMIT, command, environment, page_of, read_table
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(LIMIT + 30)]


def sweep(base: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(base, *overrides), cwd=base, env=environment(), capture_output=True, text=True, timeout=LIMIT
    )


def test_two_by_two_with_a_job_that_fails(tmp_path):
    """Three rows don't divide into micro-batches of two."""
    given = ("train.global_batch_size=2,3", "train.micro_batch_size=1,2")
    result = sweep(tmp_path, *given, "train.max_steps=4", "hydra.launcher.nproc=1", "hydra.launcher.jobs=2")
    folder, rows = read_table(tmp_path)
    assert result.returncode == 1, result.stderr
    assert [row["status"] for row in rows] == ["finished", "finished", "finished", "failed"]
    swept = [(row["train.global_batch_size"], row["train.micro_batch_size"]) for row in rows]
    assert swept == [("2", "1"), ("2", "2"), ("3", "1"), ("3", "2")]
    rule = "train.global_batch_size=3: it must be a multiple of micro_batch_size=2 x 1 data ranks"
    assert rows[3]["error"].startswith(rule)
    assert f"error: 1 of 4 jobs failed: job 3 ({rows[3]['run']}): {rule}" in result.stderr
    for row in rows[:3]:
        summary = json.loads((Path(row["run_dir"]) / "summary.json").read_text())
        assert float(row["val_loss"]) == summary["val_loss"] and row["run"] == summary["run"]
        assert row["error"] == ""
        assert f"{row['run']}) finished after" in result.stdout
    # The same losses whatever the micro-batch, so these are the runs that were asked for
    assert float(rows[0]["val_loss"]) == pytest.approx(float(rows[1]["val_loss"]), abs=1e-4)
    assert abs(float(rows[0]["val_loss"]) - float(rows[2]["val_loss"])) > 1e-4
    # One folder a run, named from the overrides, and nothing of Hydra's but the sweep's own
    names = {
        f"flash_small_experiment=tiny_train.global_batch_size={row['train.global_batch_size']}"
        f"_train.max_steps=4_train.micro_batch_size={row['train.micro_batch_size']}"
        for row in rows
    }
    assert {row["run"] for row in rows} == names
    assert {path.name for path in (tmp_path / "runs").iterdir()} == names - {rows[3]["run"]}
    files = {"multirun.yaml", "sweep.csv", "comparison", "log.txt", *(f"{number}.log" for number in range(4))}
    assert {path.name for path in folder.iterdir()} == files
    assert not list(tmp_path.rglob(".hydra"))
    page = page_of(result.stdout).read_text()
    assert all(row["run"] in page for row in rows[:3]) and rows[3]["run"] not in page


def test_optuna_tunes_a_learning_rate(tmp_path):
    given = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.launcher.jobs=2")
    given += ("hydra.sweeper.sampler.seed=1", "schedule.learning_rate=tag(log,interval(1e-4,1e-1))")
    result = sweep(tmp_path, *given, "train.max_steps=3")
    assert result.returncode == 0, result.stderr
    folder, rows = read_table(tmp_path)
    assert [row["status"] for row in rows] == ["finished"] * 4
    rates = [float(row["schedule.learning_rate"]) for row in rows]
    assert len(set(rates)) == 4 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    best = OmegaConf.load(folder / "optimization_results.yaml")
    values = [float(row["val_loss"]) for row in rows]
    assert best.best_value == min(values)
    assert best.best_params["schedule.learning_rate"] == rates[values.index(min(values))]


def test_a_signal_saves_the_jobs_and_the_same_command_continues_them(tmp_path):
    overrides = ("seed=1,2", "train.max_steps=100000", "hydra.launcher.nproc=2", "train.validation_tokens=96")
    process = subprocess.Popen(
        command(tmp_path, *overrides),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "runs" / "flash_small_experiment=tiny_seed=1_train.max_steps=100000_train.validation_tokens=96"
    metrics /= "metrics.jsonl"
    end = time.monotonic() + LIMIT / 2
    while time.monotonic() < end and not (metrics.exists() and len(read_metrics(metrics)) >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (75, ""), output
    _, rows = read_table(tmp_path)
    assert [row["status"] for row in rows] == ["interrupted", "not started"]
    step = max(record["step"] for record in read_metrics(metrics))
    assert (metrics.parent / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()


@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_a_sweep_on_every_rank_is_refused_with_the_right_command(tmp_path, by):
    environ = {"torchrun": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}}
    environ["srun"] = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), "-m", "seed=1,2"],
        cwd=tmp_path,
        env=environment() | environ[by],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "each of the 2 ranks would run the whole sweep" in result.stderr
    assert result.stderr.endswith("launch/pretrain.py -m seed=1,2 hydra.launcher.nproc=2\n")
    assert not any(tmp_path.iterdir())


def test_bad_options_of_a_launcher_are_refused_before_anything_is_written(tmp_path):
    command_line = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "-m", "seed=1,2", "hydra.launcher.nproc=0"]
    options = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True, "timeout": 60}
    result = subprocess.run(command_line, **options)
    assert result.returncode == 2
    assert result.stderr == "error: hydra.launcher.nproc=0: it must be at least 1; use 1\n"
    assert not any(tmp_path.iterdir())


def test_a_launcher_that_runs_jobs_in_one_process_is_refused(tmp_path):
    result = sweep(tmp_path, "hydra/launcher=basic", "seed=1,2")
    assert result.returncode == 2
    assert result.stderr.startswith("error: hydra/launcher=basic: ")
