"""Jobs of a sweep and the table of what came of them."""

import csv
import io
import math
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode

from v4train.errors import ConfigError, SweepFailed
from v4train.launching.sweep import Job, Outcome, Sweep, refuse_on_ranks, table_of
from v4train.overrides import config_dir, sweep_name
from v4train.train.metrics import write_summary

NAME = "hydra.job.name=pretrain"


def make_sweep(folder: Path, *overrides: str, objective: str = "val_loss") -> Sweep:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        loader = ConfigLoaderImpl(create_config_search_path(f"file://{config_dir()}"))
        given = [*overrides, f"hydra.sweep.dir={folder}", "hydra.mode=MULTIRUN", NAME]
        config = loader.load_configuration("pretrain", given, RunMode.MULTIRUN)
        config.hydra.job.config_name = "pretrain"
    return Sweep(config, loader, objective)


def job(number: int, folder: Path, *overrides: str) -> Job:
    return Job(number, overrides, f"run{number}", folder / f"run{number}", ("program",), folder / f"{number}.log")


def ended(job: Job, code: int | None, **figures: float) -> Outcome:
    job.run_dir.mkdir(parents=True, exist_ok=True)
    if figures:
        write_summary(job.run_dir / "summary.json", {"run": job.name, **figures})
    return Outcome(job, code, 1.25)


def test_jobs_are_commands_named_from_their_overrides(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(tmp_path / "pretrain.py"), "-m"])
    hydras = ["hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.searchpath=[pkg://hydra.conf]"]
    jobs = make_sweep(tmp_path / "sweep", *hydras).jobs(
        [["seed=1", "optimizer=adamw"], ["seed=2", "optimizer=adamw"]], first=4
    )
    assert [job.number for job in jobs] == [4, 5]
    assert [job.name for job in jobs] == ["flash_small_optimizer=adamw_seed=1", "flash_small_optimizer=adamw_seed=2"]
    assert jobs[0].run_dir == Path("runs/flash_small_optimizer=adamw_seed=1").absolute()
    own = ("hydra.mode=RUN", hydras[2], NAME, "tracking.group='sweep'")
    assert jobs[1].command == (str(tmp_path / "pretrain.py"), *own, "seed=2", "optimizer=adamw")
    assert jobs[1].log == tmp_path / "sweep" / "5.log"


def test_what_of_hydra_is_the_jobs_is_handed_on(tmp_path):
    hydras = ["+hydra.job.env_set.MINE=1", "hydra.job.chdir=false", "hydra.sweeper.max_batch_size=2"]
    (job,) = make_sweep(tmp_path, *hydras).jobs([["seed=1"]], first=0)
    assert job.command[1:] == ("hydra.mode=RUN", hydras[0], NAME, f"tracking.group='{tmp_path.name}'", "seed=1")


@pytest.mark.parametrize("given", ["tracking.group=mine", "variable"])
def test_the_users_group_stays(tmp_path, monkeypatch, given):
    if given == "variable":
        monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    overrides = [] if given == "variable" else [given]
    (job,) = make_sweep(tmp_path).jobs([["seed=1", *overrides]], first=0)
    assert job.command[1:] == ("hydra.mode=RUN", NAME, "seed=1", *overrides)


def test_another_configuration_is_handed_on(tmp_path, monkeypatch):
    sweep = make_sweep(tmp_path)
    composed = sweep.loader.load_sweep_config(sweep.config, ["seed=1"])
    composed.hydra.job.config_name = "mine"
    monkeypatch.setattr(sweep.loader, "load_sweep_config", lambda config, overrides: composed)
    (job,) = sweep.jobs([["seed=1"]], first=0)
    assert job.command[1:4] == ("--config-name", "mine", "hydra.mode=RUN")


def test_two_jobs_that_differ_may_not_share_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"run.dir=.*mine: jobs 0 and 1 of the sweep .*run.name='mine_\$\{seed\}'"):
        make_sweep(tmp_path).jobs([["seed=1", "run.name=mine"], ["seed=2", "run.name=mine"]], first=0)
    names = [["seed=1", "run.name=mine_${seed}"], ["seed=2", "run.name=mine_${seed}"]]
    assert [job.name for job in make_sweep(tmp_path).jobs(names, first=0)] == ["mine_1", "mine_2"]


def test_the_same_job_asked_for_twice_runs_once(tmp_path):
    sweep, started = make_sweep(tmp_path), []

    def start(jobs):
        started.extend(jobs)
        return [Outcome(job, 2, 1.0) for job in jobs]

    jobs = sweep.jobs([["seed=1"], ["seed=2"], ["seed=1"]], first=0)
    for number in range(2):
        (tmp_path / f"{number}.log").write_text(f"error: {number}\n")
    sweep.run(jobs, start)
    assert [job.number for job in started] == [0, 1]
    assert [outcome.error for _, outcome in sorted(sweep.outcomes.items())] == ["0", "1", "0"]


