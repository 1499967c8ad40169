"""Texts out of the files of a streamed source, one after the other, from any position on."""

import errno
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from v4train.data import problems
from v4train.data.files import DataFile, open_file
from v4train.data.problems import Problems
from v4train.data.remote import Retry

_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 20  # bytes: of what is skipped, and of what Parquet reads at a time
_BUFFER = 1 << 17  # bytes of decompressed text
_BATCH = 8 << 20  # bytes of text that a Parquet batch aims at
_MOST_ROWS = 1024  # of a Parquet batch
# A line is longer than the text in it: up to six bytes for one (\u0041), and other columns.
_ESCAPED, _OTHER_COLUMNS = 6, 1 << 20
# How pyarrow 26 says that a stream ends too early; it has no exception of its own for that.
_CUT_SHORT = ("Truncated compressed stream", "Expected to be able to read", "Expected to read", "bytes available")
_BREAKS = (OSError, EOFError, zlib.error, pa.ArrowException)  # what reading and decoding a file may end in


@dataclass(frozen=True)
class Reading:
    """How records become texts."""

    column: str  # which holds the text
    max_document_bytes: int  # UTF-8 bytes; longer texts are bad data
    retry: Retry
    problems: Problems  # where bad data go


class _Bad(Exception):
    """A record that holds no text, or a file that holds no records: what kind of problem, and the detail."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def read_records(
    file: DataFile, reading: Reading, position: list[int] | None = None, lane: int = 0, lanes: int = 1
) -> Iterator[tuple[str, list[int]]]:
    """The texts of `file` whose record number is `lane` modulo `lanes`, each with the position after it.

    Every record has a number, from 0, bad ones too (blank lines aren't records). A bad record goes to
    `reading.problems`, reported by the lane that owns it, and is left out if that returns. So does what ends the file
    early: reported once, by the lane that owns the record at which it broke; what may befall one lane alone (a file
    that is gone, a network that is down) by each lane that meets it.

    Args:
        position: None for the start, or one that came with an earlier text: goes on with what follows that text. Its
            last entry is the number of the next record; the others depend on the format.
    Raises:
        DataError: from `reading.problems`.
    """
    records, to_text = _FORMATS[file.format]
    number = position[-1] if position else 0
    try:
        for record, after in records(file, reading, position):
            number = after[-1]  # of the record that comes next
            if (number - 1) % lanes != lane:
                continue
            try:
                text = _checked(to_text(record, reading.column), reading.max_document_bytes)
            except _Bad as bad:
                reading.problems.report(bad.kind, file.name, number - 1, bad.detail)
                continue
            yield text, after
    except _Bad as bad:
        if lane == 0 or position:
            reading.problems.report(bad.kind, file.name, None, bad.detail)
    except _BREAKS as error:
        kind = _kind(error)
        if kind in (problems.VANISHED, problems.UNREACHABLE) or number % lanes == lane:
            reading.problems.report(kind, file.name, number, str(error) or type(error).__name__)


def _kind(error: Exception) -> str:
    """The kind of problem that one of _BREAKS is."""
    if isinstance(error, FileNotFoundError | NotADirectoryError) or getattr(error, "errno", None) == errno.ESTALE:
        return problems.VANISHED
    if isinstance(error, ConnectionError) or getattr(error, "errno", None) is not None:  # a decoder's OSError has none
        return problems.UNREACHABLE
    if isinstance(error, EOFError) or any(words in str(error) for words in _CUT_SHORT):
        return problems.TRUNCATED
    return problems.MALFORMED


@contextmanager
def _footer_or_bad() -> Iterator[None]:
    """What a decoder raises within means that the file has no (whole) beginning or end: _Bad, truncated."""
    try:
        yield
    except _BREAKS as error:
        if _kind(error) in (problems.VANISHED, problems.UNREACHABLE):
            raise
        raise _Bad(problems.TRUNCATED, str(error)) from error


def _checked(text: str | bytes, most: int) -> str:
    """`text` decoded, if it is one to train on; else _Bad."""
    try:
        content = text if isinstance(text, bytes) else None if text.isascii() else text.encode("utf-8")
        size = len(text if content is None else content)
        if size > most:
            raise _Bad(problems.TOO_LARGE, f"{size} bytes of text, more than data.max_document_bytes={most}")
        if isinstance(text, bytes):
            text = text.decode("utf-8")
    except UnicodeError as error:
        raise _Bad(problems.UNDECODABLE, str(error)) from error
    if not text or text.isspace():
        raise _Bad(problems.EMPTY, "nothing but white space" if text else "no text")
    return text


# Readers: each record of a file from a position on, and the position after it. Of a record, the function of the same
# format makes text, for the lane that owns it.


def _json_lines(file: DataFile, reading: Reading, position: list[int] | None) -> Iterator[tuple[Any, list[int]]]:
    """Position: [byte offset in the decompressed file, record number]."""
    offset, number = position or (0, 0)
    most = _ESCAPED * reading.max_document_bytes + _OTHER_COLUMNS
    with _decompressed(file, reading.retry) as lines:
        _skip(lines, offset, seekable=not file.compression)
        readline = lines.readline
        while line := readline(most):
            start, offset = offset, offset + len(line)
            too_long = len(line) == most and not line.endswith(b"\n")
            while too_long and (rest := readline(_PIECE)):
                offset += len(rest)
                too_long = not rest.endswith(b"\n")
            if len(line) == most and offset - start > most:
                detail = f"a line of {offset - start} bytes, for data.max_document_bytes={reading.max_document_bytes}"
                line = _Bad(problems.TOO_LARGE, detail)
            elif line.isspace():
                continue
            elif start == 0:
                line = line.removeprefix(_BOM)
            number += 1
            yield line, [offset, number]


def _json_text(line: bytes | _Bad, column: str) -> str:
    if isinstance(line, _Bad):
        raise line
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise _Bad(problems.TRUNCATED, f"the last line ends early ({error})") from error
        kind = problems.UNDECODABLE if isinstance(error, UnicodeError) else problems.MALFORMED
        raise _Bad(kind, f"not JSON: {error}" if kind == problems.MALFORMED else str(error)) from error
    if not isinstance(values, dict):
        raise _Bad(problems.MALFORMED, f"not a JSON object but a {type(values).__name__}")
    if not isinstance(text := values.get(column), str):
        what = f"is a {type(text).__name__}" if column in values else f"isn't among {', '.join(values) or 'none'}"
        raise _Bad(problems.MISSING_COLUMN, f"data.column={column} {what}")
    return text


def _parquet(file: DataFile, reading: Reading, position: list[int] | None) -> Iterator[tuple[Any, list[int]]]:
    """Position: [row group, row within it, record number]."""
    first, skipped, number = position or (0, 0, 0)
    with _opened(file, reading.retry) as raw:
        with _footer_or_bad():
            table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=_PIECE, page_checksum_verification=True)
        _column_index(table.schema_arrow, reading.column)
        if first > table.num_row_groups:
            raise _Bad(problems.TRUNCATED, f"{table.num_row_groups} row groups, and reading had come to {first}")
        for group in range(first, table.num_row_groups):
            row = 0
            to_skip = skipped if group == first else 0
            metadata = table.metadata.row_group(group)
            if to_skip >= metadata.num_rows:
                continue
            chunks = map(metadata.column, range(metadata.num_columns))
            size = next(c.total_uncompressed_size for c in chunks if c.path_in_schema == reading.column)
            rows = min(_MOST_ROWS, 1 + _BATCH * metadata.num_rows // max(1, size))
            for batch in table.iter_batches(rows, row_groups=[group], columns=[reading.column], use_threads=False):
                column = _as_bytes(batch.column(0))
                for i in range(max(0, to_skip - row), len(column)):
                    number += 1
                    yield (column, i), [group, row + i + 1, number]
                row += len(column)


def _arrow(file: DataFile, reading: Reading, position: list[int] | None) -> Iterator[tuple[Any, list[int]]]:
    """Position: [batch, row within it, the byte where the batch begins (0 in an IPC file), record number]."""
    first, skipped, start, number = position or (0, 0, 0, 0)
    with _opened(file, reading.retry) as raw:
        for batch, begin, end, column in _arrow_batches(raw, reading.column, first, start):
            for row in range(skipped if batch == first else 0, len(column)):
                number += 1
                last = row + 1 == len(column)
                yield (column, row), [batch + 1, 0, end, number] if last else [batch, row + 1, begin, number]


def _arrow_batches(raw: BinaryIO, column: str, first: int, start: int) -> Iterator[tuple[int, int, int, pa.Array]]:
    """Number, first byte, end (both 0 in an IPC file) and column of each batch from number `first` on."""
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    with _footer_or_bad():
        schema = pa.ipc.open_file(raw).schema if is_file else pa.ipc.open_stream(raw).schema
    options = pa.ipc.IpcReadOptions(included_fields=[_column_index(schema, column)])
    raw.seek(0)
    if is_file:
        batches = pa.ipc.open_file(raw, options=options)
        if first > batches.num_record_batches:
            raise _Bad(problems.TRUNCATED, f"{batches.num_record_batches} batches, and reading had come to {first}")
        for number in range(first, batches.num_record_batches):
            yield number, 0, 0, _as_bytes(batches.get_batch(number).column(0))
        return
    batches = pa.ipc.open_stream(raw, options=options)
    number = 0
    # A stream has its dictionaries first: one with any is read through.
    if start and "dictionary<" not in str(schema.types):
        _skip(raw, start, seekable=True)
        number = first
    while True:
        start = raw.tell()
        try:
            batch = batches.read_next_batch()
        except StopIteration:
            break
        if number >= first:
            yield number, start, raw.tell(), _as_bytes(batch.column(0))
        number += 1
    if number < first:
        raise _Bad(problems.TRUNCATED, f"{number} batches, and reading had come to {first}")


def _text_file(file: DataFile, reading: Reading, position: list[int] | None) -> Iterator[tuple[Any, list[int]]]:
    """The file is one record. Position: [number of the next record]."""
    if not position or position[-1] == 0:
        with _decompressed(file, reading.retry) as content:
            text = content.read(reading.max_document_bytes + 1)
            if len(text) > reading.max_document_bytes:
                text = _Bad(problems.TOO_LARGE, f"more than data.max_document_bytes={reading.max_document_bytes}")
            yield text, [1]


def _file_text(content: bytes | _Bad, column: str) -> bytes:
    if isinstance(content, _Bad):
        raise content
    return content


def _column_index(schema: pa.Schema, column: str) -> int:
    index = schema.get_field_index(column)
    if index < 0:
        raise _Bad(problems.MISSING_COLUMN, f"data.column={column} isn't among {', '.join(schema.names) or 'none'}")
    kind = schema.field(index).type
    if not any(is_text(_value_type(kind)) for is_text in _TEXT_TYPES):
        raise _Bad(problems.MISSING_COLUMN, f"data.column={column} holds {kind}, not text")
    return index


_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _as_bytes(column: pa.Array) -> pa.Array:
    """The column's UTF-8, not yet decoded: one bad record doesn't take its neighbours along. Offsets are checked."""
    kind = _value_type(column.type)
    if kind != column.type:
        column = column.dictionary_decode()
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(kind):
        column = column.cast(pa.large_binary())
    column.validate(full=True)
    return column


def _cell_text(cell: tuple[pa.Array, int], column: str) -> bytes:
    values, row = cell
    if (text := values[row].as_py()) is None:
        raise _Bad(problems.MISSING_COLUMN, f"data.column={column} is null")
    return text


class _Kept:
    """A file that keeps the error its reading ended in: pyarrow hands some of them on as text only."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.error = raw, None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._raw.read(size)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


@contextmanager
def _opened(file: DataFile, retry: Retry) -> Iterator[_Kept]:
    """`file` for pyarrow to read from; its errors come out as they were raised."""
    with open_file(file, retry) as raw:
        kept = _Kept(raw)
        try:
            yield kept
        except (_Bad, *_BREAKS) as error:
            if kept.error:
                raise kept.error from error
            raise


@contextmanager
def _decompressed(file: DataFile, retry: Retry) -> Iterator[BinaryIO]:
    """The content of a file that may be compressed (several frames or members too), buffered."""
    with _opened(file, retry) as raw:
        if file.compression == "gzip":
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), _BUFFER)
        elif file.compression == "zstd":
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), _BUFFER)
        else:
            yield raw


def _skip(content: BinaryIO, offset: int, seekable: bool) -> None:
    """Go to byte `offset` of a file just opened; _Bad where it has shrunk to less."""
    if seekable:
        reached = min(offset, content.seek(0, io.SEEK_END)) if offset else 0
        content.seek(reached)
    else:
        reached = 0
        with _footer_or_bad():
            while reached < offset and (piece := content.read(min(_PIECE, offset - reached))):
                reached += len(piece)
    if reached < offset:
        raise _Bad(problems.TRUNCATED, f"{reached} bytes, and reading had come to {offset}")


Reader = Callable[[DataFile, Reading, list[int] | None], Iterator[tuple[Any, list[int]]]]
_FORMATS: dict[str, tuple[Reader, Callable[[Any, str], str | bytes]]] = {
    "jsonl": (_json_lines, _json_text),
    "parquet": (_parquet, _cell_text),
    "arrow": (_arrow, _cell_text),
    "text": (_text_file, _file_text),
}
