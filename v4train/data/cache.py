"""A folder made once, by one process, and found by all the others whole or not at all."""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from v4train.durable import sha256_of, sync_file
from v4train.errors import ConfigError
from v4train.terminal import Work

MANIFEST = "manifest.json"

logger = logging.getLogger("v4train")


def cached_folder(cache_dir: str | Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `cache_dir/name`, built by `build(folder)` if it isn't there whole.

    Safe for any number of processes at once: it is built under a lock, in a temporary folder that is renamed into
    place with a manifest of its files' SHA-256. A folder that doesn't match its manifest is built again. A folder that
    is already whole needs no right to write. Raises ConfigError (tokenizer.cache_dir) where it can't be made.
    """
    root = Path(cache_dir).expanduser().absolute()
    final = root / name
    if is_whole(final):
        return final
    lock = _acquire(root, name)
    try:
        if not is_whole(final):  # another process may have made it while this one waited
            _build(root, name, build)
    finally:
        lock.release()
    return final


def is_whole(folder: Path) -> bool:
    """Whether the folder has a manifest and every file in it has the listed SHA-256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(sha256_of(folder / file) == digest for file, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _acquire(root: Path, name: str) -> FileLock:
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            started = time.monotonic()
            logger.info("waiting for another process that is making %s", root / name)
            with Work(f"waiting for {name}"):
                lock.acquire()
            logger.info("%s was made in %.1f s", root / name, time.monotonic() - started)
    except OSError as error:
        raise _not_writable(root, error) from error
    return lock


def _not_writable(root: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "tokenizer.cache_dir",
        root,
        f"tokenizer and tokens can't be kept there ({error.strerror or error})",
        "name a folder that can be written: tokenizer.cache_dir=<folder>",
    )


def _build(root: Path, name: str, build: Callable[[Path], None]) -> None:
    """Called with the lock held, so whatever lies there under a temporary name belongs to a killed process."""
    final = root / name
    for stale in root.glob(f"{name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = root / f"{name}.tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
    except OSError as error:
        raise _not_writable(root, error) from error
    try:
        build(temporary)
        manifest = {file.name: sync_file(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if final.exists():
            logger.warning("%s is damaged (its files don't match its manifest); made again", final)
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
