"""Tokenised documents, memory-mapped from the cache."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from v4train.data.cache import cached_folder
from v4train.data.sources import DataConfig, Document, Documents, find_documents
from v4train.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

_RECIPE = 1  # part of the cache key: raise it when a change here alters the files
_CHUNK_BYTES = 16 << 20  # text tokenised at a time

logger = logging.getLogger("v4train")


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents one after the other, each as BOS + tokens + EOS.

    tokens: unsigned integers [T]; offsets: int64 [D + 1], document d is tokens[offsets[d] : offsets[d + 1]].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Corpus:
    """Both sides of a tokenised source. `fingerprint` (hex) changes with any document, the split or the tokenizer."""

    source: str
    train: TokenizedDocuments
    validation: TokenizedDocuments
    fingerprint: str


def load_data(data: DataConfig, tokenizer: TokenizerConfig) -> tuple[Tokenizer, Corpus]:
    """What a run needs: the tokenizer and the tokens, from the cache or made there.

    Any number of processes may call it at once: one works, the others wait. Raises ConfigError (data.*, tokenizer.*).
    """
    documents = find_documents(data)
    trained = load_tokenizer(tokenizer, documents)
    return trained, load_corpus(documents, trained, tokenizer.cache_dir)


def load_corpus(documents: Documents, tokenizer: Tokenizer, cache_dir: str | Path) -> Corpus:
    """The documents' tokens, memory-mapped, from the cache or made there. Raises ConfigError (tokenizer.cache_dir)."""

    def build(folder: Path) -> None:
        started = time.monotonic()
        train = _write(folder, "train", documents.train, tokenizer)
        validation = _write(folder, "validation", documents.validation, tokenizer)
        seconds = time.monotonic() - started
        logger.info("%s: %d training and %d validation tokens in %.1f s", documents.source, train, validation, seconds)

    fingerprint = hashlib.sha256(f"{documents.fingerprint} {tokenizer.fingerprint} {_RECIPE}".encode()).hexdigest()
    folder = cached_folder(cache_dir, f"corpus-{fingerprint[:20]}", build)
    return Corpus(documents.source, _open(folder, "train"), _open(folder, "validation"), fingerprint)


def _write(folder: Path, side: str, documents: Iterable[Document], tokenizer: Tokenizer) -> int:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    lengths = []
    with (folder / f"{side}.tokens").open("wb") as file:
        for texts in _chunks(documents):
            for ids in tokenizer.encode_batch(texts):
                np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(dtype).tofile(file)
                lengths.append(len(ids) + 2)
    np.save(folder / f"{side}.offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    (folder / f"{side}.json").write_text(json.dumps({"dtype": dtype.str, "tokens": sum(lengths)}))
    return sum(lengths)


def _chunks(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts, size = [], 0
    for document in documents:
        texts.append(document.read())
        size += document.stop - document.start
        if size >= _CHUNK_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _open(folder: Path, side: str) -> TokenizedDocuments:
    dtype = np.dtype(json.loads((folder / f"{side}.json").read_text())["dtype"])
    tokens = np.memmap(folder / f"{side}.tokens", dtype=dtype, mode="r")
    return TokenizedDocuments(tokens, np.load(folder / f"{side}.offsets.npy"))
