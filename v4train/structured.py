"""From a Hydra node to a typed dataclass, with one clear line for an unknown key or a wrong type."""

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from v4train.errors import ConfigError

T = TypeVar("T")


def structured(kind: type[T], node: DictConfig | dict, prefix: str) -> T:
    """Instance of dataclass `kind` from `node`, interpolations resolved.

    Args:
        prefix: where the node stands in the whole configuration, e.g. `model`, for messages; empty at the top.

    Raises:
        ConfigError: a key that `kind` lacks (with the nearest one it has), a missing key, or a wrong type.
    """
    if not isinstance(node, DictConfig | dict):
        raise ConfigError(prefix, node, "a group of keys is expected", "set single keys of it; conf/ shows them")
    values = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    _check_keys(kind, values, prefix)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        rule = str(error.msg or error).splitlines()[0].rstrip(".")
        remedy = "give a value of that type" if key else "see conf/ for the keys"
        raise ConfigError(_join(prefix, key), _look_up(values, key), rule, remedy) from error


def key_values(arguments: Iterable[str], known: Iterable[str], example: str) -> dict[str, str]:
    """Values by key of a program's key=value arguments.

    Raises:
        ConfigError: one that isn't (the remedy is `example`), or a key that isn't among `known` (with the nearest).
    """
    given, known = {}, list(known)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError("argument", argument, "it is not key=value", example)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(key, value, "unknown key", remedy)
        given[key] = value
    return given


def wants_help(arguments: Iterable[str]) -> bool:
    """Whether a program's arguments ask what it is for: it then prints its docstring, and does nothing else."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def _check_keys(kind: type, values: dict[str, Any], prefix: str) -> None:
    known = {field.name: field.type for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {_join(prefix, near[0])}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(_join(prefix, key), value, "unknown key", remedy)
        if (
            known[key] is bool and isinstance(value, int | float) and not isinstance(value, bool)
        ):  # OmegaConf: 3 is true
            raise ConfigError(_join(prefix, key), value, "it is true or false", "give one of them")
        if is_dataclass(known[key]) and isinstance(value, dict):
            _check_keys(known[key], value, _join(prefix, key))
    for key in known:
        if key not in values:
            raise ConfigError(_join(prefix, key), "missing", "it has no value", "set it; conf/ shows typical ones")


def _join(prefix: str, key: str) -> str:
    return ".".join(part for part in (prefix, key) if part)


def _look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, "?") if isinstance(values, dict) else "?"
    return values
