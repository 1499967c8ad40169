"""The sources of a run: what each trains on, in lanes, and what it holds out.

stdlib and text are tokenised whole into the cache; `shards` are tokenised already; both have random access. jsonl,
parquet, arrow and hub are read and tokenised while training goes on.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from v4train.data.cache import cached_folder
from v4train.data.config import WHEN_DRY, DataConfig, SourceConfig
from v4train.data.files import Retry, find_files
from v4train.data.mixture import Mixture
from v4train.data.packing import PACKINGS, shuffled
from v4train.data.problems import POLICIES, Problems
from v4train.data.recall_stream import RecallSourceConfig, RecallStream, recall_tasks
from v4train.data.records import Reading, read_records
from v4train.data.shards import INDEX, Shards, document_hash, held_out
from v4train.data.sources import SOURCES, Document, Documents, find_documents
from v4train.data.streams import IndexedStream, Lane, Stream, TextStream
from v4train.data.texts import SHARDS, STREAMED, find_tokenizer
from v4train.data.tokenizer import Tokenizer, TokenizerConfig
from v4train.errors import ConfigError
from v4train.structured import structured
from v4train.terminal import Work

_RECIPE = 2  # part of the cache key: raise it when a change here alters the files
_CHUNK_BYTES = 16 << 20  # text tokenised at a time
STREAMED_LANES = 16

logger = logging.getLogger("v4train")


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents one after the other, each as BOS + tokens + EOS, with random access (`streams.Documents`).

    tokens: unsigned integers [T]; offsets: int64 [D + 1], document d is tokens[offsets[d] : offsets[d + 1]].
    """

    flat: np.ndarray
    offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        return self.offsets[documents + 1] - self.offsets[documents]

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.flat[self.offsets[document] : self.offsets[document + 1]][start:stop]

    def trained(self, documents: np.ndarray) -> np.ndarray:
        return np.ones(len(documents), dtype=bool)


@dataclass(frozen=True)
class Source:
    """One source of a run.

    stream: opens a lane of its training documents. num_tokens: those of the training documents; None where unknown.
    most_lanes: None for any number. fingerprint (hex): changes with the documents, the split and the tokenizer, as far
    as can be told without reading everything.
    """

    name: str
    stream: Callable[[Lane], Stream]
    validation: TokenizedDocuments
    num_tokens: int | None
    most_lanes: int | None
    fingerprint: str


@dataclass(frozen=True)
class Corpus:
    """All sources of a run, by name."""

    sources: dict[str, Source]

    @cached_property
    def fingerprint(self) -> str:
        parts = {name: source.fingerprint for name, source in self.sources.items()}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def default_lanes(self) -> int:
        """One where all documents have random access, so that all of them are shuffled together."""
        return STREAMED_LANES if any(source.num_tokens is None for source in self.sources.values()) else 1

    def check_lanes(self, lanes: int) -> None:
        """Raise ConfigError (data.lanes) where a source has no document for some lane."""
        for name, source in self.sources.items():
            if source.most_lanes is not None and lanes > source.most_lanes:
                rule = f"source {name} has only {source.most_lanes} documents to deal out"
                raise ConfigError("data.lanes", lanes, rule, f"use data.lanes={source.most_lanes} or fewer")


def check_data(data: DataConfig) -> None:
    """Raise ConfigError (data.*) where a value breaks a rule or files are missing. Reads none, asks no network."""
    for key, known in (("packing", PACKINGS), ("when_dry", WHEN_DRY)):
        if getattr(data, key) not in known:
            raise ConfigError(f"data.{key}", getattr(data, key), "unknown", f"use one of {', '.join(known)}")
    if not 0 <= data.fim_rate <= 1:
        raise ConfigError("data.fim_rate", data.fim_rate, "a share of the documents, 0 to 1", "for example 0.1")
    if data.fim_rate and any(source.recall is not None for source in data.named_sources.values()):
        rule = "a pair and its repetition would change places"
        raise ConfigError("data.fim_rate", data.fim_rate, rule, "use data.fim_rate=0 with data.recall")
    if data.workers < 0:
        raise ConfigError("data.workers", data.workers, "it can't be negative", "use 0 to read without threads")
    if data.lanes is not None and data.lanes < 1:
        raise ConfigError("data.lanes", data.lanes, "at least 1", "use null for the default")
    sources = data.named_sources
    for name, source in sources.items():
        _check_source(f"data.sources.{name}" if data.sources else "data", source)
    Mixture(list(sources), data.weights)


