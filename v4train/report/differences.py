"""What the configurations of several runs differ in."""

from typing import Any

ABSENT = "-"  # a run has no such key
NAMES = ("run.name", "run.dir")  # differ always


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values by dotted key; a list is one value."""
    flat = {}
    for key, value in config.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Values of each run by dotted key, for the keys that are not the same in all of them, in order."""
    flat = [leaves(config) for config in configs]
    keys = [key for key in dict.fromkeys(key for of in flat for key in of) if key not in NAMES]
    rows = {key: [of.get(key, ABSENT) for of in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
