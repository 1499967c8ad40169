"""Files of records in every layout, and how they are read, for tests of records."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq

from v4train.data.files import DataFile, Retry
from v4train.data.problems import Problems
from v4train.data.records import Reading, read_records

TEXTS = [f"document {i}\n" + "äöü " * (i % 7) + "x" * (i % 31) for i in range(57)]
GOOD = b'{"text": "good"}\n'
LAYOUTS = ["jsonl", "jsonl.gzip", "jsonl.zstd", "parquet", "arrow.file", "arrow.stream"]
COMPRESSIONS = {"": "", "gzip": ".gz", "zstd": ".zst"}


def reading(policy="error", most=100_000, retry=None, column="text"):
    return Reading(column, most, retry or Retry(0), Problems(policy))


def compressed(content: bytes, compression: str) -> bytes:
    """In two members or frames, as appending to such a file makes it."""
    parts = [content[: len(content) // 3], content[len(content) // 3 :]]
    if compression == "gzip":
        return b"".join(map(gzip.compress, parts))
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts) if compression else content


def lines(texts) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def table(texts, kind=None) -> pa.Table:
    nested = [{"a": i, "b": str(i)} for i in range(len(texts))]  # more leaves than columns
    return pa.table({"nested": nested, "text": pa.array(texts, kind), "id": range(len(texts))})


def encoded(layout: str, texts, kind=None) -> tuple[bytes, str, str]:
    """Content, format and compression of a file that holds `texts`."""
    name, _, variant = layout.partition(".")
    if name == "jsonl":
        return compressed(lines(texts), variant), name, variant
    sink, rows = pa.BufferOutputStream(), table(texts, kind)
    if name == "parquet":
        pq.write_table(rows, sink, row_group_size=10, write_page_checksum=True)
    else:
        new = pa.ipc.new_stream if variant == "stream" else pa.ipc.new_file
        with new(sink, rows.schema) as writer:
            for batch in rows.to_batches(max_chunksize=10):
                writer.write_batch(batch)
    return sink.getvalue().to_pybytes(), name, ""


def store(folder, content: bytes, format="jsonl", compression="") -> DataFile:
    path = folder / f"part.{format}{COMPRESSIONS[compression]}"
    path.write_bytes(content)
    return DataFile(str(path), f"corpus/{path.name}", len(content), format, compression)


def texts_of(file, how, position=None, lane=0, lanes=1):
    return [text for text, _ in read_records(file, how, position, lane, lanes)]


class Watched:
    """A local file that remembers which bytes were read."""

    def __init__(self, path):
        self.file, self.spans = open(path, "rb"), []

    def read(self, size=-1):
        start = self.file.tell()
        content = self.file.read(size)
        self.spans.append((start, start + len(content)))
        return content

    def readline(self, size=-1):
        start = self.file.tell()
        content = self.file.readline(size)
        self.spans.append((start, start + len(content)))
        return content

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def touched(self, start, stop):
        return any(first < stop and last > start for first, last in self.spans)
