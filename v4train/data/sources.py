"""Where text comes from: documents (one file each) and their split into training and validation."""

import glob
import hashlib
import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from v4train.data.config import SourceConfig
from v4train.data.problems import EMPTY, UNDECODABLE, Problems
from v4train.errors import ConfigError

# Not library text: other packages, the library's own tests (a third of it), what is written by the build of one
# machine, and lib2to3, which newer Pythons lack.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_STDLIB_BUILD_FILES = ("_sysconfigdata_", "config-")

logger = logging.getLogger("v4train")


@dataclass(frozen=True)
class Document:
    """One file, or the bytes [start, stop) of one; its text is read when asked for."""

    name: str  # POSIX path relative to the source's root: sorts and splits the documents
    path: Path
    digest: str  # SHA-256 of the whole file
    start: int
    stop: int

    def read(self) -> str:
        """The text, UTF-8; bytes that aren't become U+FFFD."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Documents:
    """A source's documents, split; no document and no content is on both sides."""

    source: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the side, name, extent and content of every document; the same on every machine."""
        digest = hashlib.sha256()
        for side, documents in (("train", self.train), ("validation", self.validation)):
            for document in documents:
                digest.update(os.fsencode(f"{side}\0{document.name}\0{document.start}\0{document.stop}\0"))
                digest.update(document.digest.encode())
        return digest.hexdigest()


def find_documents(config: SourceConfig) -> Documents:
    """The documents of `config`, split into training and validation.

    A document is held out when the SHA-256 of its name, as a fraction of its range, lies below `validation_fraction`,
    the same on every machine; unless it is larger than that fraction of all the text, so that no single file
    (pydoc_data/topics.py of the standard library) makes up the validation set. Where that leaves a side empty, the
    document of smallest hash is held out, or the one of largest hash kept; a single document is cut in two at a line
    boundary, its end held out. Copies of another file's content are left out; so are empty files and binary ones (with
    a zero byte) with on_error=skip, which keeps U+FFFD in place of bytes that aren't UTF-8.
    Raises ConfigError (data.*), and with on_error=error DataError for such files.
    """
    documents, skipped = _read_index(SOURCES[config.source](config.path), Problems(config.on_error))
    level = logging.DEBUG if config.source == "stdlib" else logging.INFO  # that one is the same every time
    if skipped:
        logger.log(level, "%s: left out %s", config.source, ", ".join(f"{n} {what}" for what, n in skipped.items()))
    if not documents:
        raise ConfigError("data.path", config.path, "no text in any file", "name files with text in them")
    train, validation = _split(documents, config.validation_fraction)
    return Documents(config.source, tuple(train), tuple(validation))


def stdlib_files(path: Any) -> dict[str, Path]:
    """Name -> file of the standard library's own sources (of the running Python, or of the library folder `path`)."""
    root = Path(sysconfig.get_path("stdlib") if path is None else str(path)).expanduser()
    found = {}
    for file in _walk(root, _STDLIB_LEFT_OUT):
        name = file.relative_to(root)
        if file.suffix == ".py" and not name.parts[0].startswith(_STDLIB_BUILD_FILES):
            found[name.as_posix()] = file
    if not found:
        raise ConfigError(
            "data.path",
            path if path is not None else root,
            "no such folder, or no .py file of a standard library in it",
            "name a Python's library folder (data.path=/usr/lib/python3.11), or use data=text data.path=<files>",
        )
    return dict(sorted(found.items()))


def text_files(path: Any) -> dict[str, Path]:
    """Name -> file of every file that `path` (a file, folder, glob, or list of these) stands for.

    Folders are searched to any depth, hidden files and folders left out. Names are relative to the deepest folder that
    holds them all.
    """
    entries = [path] if isinstance(path, str | os.PathLike) or not isinstance(path, Sequence) else list(path)
    files: set[Path] = set()
    for entry in entries or [None]:
        found = _expand(entry)
        if not found:
            raise ConfigError(
                "data.path",
                entry,
                "no such file, folder or glob match",
                "name text files that exist: data.path=<file, folder, glob or [list]>",
            )
        files.update(found)
    root = os.path.commonpath([file.parent for file in files])
    return dict(sorted((file.relative_to(root).as_posix(), file) for file in files))


SOURCES: dict[str, Callable[[Any], dict[str, Path]]] = {"stdlib": stdlib_files, "text": text_files}


def _expand(entry: Any) -> list[Path]:
    if entry is None or str(entry) == "":
        return []
    named = Path(str(entry)).expanduser().absolute()
    matches = [named] if named.exists() else [Path(match) for match in glob.glob(str(named), recursive=True)]
    return [
        Path(os.path.normpath(file)) for match in matches for file in ([match] if match.is_file() else _walk(match))
    ]


def _walk(root: Path, left_out: Set[str] = frozenset()) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in left_out]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _read_index(files: dict[str, Path], problems: Problems) -> tuple[list[Document], Counter[str]]:
    """The documents, and how many files were left out for what."""
    documents: dict[str, Document] = {}  # by content: a copy on the other side of the split would leak
    skipped: Counter[str] = Counter()
    for name, path in files.items():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                "data.path", path, f"can't be read ({error.strerror})", "make it readable, or leave it out"
            ) from error
        if problems.policy == "error":
            _check(name, content, problems)
        digest = hashlib.sha256(content).hexdigest()
        if not content:
            skipped["empty files"] += 1
        elif b"\0" in content:
            skipped["binary files"] += 1
        elif digest in documents:
            skipped["copies"] += 1
        else:
            documents[digest] = Document(name, path, digest, 0, len(content))
    return list(documents.values()), skipped


def _check(name: str, content: bytes, problems: Problems) -> None:
    if not content:
        problems.report(EMPTY, name, None, "no text")
    if b"\0" in content:
        problems.report(UNDECODABLE, name, None, "a binary file: it holds a zero byte")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        problems.report(UNDECODABLE, name, None, str(error))


def split_position(name: str) -> float:
    """SHA-256 of a document's name, as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6]) / 2**48


def _split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    if len(documents) == 1:
        return _cut(documents[0], fraction)
    share = fraction * sum(document.stop for document in documents)
    positions = {document: split_position(document.name) for document in documents}
    validation = {document for document in documents if positions[document] < fraction and document.stop <= share}
    if not validation:
        validation = {min(documents, key=positions.__getitem__)}
    elif len(validation) == len(documents):
        validation.remove(max(documents, key=positions.__getitem__))
    return [d for d in documents if d not in validation], [d for d in documents if d in validation]


def _cut(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    """One document cut after the last line end before its final `fraction`, else after the first line end."""
    content = document.path.read_bytes()
    cut = content.rfind(b"\n", 0, round(len(content) * (1 - fraction))) + 1 or content.find(b"\n") + 1
    if not 0 < cut < len(content):
        raise ConfigError(
            "data.path",
            document.path,
            "one file of one line can't be split into training and validation",
            "name a file of several lines, or several files",
        )
    return [replace(document, stop=cut)], [replace(document, start=cut)]
