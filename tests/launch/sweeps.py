"""Sweeps of a tiny model, as a person starts them: a folder of one's own with an experiment in it."""

import csv
import os
import re
import sys
from pathlib import Path

from omegaconf import OmegaConf

from tests.distributed.launch import ROOT
from tests.runs import tiny

LIMIT = 180  # seconds that a sweep may take


def experiment(base: Path) -> list[str]:
    """Arguments that make every run of a sweep in `base` a tiny one: they are in a config folder of the user's."""
    values = [value for value in tiny(base, "") if not value.startswith(("run.", "data="))]
    text = OmegaConf.to_yaml(OmegaConf.from_dotlist(values))
    folder = base / "my_conf" / "experiment"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(f"# @package _global_\ndefaults:\n  - override /data: text\n{text}")
    return ["--config-dir", str(base / "my_conf"), "experiment=tiny"]


def command(base: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / "pretrain.py"), "-m", *experiment(base), *overrides]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PATH": path}
    return os.environ | own


def read_table(base: Path) -> tuple[Path, list[dict[str, str]]]:
    """Folder and rows of the one sweep in `base`."""
    (path,) = (base / "multirun").glob("*/sweep.csv")
    with path.open() as file:
        return path.parent, list(csv.DictReader(file))


def page_of(output: str) -> Path:
    """The page that compares, which a sweep names when it ends."""
    return Path(re.findall(r"^comparison: (.*)$", output, re.MULTILINE)[-1])
