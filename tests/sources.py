"""Sources of text on disk, for tests."""

import gzip
import json
from pathlib import Path

from v4train.data.config import SourceConfig


def source(kind: str, path: Path, **others) -> SourceConfig:
    """As conf/data/ would make it, small documents only."""
    usual = {"name": None, "split": "train", "column": "text", "validation_fraction": 0.2, "epochs": None}
    usual |= {"on_error": "error", "retries": 0, "max_document_bytes": 1000, "verify": True, "recall": None}
    return SourceConfig(source=kind, path=str(path), **usual | others)


def write_jsonl(path: Path, texts: list[str]) -> None:
    """One record a text; compressed where the name ends in .gz."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
