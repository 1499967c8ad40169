"""Every record of a file once, from every position on, and no more read for it than needed."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.record_files import GOOD, LAYOUTS, TEXTS, Watched, encoded, reading, store, texts_of
from v4train.data import records
from v4train.data.records import read_records

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_goes_on_from_every_position(tmp_path, layout):
    file = store(tmp_path, *encoded(layout, TEXTS))
    found = list(read_records(file, reading()))
    assert [text for text, _ in found] == TEXTS
    assert [position[-1] for _, position in found] == list(range(1, len(TEXTS) + 1))
    for i, (_, position) in enumerate(found):
        assert position == json.loads(json.dumps(position))
        assert list(read_records(file, reading(), position)) == found[i + 1 :]


@pytest.mark.parametrize("lanes", [2, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lanes_share_the_records_and_go_on_from_every_position(tmp_path, layout, lanes):
    file = store(tmp_path, *encoded(layout, TEXTS))
    for lane in range(lanes):
        found = list(read_records(file, reading(), None, lane, lanes))
        assert [text for text, _ in found] == TEXTS[lane::lanes]
        for i, (_, position) in enumerate(found):
            assert list(read_records(file, reading(), position, lane, lanes)) == found[i + 1 :]


@pytest.mark.parametrize("lanes", [1, 2])
def test_text_file_is_one_record(tmp_path, lanes):
    file = store(tmp_path, "one\ntwo ä\n".encode(), "text")
    assert list(read_records(file, reading(), None, 0, lanes)) == [("one\ntwo ä\n", [1])]
    assert texts_of(file, reading(), [1]) == []
    if lanes == 2:
        assert texts_of(file, reading(), None, 1, 2) == []


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "arrow.file", "arrow.stream"])
def test_what_came_before_is_not_read_again(tmp_path, monkeypatch, layout):
    texts = [random.Random(i).randbytes(4_000).hex() for i in range(40)]  # incompressible
    file = store(tmp_path, *encoded(layout, texts))
    position = [position for _, position in read_records(file, reading())][29]
    opened = []
    monkeypatch.setattr(records, "open_file", lambda file, _: opened.append(Watched(file.url)) or opened[-1])
    assert texts_of(file, reading(), position) == texts[30:]
    # the first three of four groups, less a margin for the headers at the beginning
    assert not opened[0].touched(file.size // 10, file.size * 7 // 10)
    assert opened[0].touched(file.size * 8 // 10, file.size * 9 // 10)


def test_only_the_column_is_read(tmp_path, monkeypatch):
    other = [random.Random(i).randbytes(5_000).hex() for i in range(40)]
    pq.write_table(pa.table({"text": TEXTS[:40], "other": other}), tmp_path / "part.parquet")
    file = store(tmp_path, (tmp_path / "part.parquet").read_bytes(), "parquet")
    opened = []
    monkeypatch.setattr(records, "open_file", lambda file, _: opened.append(Watched(file.url)) or opened[-1])
    assert texts_of(file, reading()) == TEXTS[:40]
    assert sum(stop - start for start, stop in opened[0].spans) < file.size / 4


KINDS_OF_TEXT = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("layout", ["parquet", "arrow.file", "arrow.stream"])
@pytest.mark.parametrize("kind", KINDS_OF_TEXT, ids=str)
def test_every_kind_of_text_column(tmp_path, layout, kind):
    texts = [text.encode() for text in TEXTS] if "binary" in str(kind) else TEXTS
    column = pa.array(texts).dictionary_encode() if "dictionary" in str(kind) else pa.array(texts, kind)
    file = store(tmp_path, *encoded(layout, column))
    found = list(read_records(file, reading()))
    assert [text for text, _ in found] == TEXTS
    for i in (0, 9, 10, 25, 56):
        assert list(read_records(file, reading(), found[i][1])) == found[i + 1 :]


def test_lines_as_they_occur(tmp_path):
    content = b'\xef\xbb\xbf{"text": "bom"}\r\n\n  \n{"text": "\\u00e4\\n"}\n\n{"id": 1, "text": "no line end"}'
    file = store(tmp_path, content)
    found = list(read_records(file, reading()))
    assert found == [("bom", [20, 1]), ("ä\n", [45, 2]), ("no line end", [len(content), 3])]
    for i, (_, position) in enumerate(found):
        assert list(read_records(file, reading(), position)) == found[i + 1 :]
    assert texts_of(store(tmp_path, b""), reading()) == []


def test_closing_early_closes_the_file(tmp_path, monkeypatch):
    file = store(tmp_path, GOOD * 10)
    opened = []
    monkeypatch.setattr(records, "open_file", lambda file, _: opened.append(Watched(file.url)) or opened[-1])
    found = read_records(file, reading())
    next(found)
    found.close()
    assert opened[0].closed
