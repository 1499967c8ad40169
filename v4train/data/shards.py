"""Folders of tokenised documents: written shard by shard, killed and continued at will, read through memory maps.

index.json           what the folder holds, with sizes and SHA-256 of all files; lists whole shards only
tokenizer.json       what made the tokens
NNNNN.tokens         documents one after the other, each as BOS + tokens + EOS
NNNNN.offsets.npy    int64 [D + 1], document d of the shard is tokens[offsets[d] : offsets[d + 1]]
NNNNN.hashes.npy     uint64 [D], `document_hash` of each document's text
"""

import functools
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from v4train.data.tokenizer import Tokenizer
from v4train.durable import TEMPORARY, replace, sha256_of, sync, sync_folder
from v4train.errors import ConfigError

INDEX, TOKENIZER = "index.json", "tokenizer.json"
FORMAT = 1
_LOCK = ".lock"
_TOKENS, _OFFSETS, _HASHES = ".tokens", ".offsets.npy", ".hashes.npy"
_OWN_FILE = re.compile(r"(?P<shard>\d{5,})(\.tokens|\.offsets\.npy|\.hashes\.npy)(\.tmp)?")
_OPEN_SHARDS = 128  # mapped at a time: a shard's maps hold three file descriptors, of which a process often has 1024


def document_hash(text: str) -> int:
    """First 8 bytes of SHA-256 of the UTF-8 text, big-endian, in [0, 2^64): the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def held_out(hashes: Any, fraction: float) -> Any:
    """Whether documents of these hashes (an int, or uint64 of any shape) are held out for validation."""
    return hashes / 2**64 < fraction


class ShardWriter:
    """Writes a folder of shards, one shard at a time.

    Killed at any moment it leaves whole shards and an index that lists exactly these; a writer opened on the folder
    goes on from there: the caller from `position`, which it gave with the last whole shard. As a context manager it
    lets go of the folder at the end, where what belongs to no whole shard is dropped.

    Attributes:
        position: what `flush` was last given; None at the start.
        complete: whether `finish` was called, now or in an earlier process; nothing can be added then.
        num_documents, num_tokens: of the whole shards.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, source: str, shard_tokens: int = 100_000_000) -> None:
        """`source` names the documents: a folder begun with others is refused.

        Raises ConfigError (shard_tokens; out: it holds other things, documents or tokens, or another process writes).
        """
        if shard_tokens < 1:
            raise ConfigError("shard_tokens", shard_tokens, "at least one token a shard", "leave it out: 100000000")
        self.folder, self.shard_tokens = Path(folder), shard_tokens
        self._tokenizer, self._shard = tokenizer, None
        with _writing(self.folder):
            self._lock = _locked(self.folder)
        try:
            self._index = self._continue(source) if (self.folder / INDEX).exists() else self._begin(source)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def position(self) -> Any:
        return self._index["position"]

    @property
    def complete(self) -> bool:
        return self._index["complete"]

    @property
    def num_documents(self) -> int:
        return sum(shard["documents"] for shard in self._index["shards"])

    @property
    def num_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self._index["shards"])

    @property
    def num_shards(self) -> int:
        return len(self._index["shards"])

    @property
    def is_full(self) -> bool:
        """Whether the current shard holds `shard_tokens` or more, so that it is time to `flush`."""
        return self._shard is not None and self._shard.num_tokens >= self.shard_tokens

    def add(self, ids: np.ndarray | Sequence[int], hash: int) -> None:
        """Append one document, without its BOS and EOS, to the current shard. `hash`: `document_hash` of its text."""
        if self.complete:
            raise ValueError(f"{self.folder} is complete: nothing can be added")
        with _writing(self.folder):
            if self._shard is None:
                name = f"{self.num_shards:05d}"
                self._shard = _OpenShard(self.folder, name, np.dtype(self._index["dtype"]), self._tokenizer)
            self._shard.add(ids, hash)

    def flush(self, position: Any) -> None:
        """End the current shard here. `position` (JSON) is where the caller goes on, should it be killed from now."""
        self._save(position, False)

    def finish(self, position: Any = None) -> None:
        """End the last shard, and say that these are all documents."""
        self._save(position, True)

    def close(self) -> None:
        """Drop the shard that isn't whole and let go of the folder."""
        if self._shard is not None:
            self._shard.drop()
            self._shard = None
        self._lock.release()

    def _save(self, position: Any, complete: bool) -> None:
        with _writing(self.folder):
            done = [] if self._shard is None else [self._shard.seal()]
            self._shard = None
            shards = [*self._index["shards"], *done]
            self._index = self._index | {"shards": shards, "complete": complete, "position": position}
            replace(self.folder / INDEX, json.dumps(self._index, indent=1).encode())

    def _begin(self, source: str) -> dict[str, Any]:
        others = [p.name for p in self.folder.iterdir() if p.name.removesuffix(TEMPORARY) not in (_LOCK, TOKENIZER)]
        if set(others) - {INDEX + TEMPORARY}:
            rule = f"the folder holds other things ({sorted(others)[0]}) and no {INDEX}"
            raise ConfigError("out", self.folder, rule, "name a new or an empty folder")
        dtype = "<u2" if self._tokenizer.vocab_size <= 1 << 16 else "<u4"
        head = {"format": FORMAT, "tokenizer": self._tokenizer.fingerprint, "dtype": dtype, "source": source}
        index = head | {"shards": [], "complete": False, "position": None}
        with _writing(self.folder):
            replace(self.folder / TOKENIZER, self._tokenizer.json.encode())
            replace(self.folder / INDEX, json.dumps(index, indent=1).encode())
        return index

    def _continue(self, source: str) -> dict[str, Any]:
        index = read_index(self.folder, "out")
        made = {"tokenizer": self._tokenizer.fingerprint, "source": source}
        for key, value in made.items():
            if index[key] != value:
                rule = f"the folder was begun with another {key}: {index[key]} there, {value} now"
                raise ConfigError("out", self.folder, rule, f"name another folder, or give the same {key} as then")
        listed = {shard["name"] for shard in index["shards"]}
        for path in self.folder.iterdir():
            own = _OWN_FILE.fullmatch(path.name)
            if own and (own["shard"] not in listed or path.suffix == TEMPORARY):
                path.unlink()  # of a killed process
        (self.folder / (INDEX + TEMPORARY)).unlink(missing_ok=True)
        return index


