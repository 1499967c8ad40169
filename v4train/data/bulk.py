"""Tokenise a whole source into a folder of shards, on all cores, from where an earlier process was stopped."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v4train.data.config import SourceConfig
from v4train.data.problems import Problems
from v4train.data.shards import ShardWriter, document_hash
from v4train.data.texts import source_texts
from v4train.data.tokenizer import Tokenizer

_BATCHES = 2  # encoded at a time: while ids of one become numpy arrays, the cores are busy with the other
_BATCH_CHARACTERS = min(32, os.cpu_count() or 1) << 20  # encoded batches take some 30 times as many bytes


@dataclass
class Progress:
    """How far it is; counts are of all processes that worked on the folder.

    done_bytes, total_bytes: of the source's files; total is None where unknown. new_tokens: of this process.
    skipped: bad records left out, by kind. complete: whether everything is written.
    """

    documents: int = 0
    tokens: int = 0
    shards: int = 0
    new_tokens: int = 0
    done_bytes: int = 0
    total_bytes: int | None = None
    complete: bool = False
    skipped: dict[str, int] = field(default_factory=dict)

    def count(self, tokens: int) -> None:
        """A document of so many tokens, BOS and EOS included, is written."""
        self.documents += 1
        self.tokens += tokens
        self.new_tokens += tokens


class _Text(NamedTuple):
    text: str
    hash: int
    position: dict  # what the index keeps of the place behind this text


def tokenize_source(
    config: SourceConfig,
    tokenizer: Tokenizer,
    folder: str | Path,
    shard_tokens: int,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Write all documents of a source, held-out ones too, into `folder`; a complete folder is left as it is.

    `report` is called after every batch and every shard. Killed and called again it goes on after the last whole shard,
    to the same files. Raises ConfigError (out, data.*): the folder was begun with other data or another tokenizer, or
    can't be written; DataError: bad data, with data.on_error=error.
    """
    texts, problems = source_texts(config), Problems(config.on_error)
    with ShardWriter(folder, tokenizer, f"{config.source} {texts.fingerprint}", shard_tokens) as writer:
        start = writer.position or {"texts": None, "skipped": {}}
        progress = Progress(writer.num_documents, writer.num_tokens, writer.num_shards, skipped=start["skipped"])
        progress.total_bytes, progress.complete = texts.total_bytes, writer.complete
        if writer.complete:
            progress.done_bytes = texts.total_bytes or 0
            return progress

        def skipped() -> dict[str, int]:
            old, new = start["skipped"], problems.counts
            return {kind: old.get(kind, 0) + new.get(kind, 0) for kind in sorted({*old, *new})}

        def end_shard(position: dict, last: bool) -> None:
            if last:
                writer.finish(position)
            else:
                writer.flush(position)
            progress.shards, progress.skipped, progress.complete = writer.num_shards, position["skipped"], last
            report(progress)

        read = texts.read(problems, start["texts"])
        found = (_Text(text, document_hash(text), {"texts": at, "skipped": skipped()}) for text, at in read)
        for batch, encoded in _encoded(found, tokenizer):
            for text, ids in zip(batch, encoded, strict=True):
                writer.add(ids, text.hash)
                progress.count(len(ids) + 2)
                if writer.is_full:
                    end_shard(text.position, False)
            progress.done_bytes = texts.done_bytes(batch[-1].position["texts"])
            report(progress)
        progress.done_bytes = texts.total_bytes or 0
        end_shard({"texts": None, "skipped": skipped()}, True)
        return progress


def _encoded(texts: Iterator[_Text], tokenizer: Tokenizer) -> Iterator[tuple[list[_Text], list[np.ndarray]]]:
    """Batches and the ids of each text, in order. Reading, and what the caller does, go on while others are encoded."""
    pending: deque[tuple[list[_Text], Future]] = deque()
    with ThreadPoolExecutor(_BATCHES) as pool:
        for batch in _batches(texts):
            pending.append((batch, pool.submit(tokenizer.encode_batch, [text.text for text in batch])))
            if len(pending) > _BATCHES:
                batch, encoded = pending.popleft()
                yield batch, encoded.result()
        while pending:
            batch, encoded = pending.popleft()
            yield batch, encoded.result()


def _batches(texts: Iterator[_Text]) -> Iterator[list[_Text]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