def _check_source(key: str, config: SourceConfig) -> None:
    known = (*SOURCES, SHARDS, *STREAMED)
    if config.source is None:
        remedy = "data.sources={code: {source: stdlib}, notes: {source: text, path: notes/}}, or data=stdlib"
        raise ConfigError(f"{key}.source", None, "nothing says where the data are", remedy)
    if config.source not in known:
        raise ConfigError(f"{key}.source", config.source, "no such source", f"one of {', '.join(known)}")
    if not 0 < config.validation_fraction < 1:
        rule = "a share between 0 and 1"
        raise ConfigError(f"{key}.validation_fraction", config.validation_fraction, rule, "for example 0.03")
    if config.on_error not in POLICIES:
        raise ConfigError(f"{key}.on_error", config.on_error, "no such policy", f"one of {', '.join(POLICIES)}")
    if config.epochs is not None and config.epochs < 1:
        raise ConfigError(f"{key}.epochs", config.epochs, "at least 1", "use null to repeat without end")
    for name, least in (("retries", 0), ("max_document_bytes", 1)):
        if getattr(config, name) < least:
            raise ConfigError(f"{key}.{name}", getattr(config, name), f"at least {least}", f"for example {least}")
    if config.recall is not None:
        structured(RecallSourceConfig, config.recall, f"{key}.recall")
        if config.source not in SOURCES:
            rule = "pairs are placed in text with random access only"
            raise ConfigError(f"{key}.recall", config.source, rule, f"use source {' or '.join(SOURCES)}")
    if config.source in SOURCES:
        try:
            SOURCES[config.source](config.path)
        except ConfigError as error:
            raise ConfigError(f"{key}.path", error.value, error.rule, error.remedy) from None
    elif config.path in (None, "", []):
        rule = f"source {config.source} needs to know where its data are"
        raise ConfigError(f"{key}.path", config.path, rule, f"name them: {key}.path=<files>")
    elif config.source == SHARDS and not (Path(str(config.path)).expanduser() / INDEX).is_file():
        rule = f"there is no {INDEX} in that folder"
        raise ConfigError(f"{key}.path", config.path, rule, "name a folder that tools/tokenize.py has written")