class _OpenShard:
    """The shard being written, under temporary names until it is whole."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, tokenizer: Tokenizer) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._bos, self._eos = tokenizer.bos_id, tokenizer.eos_id
        self._file = self._temporary(_TOKENS).open("wb", buffering=1 << 20)
        self._digest = hashlib.sha256()
        self._lengths: list[int] = [0]
        self._hashes: list[int] = []
        self.num_tokens = 0

    def add(self, ids: np.ndarray | Sequence[int], hash: int) -> None:
        document = np.empty(len(ids) + 2, self._dtype)
        document[0], document[1:-1], document[-1] = self._bos, ids, self._eos
        self._file.write(document)
        self._digest.update(document)
        self._lengths.append(len(document))
        self._hashes.append(hash)
        self.num_tokens += len(document)

    def seal(self) -> dict[str, Any]:
        """Make it durable under its real names; its entry in the index."""
        sync(self._file)
        self._file.close()
        digests = {
            self._name + _TOKENS: self._digest.hexdigest(),
            self._name + _OFFSETS: self._store(_OFFSETS, np.cumsum(self._lengths, dtype=np.int64)),
            self._name + _HASHES: self._store(_HASHES, np.array(self._hashes, dtype=np.uint64)),
        }
        for name in digests:
            os.replace(self._folder / (name + TEMPORARY), self._folder / name)
        sync_folder(self._folder)
        sizes = {name: (self._folder / name).stat().st_size for name in digests}
        counts = {"documents": len(self._hashes), "tokens": self.num_tokens}
        return {"name": self._name, **counts, "bytes": sizes, "sha256": digests}

    def _store(self, kind: str, array: np.ndarray) -> str:
        with self._temporary(kind).open("wb+") as file:
            np.save(file, array)
            sync(file)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def drop(self) -> None:
        self._file.close()
        for kind in (_TOKENS, _OFFSETS, _HASHES):
            self._temporary(kind).unlink(missing_ok=True)

    def _temporary(self, kind: str) -> Path:
        return self._folder / (self._name + kind + TEMPORARY)


class _Map(NamedTuple):
    """One shard's files, memory-mapped."""

    tokens: np.ndarray
    offsets: np.ndarray


