"""Write the report of a run, or a comparison of several: one HTML page with pictures in it, and these as PNG files.

    python tools/report.py run=runs/flash_small                       # into runs/flash_small/report/
    python tools/report.py run=runs/flash_small out=shown/
    python tools/report.py --compare runs/a runs/b --out comparison/
    python tools/report.py 'compare=[runs/sweep_*]' out=comparison/   # the same in Hydra's way; patterns are understood

`run` is the folder of a run, finished or not; `compare` a list of such folders, where a pattern stands for those of the
matching folders that hold a run; `out` the folder that is written to, `report` in the run's own, or `comparison` here,
unless given. Prints the page's path.
"""

import glob
import json
import sys
from pathlib import Path

import yaml

from v4train.errors import ConfigError, refusing_bad_input
from v4train.structured import key_values, wants_help

KEYS = ("run", "compare", "out")


def main(arguments: list[str]) -> None:
    """Raises ConfigError."""
    if wants_help(arguments):
        return print(__doc__)
    given = key_values(without_dashes(arguments), KEYS, "give run=runs/NAME, or compare=[runs/A,runs/B]")
    if ("run" in given) == ("compare" in given):
        raise ConfigError("run", given.get("run", "missing"), "one of run and compare is wanted", "give run=runs/NAME")
    from v4train.report import compare, report  # after the arguments: it takes seconds

    try:
        if "run" in given:
            page = report(Path(given["run"]), Path(given.get("out", f"{given['run']}/report")))
        else:
            page = compare(folders(given["compare"]), Path(given.get("out", "comparison")))
    except OSError as error:
        remedy = "name a folder that can"
        raise ConfigError("out", given.get("out"), f"it can't be written ({error.strerror})", remedy) from error
    print(page)


def without_dashes(arguments: list[str]) -> list[str]:
    """`--compare a b --out c` as key=value, which other arguments are already. Raises ConfigError."""
    found, words = [], None
    given: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.startswith("--"):
            words = given.setdefault(key[2:], [])
            words += [value] if equals else []
        elif words is None or (equals and key in KEYS):
            found.append(argument)
        else:
            words.append(argument)
    for key, words in given.items():
        if key != "compare" and len(words) != 1:
            raise ConfigError(f"--{key}", " ".join(words) or "missing", "one folder is wanted", f"give --{key} DIR")
        found.append(f"{key}={json.dumps(words, ensure_ascii=False) if key == 'compare' else words[0]}")
    return found


def folders(text: str) -> list[Path]:
    """The folders that `[a,b]` names; a name with wildcards stands for the matching ones that hold a run.

    Raises:
        ConfigError: it is no such list, or no folder is meant.
    """
    from v4train.train.run_directory import RunDirectory

    try:
        names = yaml.safe_load(text if text.startswith("[") else f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError("compare", text, "it is no list", "give compare=[runs/A,runs/B]") from error
    found = []
    for name in map(str, names):
        if Path(name).is_dir() or not glob.has_magic(name):
            found.append(Path(name))
            continue
        runs = [path for path in map(Path, sorted(glob.glob(name))) if RunDirectory(path).holds_run()]
        if not runs:
            raise ConfigError("compare", name, "no folder that matches it holds a run", "give e.g. compare=[runs/*]")
        found += runs
    if not found:
        raise ConfigError("compare", text, "it names no run", "give compare=[runs/A,runs/B]")
    return found


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
