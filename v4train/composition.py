"""Hydra overrides to a composed configuration. Without PyTorch: programs that only calculate start at once."""

import difflib
import importlib.resources
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from v4train.errors import ConfigError


def config_dir() -> Path:
    """Folder of the YAML files, inside the installed package."""
    return Path(str(importlib.resources.files("v4train") / "conf"))


def composed(program: str, overrides: list[str]) -> DictConfig:
    """`conf/<program>.yaml` with these overrides. What the values mean is not checked.

    Raises:
        ConfigError: an unknown key or option.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(program, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, program) from error


def explain(error: Exception, program: str = "pretrain") -> ConfigError:
    """What Hydra or OmegaConf complain of while composing, as one line with the nearest name that exists."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [name for name in error.options or [] if not name.startswith("_")]
        return ConfigError(group, option, "there is no such option", f"choose one of {', '.join(options)}")
    if isinstance(error, OverrideParseException):
        return ConfigError("override", error.override, "Hydra can't read it", "write key=value, quoted for the shell")
    match = re.search(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and match:
        key = match.group(1).partition("@")[0]
        if key.startswith("parallelism.deepspeed"):
            return ConfigError(key, "?", "keys passed through to DeepSpeed are added", f"write +{key}.<key>=<value>")
        near = difflib.get_close_matches(key, _known_keys(program), n=1, cutoff=0.7)
        return ConfigError(key, "?", "unknown key", f"did you mean {near[0]}?" if near else "conf/ shows all keys")
    return ConfigError("config", "?", text, "conf/ shows all keys")


def _known_keys(program: str) -> list[str]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose(program), resolve=False)

    def walk(values: dict, prefix: str) -> list[str]:
        keys = []
        for key, value in values.items():
            keys.append(f"{prefix}{key}")
            keys += walk(value, f"{prefix}{key}.") if isinstance(value, dict) else []
        return keys

    return walk(config, "")