class Shards:
    """A complete folder of shards, memory-mapped; documents are numbered from 0 through all shards.

    May be used by several threads. Attributes:
        num_documents, num_tokens: BOS and EOS of each document included.
        tokenizer_fingerprint: `Tokenizer.fingerprint` (hex) of what made the tokens; its JSON is at `tokenizer_path`.
        fingerprint: SHA-256 (hex) over the checksums of all files: another one is other data.
        source: the documents' name, as given to the writer.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        """`verify`: compare SHA-256 of all files (reads everything once); without, only their sizes.

        Raises ConfigError (data.path): no index, an incomplete folder, or a file that is missing, cut short or altered.
        """
        self.folder = Path(folder).expanduser().absolute()
        self._index = read_index(self.folder, "data.path")
        self.source: str = self._index["source"]
        if not self._index["complete"]:
            rule = f"tokenising it isn't finished ({len(self._index['shards'])} whole shards so far)"
            raise ConfigError("data.path", folder, rule, "run the same tools/tokenize.py command again: it goes on")
        if not self._index["shards"]:
            raise ConfigError("data.path", folder, "it holds no document", "tokenise files with text in them")
        self._names = [shard["name"] for shard in self._index["shards"]]
        self._starts = np.cumsum([0, *(shard["documents"] for shard in self._index["shards"])])
        self._first = self._starts.tolist()  # the same, for bisect
        self.num_documents = int(self._starts[-1])
        self.num_tokens = sum(shard["tokens"] for shard in self._index["shards"])
        self.tokenizer_path = self.folder / TOKENIZER
        self.tokenizer_fingerprint: str = self._index["tokenizer"]
        checksums = [self._index["tokenizer"], *(shard["sha256"] for shard in self._index["shards"])]
        self.fingerprint = hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
        self._check_files(verify)
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._map)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise ConfigError (data.path) unless the tokens were made by the tokenizer of this fingerprint."""
        if fingerprint != self.tokenizer_fingerprint:
            rule = f"its tokens were made by tokenizer {self.tokenizer_fingerprint}, the run has {fingerprint}"
            remedy = f"use tokenizer.path={self.tokenizer_path}, or tokenise anew with the run's tokenizer"
            raise ConfigError("data.path", self.folder, rule, remedy)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """int64, as many and shaped as `documents` (int64): tokens of each, BOS and EOS included."""
        documents = np.asarray(documents, dtype=np.int64)
        flat = documents.ravel()
        if flat.size and not (flat.min() >= 0 and flat.max() < self.num_documents):
            raise IndexError(f"documents {flat.min()} to {flat.max()} of {self.num_documents}")
        shards = np.searchsorted(self._starts, flat, side="right") - 1
        order = np.argsort(shards, kind="stable")
        lengths = np.empty(flat.shape, np.int64)
        for group in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if flat.size else []:
            shard = int(shards[group[0]])
            local, offsets = flat[group] - self._starts[shard], self._shard(shard).offsets
            lengths[group] = offsets[local + 1] - offsets[local]
        return lengths.reshape(documents.shape)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one document, cut at its end: a view of the file, uint16 or uint32."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        shard = bisect_right(self._first, document) - 1
        tokens, offsets = self._shard(shard)
        begin, end = offsets[document - self._first[shard] : document - self._first[shard] + 2].tolist()
        return tokens[begin:end][start:stop]

    def hashes(self) -> np.ndarray:
        """uint64 [num_documents]: `document_hash` of each document's text."""
        return np.concatenate([self._load(name + _HASHES) for name in self._names])

    def _map(self, shard: int) -> _Map:
        name = self._names[shard]
        try:
            tokens = np.memmap(self.folder / (name + _TOKENS), dtype=self._index["dtype"], mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged(name + _TOKENS, f"it can't be mapped ({error})") from error
        return _Map(np.asarray(tokens), np.asarray(self._load(name + _OFFSETS)))  # np.memmap's own slices are slow

    def _load(self, file: str) -> np.ndarray:
        try:
            return np.load(self.folder / file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged(file, f"it can't be mapped ({error})") from error

    def _check_files(self, verify: bool) -> None:
        expected = {TOKENIZER: (None, self.tokenizer_fingerprint)}
        for shard in self._index["shards"]:
            expected |= {file: (size, shard["sha256"][file]) for file, size in shard["bytes"].items()}
        for file, (size, _) in expected.items():
            try:
                found = (self.folder / file).stat().st_size
            except OSError as error:
                raise self._damaged(file, f"it is missing ({error.strerror})") from error
            if size is not None and found != size:
                raise self._damaged(file, f"it has {found} bytes, the index says {size}")
        files = expected if verify else [TOKENIZER]
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
            for file, digest in zip(files, pool.map(lambda file: sha256_of(self.folder / file), files), strict=True):
                if digest != expected[file][1]:
                    raise self._damaged(file, f"its SHA-256 is {digest}, the index says {expected[file][1]}")

    def _damaged(self, file: str, what: str) -> ConfigError:
        return ConfigError("data.path", self.folder / file, what, "copy the folder again, or tokenise into a new one")


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """The content of a folder's index. Raises ConfigError (`key`) where there is none, or it isn't one."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except OSError as error:
        rule = f"no folder of shards: {INDEX} can't be read ({error.strerror})"
        raise ConfigError(key, folder, rule, "name a folder that tools/tokenize.py wrote") from error
    except ValueError as error:
        raise ConfigError(key, folder / INDEX, f"it isn't JSON ({error})", "copy the folder again") from error
    known = {"format", "tokenizer", "dtype", "source", "shards", "complete", "position"}
    if not isinstance(index, dict) or not known <= index.keys() or index["format"] != FORMAT:
        rule = f"it isn't an index of format {FORMAT}"
        raise ConfigError(key, folder / INDEX, rule, "tokenise with this version of tools/tokenize.py")
    return index


def _locked(folder: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError("out", folder, "another process is writing there", "wait for it, or end it") from error
    return lock


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        rule = f"it can't be written ({error.strerror or error})"
        remedy = "make room or name another folder; the same command goes on after the last whole shard"
        raise ConfigError("out", folder, rule, remedy) from error