def load_data(
    data: DataConfig, tokenizer_config: TokenizerConfig, validation_tokens: int = 0, lengths: Iterable[int] = ()
) -> tuple[Tokenizer, Corpus]:
    """What a run needs: the tokenizer and the sources, tokens from the cache or made there.

    Any number of processes may call it at once: one works, the others wait.

    Args:
        validation_tokens: about how many a run validates on, which are all that streamed sources hold ready; 0: all.
        lengths: tokens of the rows that are to be made of the sources.

    Raises:
        ConfigError: (data.*, tokenizer.*) files that can't be read, or what rows of these lengths have no room for.
    """
    configs = data.named_sources
    tokenizer = find_tokenizer(tokenizer_config, configs)
    if data.fim_rate and tokenizer.fim_ids is None:
        rule = "the tokenizer has no tokens for fill-in-middle"
        raise ConfigError("data.fim_rate", data.fim_rate, rule, "use data.fim_rate=0 or another tokenizer")
    share = -(-validation_tokens // len(configs))
    opened = (tokenizer, tokenizer_config.cache_dir, share, tuple(lengths))
    sources = {name: _open(name, config, *opened) for name, config in configs.items()}
    corpus = Corpus(sources)
    corpus.check_lanes(data.lanes or corpus.default_lanes)
    return tokenizer, corpus


def _open(
    name: str,
    config: SourceConfig,
    tokenizer: Tokenizer,
    cache_dir: str,
    validation_tokens: int,
    lengths: tuple[int, ...],
) -> Source:
    if config.source == SHARDS:
        return _open_shards(name, config, tokenizer, validation_tokens)
    if config.source in STREAMED:
        return _open_files(name, config, tokenizer, cache_dir, validation_tokens)
    documents = find_documents(config)
    train, validation, fingerprint = tokenized(documents, tokenizer, cache_dir)
    if config.recall is not None:
        recall = structured(RecallSourceConfig, config.recall, "data.recall")
        for length in lengths:
            recall_tasks(train, tokenizer, recall, length)  # it may refuse

        def rows(lane: Lane) -> Stream:
            return RecallStream(train, tokenizer, recall, lane)

        return Source(name, rows, validation, train.num_tokens, None, f"{fingerprint} {recall}")

    def stream(lane: Lane) -> Stream:
        return IndexedStream(train, lane, config.epochs)

    return Source(name, stream, validation, train.num_tokens, train.num_documents, fingerprint)


@dataclass(frozen=True)
class _Trained:
    """Shards without the documents that are held out."""

    shards: Shards
    fraction: float
    hashes: np.ndarray = field(repr=False)

    @property
    def num_documents(self) -> int:
        return self.shards.num_documents

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        return self.shards.lengths(documents)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.shards.tokens(document, start, stop)

    def trained(self, documents: np.ndarray) -> np.ndarray:
        return ~held_out(self.hashes[documents], self.fraction)


def _open_shards(name: str, config: SourceConfig, tokenizer: Tokenizer, validation_tokens: int) -> Source:
    shards = Shards(config.path, verify=config.verify)
    shards.check_tokenizer(tokenizer.fingerprint)
    documents = _Trained(shards, config.validation_fraction, shards.hashes())
    apart = np.flatnonzero(held_out(documents.hashes, config.validation_fraction))
    if not 0 < len(apart) < shards.num_documents:
        rule = f"it holds out {len(apart)} of {shards.num_documents} documents"
        raise ConfigError("data.validation_fraction", config.validation_fraction, rule, "change it, or use more data")
    order = apart[shuffled(np.arange(len(apart)), len(apart), 0)]
    validation = _collected((shards.tokens(int(number)) for number in order), validation_tokens)

    def stream(lane: Lane) -> Stream:
        return IndexedStream(documents, lane, config.epochs)

    trained = shards.num_tokens - int(shards.lengths(apart).sum())
    fingerprint = f"{shards.fingerprint} {config.validation_fraction}"
    sizes = trained, shards.num_documents - len(apart)
    return Source(name, stream, validation, *sizes, fingerprint)


def _open_files(
    name: str, config: SourceConfig, tokenizer: Tokenizer, cache_dir: str, validation_tokens: int
) -> Source:
    if not validation_tokens:
        rule = f"source {name} is streamed: all its held-out documents are known only when everything was read"
        raise ConfigError("train.validation_tokens", 0, rule, "set how many tokens to validate on")
    retry, problems = Retry(config.retries), Problems(config.on_error)
    files = find_files(config.path, config.source, name=config.name, split=config.split, retry=retry)
    reading = Reading(config.column, config.max_document_bytes, retry, problems)
    parts = [[file.name, file.size, file.format, file.compression] for file in files]
    parts += [config.column, config.max_document_bytes, config.validation_fraction, tokenizer.fingerprint]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def build(folder: Path) -> None:
        """From the first files on; problems are reported when training meets them again."""
        quiet = Reading(config.column, config.max_document_bytes, retry, Problems(config.on_error))
        with Work(f"reading what {name} holds out") as work:
            texts = work.counted(text for file in files for text, _ in read_records(file, quiet))
            apart = (text for text in texts if held_out(document_hash(text), config.validation_fraction))
            found = _collected((_ids(tokenizer, text) for text in apart), validation_tokens)
        if not found.num_documents:
            rule = f"source {name} has no document to hold out"
            raise ConfigError("data.validation_fraction", config.validation_fraction, rule, "make it larger")
        np.save(folder / "tokens.npy", found.flat)
        np.save(folder / "offsets.npy", found.offsets)

    key = hashlib.sha256(f"{fingerprint} {validation_tokens} {_RECIPE}".encode()).hexdigest()
    folder = cached_folder(cache_dir, f"validation-{key[:20]}", build)
    validation = TokenizedDocuments(np.load(folder / "tokens.npy"), np.load(folder / "offsets.npy"))

    def stream(lane: Lane) -> Stream:
        return TextStream(files, reading, tokenizer, config.validation_fraction, lane, config.epochs)

    return Source(name, stream, validation, None, None, fingerprint)


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(text), [tokenizer.eos_id]])


