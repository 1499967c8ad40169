"""The shipped YAML as Hydra composes it."""

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from v4train.overrides import config_dir


def shipped(group: str, option: str) -> dict:
    """Plain values of one option of a config group without interpolations, e.g. ("optimizer", "muon")."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose(overrides=[f"+{group}={option}"])[group])
