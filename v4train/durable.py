"""Files that outlive a crash: on disk before they have their names, and known by their SHA-256."""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"

logger = logging.getLogger("v4train")


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(file: IO) -> None:
    """So that what was written is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> str:
    """The same for a file that is closed; its SHA-256 (hex)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """So that names given in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Write a file that is the old one or the new one, whole, whenever the machine stops."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            sync(file)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def optional(what: Path) -> Iterator[None]:
    """Around writing something that a run can do without: where the disk won't have it, the log says so."""
    try:
        yield
    except OSError as error:
        logger.warning("%s can't be written (%s): the run goes on without it", what, error.strerror or error)