def _collected(documents: Iterator[np.ndarray], num_tokens: int) -> TokenizedDocuments:
    """Documents until there are `num_tokens` tokens; 0: all."""
    found, size = [], 0
    for document in documents:
        found.append(np.asarray(document, dtype=np.uint32))
        size += len(document)
        if num_tokens and size >= num_tokens:
            break
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int64)
    return TokenizedDocuments(np.concatenate([np.zeros(0, np.uint32), *found]), offsets)


def tokenized(
    documents: Documents, tokenizer: Tokenizer, cache_dir: str | Path
) -> tuple[TokenizedDocuments, TokenizedDocuments, str]:
    """Training and validation documents, memory-mapped, from the cache or made there; and a fingerprint of both.

    Raises ConfigError (tokenizer.cache_dir).
    """

    def build(folder: Path) -> None:
        started = time.monotonic()
        size = sum(document.stop - document.start for document in (*documents.train, *documents.validation))
        with Work(f"tokenising {documents.source}", size) as work:
            train = _write(folder, "train", documents.train, tokenizer, work)
            validation = _write(folder, "validation", documents.validation, tokenizer, work)
        seconds = time.monotonic() - started
        logger.info("%s: %d training and %d validation tokens in %.1f s", documents.source, train, validation, seconds)

    fingerprint = hashlib.sha256(f"{documents.fingerprint} {tokenizer.fingerprint} {_RECIPE}".encode()).hexdigest()
    folder = cached_folder(cache_dir, f"corpus-{fingerprint[:20]}", build)
    return _map(folder, "train"), _map(folder, "validation"), fingerprint


def _write(folder: Path, side: str, documents: Iterable[Document], tokenizer: Tokenizer, work: Work) -> int:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    lengths = []
    with (folder / f"{side}.tokens").open("wb") as file:
        for texts, size in _chunks(documents):
            for ids in tokenizer.encode_batch(texts):
                np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(dtype).tofile(file)
                lengths.append(len(ids) + 2)
            work.advance(size)
    np.save(folder / f"{side}.offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    (folder / f"{side}.json").write_text(json.dumps({"dtype": dtype.str, "tokens": sum(lengths)}))
    return sum(lengths)


def _chunks(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """Texts of some documents, and the bytes of their files."""
    texts, size = [], 0
    for document in documents:
        texts.append(document.read())
        size += document.stop - document.start
        if size >= _CHUNK_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


def _map(folder: Path, side: str) -> TokenizedDocuments:
    dtype = np.dtype(json.loads((folder / f"{side}.json").read_text())["dtype"])
    tokens = np.memmap(folder / f"{side}.tokens", dtype=dtype, mode="r")
    return TokenizedDocuments(tokens, np.load(folder / f"{side}.offsets.npy"))
