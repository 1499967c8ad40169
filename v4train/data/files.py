"""Files of a streamed source, wherever they are: found by path, glob, URL or Hub name, and opened for reading."""

import glob
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

from v4train.data.remote import RemoteFile, Retry, open_remote
from v4train.errors import ConfigError

FORMATS = {  # source -> formats it takes
    "jsonl": ("jsonl",),
    "parquet": ("parquet",),
    "arrow": ("arrow",),
    "hub": ("jsonl", "parquet", "arrow", "text"),
}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of JSON lines only

# What `datasets` writes beside the data.
_NO_DATA = re.compile(r"(dataset_dict|dataset_infos?|state)\.json|cache-[0-9a-f]+.*\.arrow")
_PROBES = 16  # addresses asked for at the same time

logger = logging.getLogger("v4train")


@dataclass(frozen=True)
class DataFile:
    """One file of a source."""

    url: str  # absolute local path, or http(s) URL
    name: str  # for messages and hashes: relative to the deepest folder that holds all the source's files
    size: int | None  # bytes, where known without reading it
    format: str  # jsonl, parquet, arrow or text
    compression: str  # "", gzip or zstd


def find_files(path: Any, source: str, *, name: str | None, split: str, retry: Retry) -> list[DataFile]:
    """The files that `path` stands for, sorted by name.

    Args:
        path: a file, a folder (searched to any depth, hidden files left out), a glob (** for any depth), an http(s) URL
            of a file, or of a folder when it ends in "/" (the links of its listing page); for `hub` also a dataset's
            name on the Hugging Face Hub, and a folder is read as `datasets` would, split by split; or a list of these.
        source: jsonl, parquet, arrow or hub. In folders, listings and globs, files with other suffixes are left out.
        name: which config of a Hub dataset or dataset folder; None for its only or default one.
        split: of a Hub dataset or dataset folder.
        retry: for what is asked of the network.
    Raises:
        ConfigError: data.path, data.name or data.split, with the entry that stands for nothing or can't be read.
    """
    if source not in FORMATS:
        raise ConfigError("data.source", source, "no source of files", f"one of {', '.join(FORMATS)}")
    entries = [path] if isinstance(path, str | os.PathLike) or not isinstance(path, Sequence) else list(path)
    search = _Search(source, name, split, retry)
    with ThreadPoolExecutor(_PROBES) as pool:
        found = [file for files in pool.map(search.expand, entries or [None]) for file in files]
    return _named(list({file.url: file for file in found}.values()))


def open_file(file: DataFile, retry: Retry) -> BinaryIO:
    """`file` for reading: seekable, buffered.

    A remote file is read by range requests; whatever fails is tried again from the byte reached. A server that knows no
    ranges has its file copied to a temporary one first, which goes when it is closed.

    Raises, here and in reading:
        FileNotFoundError: no such file, or the server refuses it (HTTP 4xx).
        ConnectionError: out of attempts; names the file and the last cause.
        OSError: the remote file changed while it was read (ESTALE), or a local failure.
    """
    return open_remote(file.url, file.name, retry) if _is_url(file.url) else open(file.url, "rb")


def _is_url(entry: str) -> bool:
    return re.match(r"https?://", entry) is not None


