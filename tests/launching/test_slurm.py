"""What is asked of SLURM, where there is none. With one: tests/launch/test_slurm.py."""

import pytest
from omegaconf import OmegaConf

from v4train.errors import ConfigError
from v4train.launching.slurm import SlurmConfig, check_installed, parameters, run_jobs
from v4train.launching.sweep import Job
from v4train.overrides import config_dir
from v4train.train.restarts import slurm_job


def config(**overrides) -> SlurmConfig:
    values = OmegaConf.to_container(OmegaConf.load(config_dir() / "hydra" / "launcher" / "slurm.yaml"))
    del values["_target_"]
    return SlurmConfig(**(values | overrides))


def test_what_is_not_set_is_left_to_the_cluster():
    made = parameters(config())
    assert made == {
        "job_name": "v4train",
        "nodes": 1,
        "ntasks_per_node": 1,
        "time": 60,
        "array_parallelism": 256,
        "setup": ["unset HYDRA_FULL_ERROR"],
        "additional_parameters": {"signal": "USR1@120", "requeue": True},
    }


def test_options_have_the_names_of_sbatch():
    more = {"nodes": 4, "tasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 12, "mem_gb": 900, "partition": "gpu"}
    made = parameters(config(**more, timeout_min=1440, additional_parameters={"mail-type": "END", "signal": "USR1@30"}))
    wanted = {"ntasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 12, "mem": "900GB", "time": 1440}
    assert wanted.items() <= made.items()
    assert made["additional_parameters"] == {"signal": "USR1@30", "requeue": True, "mail-type": "END"}
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" in made["setup"]


@pytest.mark.parametrize(
    ("bad", "rule"),
    [({"nodes": 0}, "at least 1"), ({"timeout_min": 2, "signal_delay_s": 120}, "told to save before it begins")],
)
def test_bad_options_are_refused(bad, rule):
    with pytest.raises(ConfigError, match=f"hydra.launcher.{list(bad)[-1]}=.*{rule}"):
        config(**bad)


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        # SLURM takes 12 alone for all jobs of the array, of which it is one
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ({}, None),
    ],
)
def test_the_number_of_a_job(variables, job):
    assert slurm_job(variables) == job


def test_a_cluster_that_does_not_answer_gets_no_job_twice(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    job = Job(0, (), "run", tmp_path / "run", ("program",), tmp_path / "0.log")
    with pytest.raises(ConfigError, match="squeue doesn't answer"):
        next(run_jobs([job], config(), tmp_path))
    assert not (tmp_path / "slurm_jobs.json").exists()


def test_a_machine_without_slurm_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="hydra/launcher=slurm: there is no sbatch here"):
        check_installed()
