"""What jobs on one machine share, and what each has of its own."""

import os

import pytest
from omegaconf import OmegaConf

from v4train.errors import ConfigError
from v4train.launching.local import LocalConfig, slot_environments
from v4train.overrides import config_dir


def config(**overrides) -> LocalConfig:
    values = dict(OmegaConf.load(config_dir() / "hydra" / "launcher" / "local.yaml"))
    del values["_target_"]
    return LocalConfig(**(values | overrides))


def test_jobs_at_once_share_cores_and_gpus():
    cores = len(os.sched_getaffinity(0))
    (alone,) = slot_environments(config(), [], {})
    assert alone == {"OMP_NUM_THREADS": str(cores)}
    two = slot_environments(config(jobs=2, nproc=2), ["3", "5", "6", "7"], {"OMP_NUM_THREADS": "9"})
    assert two == [{"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert slot_environments(config(jobs=4 * cores), [], {})[0] == {"OMP_NUM_THREADS": "1"}


def test_more_jobs_than_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"hydra.launcher.jobs=2: 2 x 2 ranks need 4 GPUs, there are 3"):
        slot_environments(config(jobs=2, nproc=2), ["0", "1", "2"], {})


@pytest.mark.parametrize("key", ["jobs", "nproc"])
def test_bad_options_are_refused(key):
    with pytest.raises(ConfigError, match=f"hydra.launcher.{key}=0: it must be at least 1"):
        config(**{key: 0})
