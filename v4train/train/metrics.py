"""What a run leaves in numbers: `metrics.jsonl`, one JSON object a line, and `summary.json`.

JSON has no NaN and no infinity, and a diverged loss is worth keeping, so these are written as the strings "nan", "inf"
and "-inf". `read_metrics` turns them back into floats; elsewhere `float(value)` does.
"""

import errno
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

from v4train import durable

logger = logging.getLogger("v4train")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsFile:
    """Appends records to a file, each one safe on disk's side of the process before `write` returns.

    Where the file can't be written (a full disk, a folder that is gone) records wait in memory for the next one, and
    the log says so.

    Args:
        path: the file; its folder is created. An existing file is continued: on resume call `truncate_after` first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._waiting, self._warned = Path(path), b"", False
        self._open()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. Values: numbers, strings, None, one-element tensors or arrays, lists and dicts of these.

        Raises:
            KeyError: the record has no "step", by which a resumed run decides what to keep.
        """
        if "step" not in record:
            raise KeyError("a metrics record needs the key 'step'")
        self._waiting += _to_json(record).encode() + b"\n"
        self.flush()  # a killed process loses no line (a power cut may: that is not worth an fsync every step)

    def flush(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        if not self._waiting:
            return True
        try:
            if self._file is None or not self.path.exists():
                self._open()
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._drop_torn_line()
            if not self._warned:
                what = error.strerror or error
                logger.warning("%s can't be written (%s): its lines wait in memory, training goes on", self.path, what)
            self._warned = True
            return False
        self._size, self._waiting, self._warned = self._size + len(self._waiting), b"", False
        return True

    def truncate_after(self, step: int) -> None:
        """Keep the lines whose step is at most `step`, in order; drop the rest and whatever is no complete record.

        Atomic: a kill in the middle leaves the old file or the new one.
        """
        self._replace(_lines_up_to(self.path, step))

    def keep_first(self, count: int) -> None:
        """Keep the first so many complete records; atomic as well."""
        self._replace(islice(_lines_up_to(self.path, sys.maxsize), count))

    def _replace(self, lines: Iterable[bytes]) -> None:
        self.close()
        durable.replace(self.path, b"".join(lines))
        self._open()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: FileIO | None = self.path.open("ab", buffering=0)
        self._size = self.path.stat().st_size

    def _drop_torn_line(self) -> None:
        """The disk has taken a part: the whole comes again."""
        self.close()
        with suppress(OSError):
            if self.path.stat().st_size > self._size:
                os.truncate(self.path, self._size)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file, oldest first; a line torn by a kill is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with Path(path).open("rb") as file:
        records = map(_parse, file)
        return [_restore_floats(record) for record in records if record is not None]


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write one indented JSON object, atomically; values as in `MetricsFile.write`."""
    durable.replace(Path(path), _to_json(summary, indent=2).encode() + b"\n")


def read_summary(path: str | Path) -> dict[str, Any]:
    """What `write_summary` has written.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return _restore_floats(json.loads(Path(path).read_text(encoding="utf-8")))


def _lines_up_to(path: Path, step: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None and record["step"] <= step:
                yield line.rstrip() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None. A proper prefix of a JSON object is never one, so a torn line shows."""
    try:
        record = json.loads(line)
    except ValueError:  # bad JSON or bad UTF-8
        return None
    complete = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if complete else None


def _to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _plain(value: Any) -> Any:
    """The same value in what JSON knows: tensor and array scalars as numbers, non-finite floats as strings."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf" or "-inf"
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _restore_floats(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restore_floats(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_restore_floats(entry) for entry in value]
    return value