def _kind(name: str, source: str) -> tuple[str, str] | None:
    """Format and compression by suffix; None where `source` doesn't take it."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    format = SUFFIXES.get(os.path.splitext(stem)[1] if compression else suffix)
    if format not in FORMATS[source] or (compression and format != "jsonl"):
        return None
    return format, compression


def _parts(url: str) -> tuple[str, ...]:
    if not _is_url(url):
        return Path(url).parts
    address = urlsplit(url)
    return (f"{address.scheme}://{address.netloc}", *unquote(address.path).strip("/").split("/"))


def _named(files: list[DataFile]) -> list[DataFile]:
    """`files` named relative to the deepest folder that holds them all, and sorted by that name."""
    depth = len(os.path.commonprefix([_parts(file.url)[:-1] for file in files]))
    named = [replace(file, name="/".join(_parts(file.url)[depth:])) for file in files]
    return sorted(named, key=lambda file: (file.name, file.url))


@dataclass(frozen=True)
class _Search:
    """What `find_files` was asked for, applied to one entry of its path at a time."""

    source: str
    name: str | None
    split: str
    retry: Retry

    def expand(self, entry: Any) -> list[DataFile]:
        try:
            found = self._expand(str(entry)) if entry is not None and str(entry) else []
        except OSError as error:
            remedy = "check the path or address, that it may be read, and the network"
            raise ConfigError("data.path", entry, " ".join(str(error).split()), remedy) from error
        if not found:
            rule = f"no such file, folder, glob match or address, or no {' or '.join(FORMATS[self.source])} file in it"
            remedy = "name files that exist: data.path=<file, folder, glob, URL or [list]>"
            if self.source == "hub":
                remedy = "name files that exist, or a dataset of the Hub: data.path=<file, folder, URL or org/name>"
            raise ConfigError("data.path", entry, rule, remedy)
        return found

    def _expand(self, entry: str) -> list[DataFile]:
        if _is_url(entry):
            return self._remote(entry)
        if "://" in entry:
            raise ConfigError("data.path", entry, "only http:// and https:// addresses are read", "copy the files here")
        named = Path(os.path.abspath(os.path.expanduser(entry)))
        if named.is_dir():
            return self._dataset(named) if self.source == "hub" else self._chosen(entry, map(str, _walk(named)))
        if named.exists():
            return [self._file(entry, str(named), named.stat().st_size)]
        if self.source == "hub" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", entry) and not _kind(entry, "hub"):
            return self._hub(entry)
        matches = [Path(match) for match in glob.glob(str(named), recursive=True)]
        return self._chosen(
            entry, (str(file) for match in matches for file in ([match] if match.is_file() else _walk(match)))
        )

    def _file(self, entry: str, url: str, size: int | None) -> DataFile:
        kind = _kind(urlsplit(url).path if _is_url(url) else url, self.source)
        if kind is None:
            suffixes = [suffix for suffix, format in SUFFIXES.items() if format in FORMATS[self.source]]
            rule = f"{os.path.basename(url)} has no suffix that data.source={self.source} reads"
            remedy = f"name files that end in {', '.join(suffixes)}"
            if "jsonl" in FORMATS[self.source]:
                remedy += f" (JSON lines also with {' or '.join(COMPRESSIONS)})"
            if _is_url(url):
                remedy += "; a folder's address ends in /"
            raise ConfigError("data.path", entry, rule, remedy)
        return DataFile(url, url, size, *kind)

    def _chosen(self, entry: str, urls: Iterator[str]) -> list[DataFile]:
        """Of a folder's, glob's or listing's files, those with a suffix that the source reads."""
        found, left_out = [], 0
        for url in urls:
            path = urlsplit(url).path if _is_url(url) else url
            if _kind(path, self.source) is None or _NO_DATA.fullmatch(os.path.basename(path)):
                left_out += 1
            else:
                found.append(self._file(entry, url, None if _is_url(url) else os.stat(url).st_size))
        if left_out:
            logger.info("data.path=%s: %d files left out that aren't %s by suffix", entry, left_out, self.source)
        return found

    def _remote(self, url: str) -> list[DataFile]:
        if not urlsplit(url).path:
            url += "/"
        if urlsplit(url).path.endswith("/"):
            links = _Links(url)
            with open_remote(url, url, self.retry) as page:
                links.feed(page.read().decode("utf-8", errors="replace"))
            return self._chosen(url, iter(sorted(links.urls)))
        file = self._file(url, url, None)
        with RemoteFile(url, url, self.retry) as remote:
            return [replace(file, size=remote.size)]

    def _dataset(self, folder: Path) -> list[DataFile]:
        """The split's files of a dataset's local folder: as the Hub has it, or as `save_to_disk` writes it."""
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            self._check_split(str(folder), splits)
            folder = folder / self.split
        state = folder / "state.json"
        if state.is_file():
            files = [folder / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
            return self._chosen(str(folder), (str(file) for file in files))
        found = self._hub(str(folder))
        others = sum(_kind(file.name, "hub") is not None for file in _walk(folder)) - len(found)
        if others > 0:  # `datasets` keeps to the commonest format of a folder without a README that says otherwise
            logger.info("data.path=%s: %d files of other splits, configs or formats left out", folder, others)
        return found

    def _check_split(self, entry: str, splits: Sequence[str]) -> None:
        if self.split not in splits:
            raise ConfigError("data.split", self.split, f"{entry} has no such split", f"one of {', '.join(splits)}")

    def _hub(self, dataset: str) -> list[DataFile]:
        """The split's files of a dataset, found by `datasets` as its own loader finds them."""
        import datasets  # takes seconds, and only this needs it

        try:
            found = datasets.load_dataset_builder(dataset, self.name).config.data_files or {}
        except (ValueError, RuntimeError) as error:  # of names, the message has those there are
            rule = f"{dataset}: {' '.join(str(error).split())}"
            if isinstance(error, ValueError):
                raise ConfigError("data.name", self.name, rule, "name one of the dataset's configs") from error
            raise ConfigError("data.path", dataset, rule, "name its data files themselves") from error  # a script
        self._check_split(dataset, list(found))
        urls = [_resolved(str(url)) for url in found[self.split]]
        return [self._file(dataset, url, None if _is_url(url) else os.stat(url).st_size) for url in urls]


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


class _Links(HTMLParser):
    """Addresses of the files right below `folder` that its listing page links to."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.urls = folder.partition("?")[0], set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag != "a" or not href:
            return
        url = urljoin(self.folder, href).partition("#")[0]
        below = url.partition("?")[0].removeprefix(self.folder)
        if url.startswith(self.folder) and below and "/" not in below and not below.startswith("."):
            self.urls.add(url)


def _resolved(url: str) -> str:
    """`hf://datasets/<dataset>@<revision>/<path>`, the way `datasets` names a Hub file, as an https address."""
    if not url.startswith("hf://datasets/"):
        return url
    from huggingface_hub import hf_hub_url

    dataset, _, rest = url.removeprefix("hf://datasets/").partition("@")
    revision, _, path = rest.partition("/")
    return hf_hub_url(dataset, path, repo_type="dataset", revision=unquote(revision))
