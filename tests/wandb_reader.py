"""Offline runs of W&B, read back by its own reader, `wandb-core leet inspect`."""

import json
import subprocess
from pathlib import Path

from wandb.util import get_core_path


def read_run(path: Path) -> list[dict]:
    """The records of a .wandb file, each {"type": t, t: {...}}."""
    reader = [get_core_path(), "leet", "inspect", "-no-observability", "-json", "-run-file", str(path)]
    lines = subprocess.run(reader, capture_output=True, check=True, text=True, timeout=60).stdout.splitlines()
    return [json.loads(line) for line in lines]


def of_type(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


def history(records: list[dict]) -> list[dict]:
    return [row["item"] for row in of_type(records, "history")]


def offline_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def ending(records: list[dict]) -> tuple[bool, int]:
    """Whether the run was marked as preempting before its end, and its exit code."""
    kinds = [record["type"] for record in records]
    assert kinds.count("exit") == 1, kinds
    return "preempting" in kinds[: kinds.index("exit")], of_type(records, "exit")[0].get("exit_code", 0)
