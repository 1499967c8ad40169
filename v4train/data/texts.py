"""All texts of a source, read once from the start: for tokenising a source in advance and for training a tokenizer."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from v4train.data.config import SourceConfig
from v4train.data.files import Retry, find_files
from v4train.data.problems import Problems
from v4train.data.records import Reading, read_records
from v4train.data.shards import TOKENIZER, document_hash, held_out
from v4train.data.sources import find_documents
from v4train.data.tokenizer import Tokenizer, TokenizerConfig, cached_tokenizer, existing_tokenizer, first_bytes
from v4train.errors import ConfigError

SHARDS = "shards"  # a source that is tokenised already
STREAMED = ("jsonl", "parquet", "arrow", "hub")
_SAMPLED_FILES = 32  # of a streamed source, evenly over all (they may be sorted), that a tokenizer is trained from

Position = list[int]


class IndexedTexts:
    """Texts of a source that has one document a file (stdlib, text). A position is [number of the next document].

    Attributes:
        fingerprint: hex, changes with any document.
        total_bytes: of all files; None where unknown.
    """

    def __init__(self, config: SourceConfig) -> None:
        """Raises ConfigError (data.*)."""
        self._documents = find_documents(config)
        self._all = (*self._documents.train, *self._documents.validation)
        self._ends = [0, *accumulate(document.stop - document.start for document in self._all)]
        self.fingerprint = self._documents.fingerprint
        self.total_bytes: int | None = self._ends[-1]

    def read(self, problems: Problems, position: Position | None = None) -> Iterator[tuple[str, Position]]:
        """The texts from `position` on, each with the position after it."""
        first = position[0] if position else 0
        for number, document in enumerate(self._all[first:], first):
            yield document.read(), [number + 1]

    def done_bytes(self, position: Position) -> int:
        """Of `total_bytes`, how many lie before the position."""
        return self._ends[position[0]]

    def training_texts(self, max_bytes: int) -> Iterator[str]:
        """Texts that aren't held out, up to `max_bytes` of them."""
        return first_bytes((document.read() for document in self._documents.train), max_bytes)


class StreamedTexts:
    """Texts of a source's files, one file after the other by name; otherwise as IndexedTexts.

    A position is [number of the file, *position in it of `read_records`].
    """

    def __init__(self, config: SourceConfig) -> None:
        """Raises ConfigError (data.*)."""
        self._config, self._retry = config, Retry(config.retries)
        self._files = find_files(config.path, config.source, name=config.name, split=config.split, retry=self._retry)
        sizes = [file.size for file in self._files]
        self._starts = [0, *accumulate(size or 0 for size in sizes)]
        self.total_bytes = None if None in sizes else self._starts[-1]
        files = [(file.name, file.size, file.format, file.compression) for file in self._files]
        chosen = json.dumps([files, config.column, config.max_document_bytes])
        self.fingerprint = hashlib.sha256(chosen.encode()).hexdigest()

    def read(self, problems: Problems, position: Position | None = None) -> Iterator[tuple[str, Position]]:
        """Raises DataError, as `problems` wants it."""
        first, *inside = position or [0]
        for number in range(first, len(self._files)):
            for text, after in self._records(number, problems, inside or None):
                yield text, [number, *after]
            inside = []

    def done_bytes(self, position: Position) -> int:
        number, offset = position[:2]
        file = self._files[number]
        inside = offset if file.format == "jsonl" and not file.compression else 0  # else it is no place in the file
        return self._starts[number] + inside

    def training_texts(self, max_bytes: int) -> Iterator[str]:
        """From several files an equal share each, and what one leaves of its share goes to those after it."""
        numbers = range(0, len(self._files), -(-len(self._files) // _SAMPLED_FILES))
        problems = Problems(self._config.on_error)
        for place, number in enumerate(numbers):
            texts = (text for text, _ in self._records(number, problems, None) if not self._is_held_out(text))
            for text in first_bytes(texts, max(1, max_bytes // (len(numbers) - place))):
                max_bytes -= len(text.encode())
                yield text

    def _records(self, number: int, problems: Problems, position: Position | None) -> Iterator[tuple[str, Position]]:
        reading = Reading(self._config.column, self._config.max_document_bytes, self._retry, problems)
        return read_records(self._files[number], reading, position)

    def _is_held_out(self, text: str) -> bool:
        return held_out(document_hash(text), self._config.validation_fraction)


def source_texts(config: SourceConfig) -> IndexedTexts | StreamedTexts:
    """All texts of a source. Raises ConfigError (data.*)."""
    if config.source == SHARDS:
        raise ConfigError("data.source", SHARDS, "it is tokenised already", "name the source of the text")
    return StreamedTexts(config) if config.source in STREAMED else IndexedTexts(config)


def find_tokenizer(config: TokenizerConfig, sources: Mapping[str, SourceConfig]) -> Tokenizer:
    """A run's tokenizer: `tokenizer.path`, that of the first source of shards, or one trained on the training texts.

    Of several sources each gives an equal share of `tokenizer.train_bytes`. It is cached; many processes may call at
    once. Raises ConfigError (tokenizer.*, data.*).
    """
    if config.path is not None:
        return existing_tokenizer(config.path, config.vocab_size)
    for source in sources.values():
        if source.source == SHARDS:
            return existing_tokenizer(Path(source.path) / TOKENIZER, config.vocab_size)
    found = [(source_texts(source), source) for source in sources.values()]
    parts = [
        texts.fingerprint
        if isinstance(texts, IndexedTexts)  # which knows the side of each document
        else f"{texts.fingerprint} {source.validation_fraction}"
        for texts, source in found
    ]
    share = max(1, config.train_bytes // len(found))
    return cached_tokenizer(
        config, " ".join(parts), lambda: (text for texts, _ in found for text in texts.training_texts(share))
    )
