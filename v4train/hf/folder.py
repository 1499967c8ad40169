"""A folder that is there whole or not at all, for what is exported and imported."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from v4train.errors import ConfigError


def check_free(out: str) -> None:
    """Raise ConfigError (out) unless a new folder can have this name: nothing is there, or an empty folder."""
    path = Path(out)
    if not out or (path.exists() and not path.is_dir()):
        raise ConfigError("out", out, "a folder to write is needed", "give out=FOLDER")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError("out", out, "the folder is not empty", "name a new one, or delete what is there")


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A folder beside `out` to be filled; it takes that name at the end. Where the block fails nothing is left of it.

    Raises:
        ConfigError: `out` is taken, or can't be written.
    """
    check_free(out)
    final = Path(out).resolve()
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError("out", out, f"it can't be written ({error.strerror})", "name a folder that can") from error
    try:
        yield temporary
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
