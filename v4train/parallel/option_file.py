"""The file that `tools/plan.py` writes: a layout as an option of the config group `parallelism`."""

import re
import shlex
from pathlib import Path

from v4train import durable
from v4train.analysis.memory import GIB, Memory
from v4train.analysis.work import Work
from v4train.errors import ConfigError
from v4train.overrides import config_dir
from v4train.parallel.sizes import AXES

NO_NAMES = ("null", "true", "false", "nan", "inf")  # Hydra reads something else into them
MARK = "by tools/plan.py"  # in the head of the files that it writes


def check(path: Path) -> None:
    """Raise ConfigError for a file that parallelism=<its name> wouldn't find, or that this program has not written."""
    known = config_dir() / "parallelism" / path.name
    spoken = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", path.stem) and path.stem.lower() not in NO_NAMES
    if path.suffix != ".yaml" or not spoken:
        rule = "it must be <name>.yaml, the name of letters, digits, _ and -"
        raise ConfigError("write", path, rule, "for example conf/parallelism/mine.yaml")
    if path.resolve().parent.name != "parallelism":
        rule = "an option lies in a folder that is called after its group"
        raise ConfigError("write", path, rule, f"for example {path.parent / 'parallelism' / path.name}")
    for file in (known, path):
        if file.exists() and not (file.resolve() == path.resolve() and MARK in _head(file)):
            rule = f"parallelism={path.stem} exists, and isn't of this program"
            raise ConfigError("write", path, rule, "choose another name")


def _is_shipped(path: Path) -> bool:
    """Whether it lies where Hydra looks for options anyhow."""
    return path.resolve().parent == (config_dir() / "parallelism").resolve()


def _head(file: Path) -> str:
    return file.read_text(errors="replace").partition("\n")[0] if file.is_file() else ""


def write(path: Path, model: str, work: Work, memory: Memory, overrides: list[str], rows: int | None = None) -> None:
    """The layout of `work` as an option, and in its head the command that belongs to it.

    overrides: of the run that was planned. rows: of a micro-batch; None where these say so.
    """
    room = f"{memory.total / GIB:.1f} GiB a rank by its formulas"
    own = ["parallelism", *(f"parallelism.{key}" for key in (*AXES, "expert", "zero_stage"))]
    chosen = {"parallelism": path.stem, "train.recompute": work.recompute}
    chosen |= {} if rows is None else {"train.micro_batch_size": rows}
    given = [word for word in overrides if word.lstrip("+").partition("=")[0] not in {*own, *chosen}]
    given += [f"{key}={value}" for key, value in chosen.items()]
    if not _is_shipped(path):
        folder = re.sub(r'(["\\])', r"\\\1", str(path.resolve().parent.parent))
        given.append(f'hydra.searchpath=["file://{folder}"]')
    command = shlex.join(given).replace("\n", "'$'\\n''")  # a comment is one line
    values = {
        f"data: {work.data}": "data-parallel replicas",
        f"expert: {work.expert}": "ranks that share one set of experts, among data x context",
        f"tensor: {work.tensor}": "ranks that share one matrix",
        f"pipeline: {work.pipeline}": "stages of layers",
        f"context: {work.context}": "ranks that share one sequence",
        f"zero_stage: {work.zero_stage}": "sharded: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters",
    }
    lines = [
        f"# {model} on {work.world} ranks, {MARK}: {room}.",
        f"#   srun --ntasks={work.world} --kill-on-bad-exit=1 python launch/pretrain.py {command}",
        *("defaults:", "  - auto", "  - _self_"),
        *(f"{value:20}# {meaning}" for value, meaning in values.items()),
    ]
    text = "\n".join(lines) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, text.encode())
    except OSError as error:
        raise ConfigError("write", path, f"it can't be written ({error.strerror})", "name a file that can") from error
