"""The command line of a run: where the configuration lies, what is named after it, and what is wrong with it.

Nothing heavy is imported here, so that help, completion and a misspelt key don't wait for PyTorch.
"""

import difflib
import hashlib
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from v4train.errors import ConfigError
from v4train.train.phases import read_phases

# Overrides that say how or where to run, not what: they stay out of a run's default name.
UNNAMED = re.compile(
    r"^[+~]*(model=|run\.|checkpoint|tracking|device=|compile=|hydra|tokenizer\.cache_dir|guard\.(?!anticipat)"
    r"|train\.(stop_at_step|max_minutes|recompute|profile|layers_every|hang_timeout|deterministic|dry_run)=)"
)
PHASES_DECIDE = ("sequence_length", "global_batch_size", "attention_mode")  # keys of train, where there are phases
NAME_LENGTH = 120  # longer default names are cut and end in a hash
EXTRAS = {("hydra/sweeper", "optuna"): "optuna"}  # options that come with packages we don't require


def config_dir() -> Path:
    """Folder of the YAML files, inside the installed package."""
    return Path(str(importlib.resources.files("v4train") / "conf"))


def composed(program: str, overrides: list[str]) -> DictConfig:
    """`conf/<program>.yaml` with these overrides. What the values mean is not checked.

    Raises:
        ConfigError: an unknown key or option, or one that is taken away.
    """
    GlobalHydra.instance().clear()
    check_options(overrides)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = compose(program, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, program) from error
    except ValueError as error:
        raise explain_entry(error, overrides) from error
    check_whole(config, program)
    return config


