"""Names of runs for a legend: short, and what tells them apart is kept."""

from os.path import commonprefix

SEPARATOR = "_"  # between the overrides that a run's name is made of
LONGEST = 40
HEAD = 18  # characters kept of the start of a longer one


def short_names(names: list[str]) -> list[str]:
    """The names without the parts that all of them begin or end with, at least one part of each being left.

    What is longer even so loses its middle: its ends are what differs between the runs.
    """
    parts = [name.split(SEPARATOR) for name in names]
    parts = _without_prefix(parts)
    parts = [part[::-1] for part in _without_prefix([part[::-1] for part in parts])]
    return [_cut(SEPARATOR.join(part)) for part in parts]


def _without_prefix(parts: list[list[str]]) -> list[list[str]]:
    common = min(len(commonprefix(parts)), min(map(len, parts), default=1) - 1)
    return [part[common:] for part in parts]


def _cut(name: str) -> str:
    if len(name) <= LONGEST:
        return name
    return f"{name[:HEAD]}...{name[HEAD + 3 - LONGEST :]}"