def test_the_table(tmp_path):
    jobs = [job(number, tmp_path, f"a={number % 2}", f"+b={number}", "c=1") for number in range(4)]
    jobs[2].log.write_text("starting\nerror: c=1: wrong; mend it\n\n")
    jobs[3].log.write_text("Traceback\n  line\nValueError: broken\n")
    outcomes = [ended(jobs[0], 0, val_loss=2.5), ended(jobs[3], 1), ended(jobs[2], 2), ended(jobs[1], 75)]
    text = table_of(outcomes)
    header = "job,run,status,seconds,a,+b,val_loss,error,run_dir,log"
    assert text.splitlines()[0] == header
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["status"] for row in rows] == ["finished", "interrupted", "failed", "failed"]
    assert [row["+b"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["val_loss"] for row in rows] == ["2.5", "", "", ""]
    assert [row["error"] for row in rows] == ["", "", "c=1: wrong; mend it", "ValueError: broken"]


@pytest.mark.parametrize("codes", [(0, 75), (0, None), (1, 75)])
def test_jobs_that_wait_end_the_sweep_with_its_code(tmp_path, monkeypatch, codes):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep(tmp_path / "sweep")
    jobs = sweep.jobs([["seed=1"], ["seed=2"]], first=0)
    jobs[0].log.write_text("error: bad\n")
    with pytest.raises(SweepFailed if 1 in codes else SystemExit) as caught:
        sweep.run(jobs, lambda jobs: [ended(job, code, val_loss=1.0) for job, code in zip(jobs, codes, strict=True)])
    assert "1 of 2 jobs failed" in str(caught.value) if 1 in codes else caught.value.code == 75


def test_a_figure_that_no_run_has_is_refused_as_the_objective(tmp_path):
    sweep = make_sweep(tmp_path, "hydra/sweeper=optuna", objective="accuracy")
    first = job(0, tmp_path)
    sweep.outcomes[0] = ended(first, 0, val_loss=1.0)
    with pytest.raises(ConfigError, match="hydra.launcher.objective=accuracy: .*; use one of val_loss"):
        sweep.objective_of(first)
    hydras_own = make_sweep(tmp_path, objective="accuracy")  # asks for none
    hydras_own.outcomes[0] = sweep.outcomes[0]
    assert hydras_own.objective_of(first) is None


@pytest.mark.parametrize(("direction", "worst"), [("minimize", math.inf), ("maximize", -math.inf)])
def test_a_job_that_has_diverged_is_the_worst(tmp_path, direction, worst):
    """Optuna takes no nan: it would end the study."""
    sweep = make_sweep(tmp_path, "hydra/sweeper=optuna", f"hydra.sweeper.direction={direction}")
    first = job(0, tmp_path)
    sweep.outcomes[0] = ended(first, 0, val_loss=math.nan)
    assert sweep.objective_of(first) == worst


def test_a_dry_run_has_no_figures(tmp_path):
    sweep = make_sweep(tmp_path)
    first = job(0, tmp_path)
    sweep.run([first], lambda jobs: [Outcome(first, 0, 1.0)])
    assert sweep.outcomes[0].figures == {} and sweep.objective_of(first) is None


def test_a_sweep_belongs_to_one_process(monkeypatch):
    refuse_on_ranks(["launch/pretrain.py", "-m"])  # plain python
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 ranks.*python launch/pretrain.py -m 'a=1, 2' hydra.launcher.nproc=4$"):
        refuse_on_ranks(["launch/pretrain.py", "-m", "a=1, 2"])
    with pytest.raises(ConfigError, match="hydra/launcher=slurm hydra.launcher.tasks_per_node=4$"):
        refuse_on_ranks(["launch/pretrain.py", "-m", "hydra/launcher=slurm"])
    with pytest.raises(ConfigError, match="python launch/pretrain.py -m hydra.launcher.nproc=2$"):
        refuse_on_ranks(["launch/pretrain.py", "-m", "hydra.launcher.nproc=2"])


def test_the_name_of_a_sweep():
    assert sweep_name("flash_small", ["seed=1,2", "optimizer=adamw,muon"]) == (
        "flash_small_optimizer=adamw-muon_seed=1-2"
    )
    assert sweep_name("flash_small", ["model=flash_small,dense_small", "seed=1,2"]).startswith("flash_small-dense")
    assert sweep_name("dense_small", ["model=dense_small", "seed=1,2"]) == "dense_small_seed=1-2"