def chosen_option(group: str, overrides: list[str]) -> str:
    """Of conf/<group>/, by the command line, an experiment or conf/pretrain.yaml. Overrides that `composed` takes."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return str(compose("pretrain", overrides, return_hydra_config=True).hydra.runtime.choices[group])


def is_said(key: str, config: DictConfig, overrides: list[str]) -> bool:
    """Whether the command line or an experiment says the value of `key`, and not conf/pretrain.yaml."""
    shipped = OmegaConf.load(config_dir() / "pretrain.yaml")
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    return key in given or OmegaConf.select(config, key) != OmegaConf.select(shipped, key)


def check_options(arguments: Iterable[str]) -> None:
    """Raise ConfigError for what is one of Python's errors to Hydra 1.3: a number or null as the option of a group, and
    an entry of a list that is taken away."""
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue  # no override, or one that composing refuses
        if override.is_delete() and override.key_or_group.rpartition(".")[2].isdecimal():
            rule = "an entry of a list can't be taken away"
            raise ConfigError(override.key_or_group, "missing", rule, "write the whole list, key=[...]")
        if override.is_delete() or not (config_dir() / override.key_or_group).is_dir():
            continue
        value = override.value()
        options = value.list if isinstance(value, ChoiceSweep) else value
        for option in options if isinstance(options, list) else [options]:
            if option is None or isinstance(option, bool | int | float | dict):
                group = override.key_or_group
                raise ConfigError(group, argument.partition("=")[2], "there is no such option", _remedy(group))


def check_whole(config: DictConfig, program: str = "pretrain") -> None:
    """Raise ConfigError where the command line took away a key of conf/<program>.yaml, or a group of them."""
    shipped = OmegaConf.load(config_dir() / f"{program}.yaml")
    chosen = [name for default in shipped.pop("defaults", []) if OmegaConf.is_dict(default) for name in default]
    groups = [name for name in chosen if " " not in name and name != "experiment"]  # that is null
    for key in [*groups, *(key for key in shipped if key != "hydra")]:
        if key not in config:
            remedy = _remedy(key) if key in groups else f"leave ~{key} out"
            raise ConfigError(key, "missing", "it can't be taken away", remedy)
        if (key in groups or OmegaConf.is_dict(shipped[key])) and not OmegaConf.is_dict(config[key]):
            remedy = "set single keys of it; conf/ shows them"
            raise ConfigError(key, config[key], "a group of keys is expected", remedy)


def _remedy(group: str) -> str:
    return f"choose one of {', '.join(sorted(path.stem for path in (config_dir() / group).glob('[!_]*.yaml')))}"


def complete(config: DictConfig, overrides: list[str]) -> None:
    """Fill in what depends on the command line: the run's default name, and of `train` what phases decide.

    Raises:
        ConfigError: phases that can't be read, or a key of `train` that they decide, given beside them.
    """
    try:
        if config.schedule.phases is not None:
            _leave_to_phases(config, overrides)
    except OmegaConfBaseException as error:  # a name in them that leads nowhere
        raise explain(error) from error
    if config.run.name is None:
        config.run.name = default_run_name(str(config.model.name), overrides)


def _leave_to_phases(config: DictConfig, overrides: list[str]) -> None:
    """`train` says what the last phase ends with. What the command line or an experiment says instead is refused."""
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    shipped = OmegaConf.load(config_dir() / "pretrain.yaml").train
    for key in PHASES_DECIDE:
        if f"train.{key}" in given or config.train[key] != shipped[key]:
            rule = "the phases of this schedule set it"
            remedy = f"leave it out and change schedule.phases.<number>.{key}, or use schedule=cosine, without phases"
            raise ConfigError(f"train.{key}", config.train[key], rule, remedy)
    phases = config.schedule.phases
    last = read_phases(OmegaConf.to_container(phases, resolve=True) if OmegaConf.is_config(phases) else phases)[-1]
    config.train.sequence_length, config.train.attention_mode = last.sequence_length, last.attention_mode
    config.train.global_batch_size = last.batches[-1][0]


def without_phases(value: Any, *, _root_: DictConfig) -> Any:
    """`value` in a run without phases, None with them: a default, which whatever is set explicitly replaces."""
    return value if OmegaConf.select(_root_, "schedule.phases") is None else None


def default_run_name(model: str, overrides: list[str]) -> str:
    """Name from the model and the overrides, never the clock, so that the same command continues the same run."""
    said = f"model.name={model}"  # by the name's first part
    named = sorted(override for override in overrides if not UNNAMED.match(override) and override != said)
    name = re.sub(r"[^\w.=+-]+", "-", "_".join([model, *named])).strip("-")
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def sweep_name(model: str, overrides: Sequence[str]) -> str:
    """Name of a sweep from its overrides, models that it varies included: the same command continues the same sweep."""
    swept = [override.partition("=")[2] for override in overrides if re.match(r"model=.*,", override)]
    return default_run_name(swept[0] if swept else model, list(overrides))


def by(name: str, table: dict) -> object:
    """What a table has for a name: a value that goes with another one which is swept (conf/experiment/).

    Raises:
        KeyError: it has nothing.
    """
    if name not in table:
        raise KeyError(f"there is nothing for {name}, only for {', '.join(map(str, table))}")
    value = table[name]
    return OmegaConf.create(value) if isinstance(value, list | dict) else value


OmegaConf.register_new_resolver("by", by, replace=True)  # ${by:${model.name},{a: 1, b: 2}}


# Of conf/pretrain.yaml: hydra.sweep.dir and train.max_steps
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("without_phases", without_phases, replace=True)


def explain(error: Exception, program: str = "pretrain") -> ConfigError:
    """What Hydra or OmegaConf complain of, while composing or later, as one line with the nearest name that exists."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [name for name in error.options or [] if not name.startswith("_")]
        near = difflib.get_close_matches(option, options, n=1)
        remedy = f"{f'did you mean {near[0]}? ' if near else ''}choose one of {', '.join(options)}"
        extra = EXTRAS.get((group, option))
        if extra:
            remedy = f"pip install 'v4train[{extra}]'"
        return ConfigError(group, option, "there is no such option", remedy)
    if isinstance(error, OverrideParseException):
        return ConfigError("override", error.override, "Hydra can't read it", "write key=value, quoted for the shell")
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'", text):
        key, values = match.groups()
        return ConfigError(key, values, "several values", f"write {key}=[{values}] for a list; -m runs each of them")
    if match := re.match(r"Error merging override [+~]*([^=]+)=?(.*)", text):
        key, value = match.groups()
        rule = "it can't be set: a list has no such entry, or the value is of another kind"
        return ConfigError(
            key, value or "?", rule, "conf/ shows typical values; a list can be written whole, key=[...]"
        )
    match = re.search(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and match:
        key = match.group(1).partition("@")[0]
        if key.startswith("parallelism.deepspeed"):
            return ConfigError(key, "?", "keys passed through to DeepSpeed are added", f"write +{key}.<key>=<value>")
        near = difflib.get_close_matches(key, _known_keys(program), n=1, cutoff=0.7)
        return ConfigError(key, "?", "unknown key", f"did you mean {near[0]}?" if near else "conf/ shows all keys")
    if isinstance(error, ConfigAttributeError | ConfigKeyError | MissingMandatoryValue) and error.full_key:
        return ConfigError(error.full_key, "missing", "it has no value", "set it; conf/ shows typical ones")
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return ConfigError(error.full_key, "?", str(error.msg or error).splitlines()[0], "conf/ shows all keys")
    return ConfigError("config", "?", text, "conf/ shows all keys")


def explain_entry(error: ValueError, overrides: Iterable[str]) -> ConfigError:
    """What OmegaConf says of a list's entry that is named by a word, as one line. Raises any other error as it is."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if str(error) == f"invalid literal for int() with base 10: {key.rpartition('.')[2]!r}":
            return ConfigError(key, value, "entries of a list are numbered", "write the whole list, key=[...]")
    raise error


def _known_keys(program: str) -> set[str]:
    """Every key that can be set, of a run's Hydra and of all launchers too."""
    keys: set[str] = set()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for launcher in ("local", "slurm") if program == "pretrain" else (None,):
            overrides = [] if launcher is None else [f"hydra/launcher={launcher}"]
            config = compose(program, overrides, return_hydra_config=launcher is not None)
            keys.update(_keys(OmegaConf.to_container(config, resolve=False), ""))
    return keys


def _keys(values: dict, prefix: str) -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
