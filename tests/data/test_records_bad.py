"""Bad records and files, refused with their place or left out and counted."""

import json
import os
import random

import pyarrow as pa
import pytest

from tests.record_files import GOOD, LAYOUTS, TEXTS, Watched, encoded, reading, store, texts_of
from tests.serving import serve
from v4train.data import records
from v4train.data.files import DataFile, Retry
from v4train.data.problems import DataError
from v4train.data.records import read_records

pytestmark = pytest.mark.usefixtures("small_pieces")

BAD_LINES = {
    b'{"text": "\xff\xfe"}\n': ("undecodable", "invalid start byte"),
    b'{"text": "\\ud800"}\n': ("undecodable", "surrogates not allowed"),
    b'{"text": ""}\n': ("empty", "no text"),
    b'{"text": " \\n\\t\\u3000"}\n': ("empty", "white space"),
    b'{"text": "' + b"x" * 101 + b'"}\n': ("too_large", "101 bytes of text, more than data.max_document_bytes=100"),
    b'{"text": "' + "ä".encode() * 51 + b'"}\n': ("too_large", "102 bytes of text"),
    b'{"text": "' + b"x" * 2_000_000 + b'"}\n': ("too_large", "a line of 2000013 bytes"),
    b'{"body": "a", "id": 1}\n': ("missing_column", "data.column=text isn't among body, id"),
    b"{}\n": ("missing_column", "isn't among none"),
    b'{"text": null}\n': ("missing_column", "is a NoneType"),
    b'{"text": ["a"]}\n': ("missing_column", "is a list"),
    b'{"text": "a"\n': ("malformed", "not JSON"),
    b"[1]\n": ("malformed", "not a JSON object but a list"),
    b"[" * 100_000 + b"\n": ("malformed", "recursion"),
    b"text\n": ("malformed", "not JSON"),
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad[:20].decode(errors="replace"))
def test_bad_lines(tmp_path, bad):
    kind, detail = BAD_LINES[bad]
    file = store(tmp_path, GOOD * 3 + bad + GOOD * 2)
    found = []
    with pytest.raises(DataError) as raised:
        for text, _ in read_records(file, reading(most=100)):
            found.append(text)
    assert found == ["good"] * 3
    assert f"corpus/part.jsonl, record 3 (from 0): {kind.replace('_', ' ')}: " in str(raised.value)
    assert detail in str(raised.value)
    how = reading("skip", 100)
    assert [position[-1] for _, position in read_records(file, how)] == [1, 2, 3, 5, 6]
    assert how.problems.counts == {kind: 1}
    how = reading("skip", 100)
    assert texts_of(file, how, None, 0, 2) == ["good"] * 3 and how.problems.counts == {}
    assert texts_of(file, how, None, 1, 2) == ["good"] * 2 and how.problems.counts == {kind: 1}


@pytest.mark.parametrize("escaped", [False, True])
def test_the_largest_document_passes(tmp_path, escaped):
    text = "ä" * 500_000
    file = store(tmp_path, json.dumps({"text": text}, ensure_ascii=escaped).encode() + b"\n" + GOOD)
    assert texts_of(file, reading(most=1_000_000)) == [text, "good"]


def test_a_huge_line_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_OTHER_COLUMNS", 1_000)
    longest = 0
    file = store(tmp_path, GOOD + b'{"text": "' + b"x" * 5_000_000 + b'"}\n' + GOOD)

    class Counted(Watched):
        def readline(self, size=-1):
            nonlocal longest
            line = super().readline(size)
            longest = max(longest, len(line))
            return line

    monkeypatch.setattr(records, "open_file", lambda file, _: Counted(file.url))
    how = reading("skip", 100)
    assert texts_of(file, how) == ["good", "good"] and how.problems.counts == {"too_large": 1}
    assert longest <= 1_600


@pytest.mark.parametrize("end", [b'{"text": "cut of', b'{"text": "a\xc3', b'{"te', b"{"])
def test_a_torn_last_line_is_truncated(tmp_path, end):
    file = store(tmp_path, GOOD * 2 + end)
    with pytest.raises(DataError, match="record 2 .*: truncated: the last line ends early"):
        texts_of(file, reading())
    how = reading("skip")
    assert texts_of(file, how) == ["good"] * 2 and how.problems.counts == {"truncated": 1}


@pytest.mark.parametrize("layout", ["parquet", "arrow.file", "arrow.stream"])
def test_bad_cells(tmp_path, layout):
    cells = [b"good", b"\xff\xfe", b"good", b"", b" \n", b"x" * 101, None, b"good"]
    column = pa.array(cells, pa.binary()).view(pa.string())  # not checked: what a careless writer leaves behind
    file = store(tmp_path, *encoded(layout, column))
    with pytest.raises(DataError, match=r"record 1 \(from 0\): undecodable"):
        texts_of(file, reading(most=100))
    how = reading("skip", 100)
    assert [position[-1] for _, position in read_records(file, how)] == [1, 3, 8]
    assert how.problems.counts == {"undecodable": 1, "empty": 2, "too_large": 1, "missing_column": 1}
    halves = [reading("skip", 100) for _ in range(2)]
    assert [len(texts_of(file, half, None, lane, 2)) for lane, half in enumerate(halves)] == [2, 1]
    assert halves[0].problems.counts == {"empty": 1, "missing_column": 1}
    assert halves[1].problems.counts == {"undecodable": 1, "empty": 1, "too_large": 1}


@pytest.mark.parametrize("content,kind", [(b"\xff", "undecodable"), (b" \n", "empty"), (b"x" * 101, "too_large")])
def test_bad_text_file(tmp_path, content, kind):
    file = store(tmp_path, content, "text")
    with pytest.raises(DataError, match=f"record 0 .*: {kind.replace('_', ' ')}"):
        texts_of(file, reading(most=100))
    how = reading("skip", 100)
    assert texts_of(file, how) == [] and how.problems.counts == {kind: 1}


@pytest.mark.parametrize("layout", ["parquet", "arrow.file", "arrow.stream"])
@pytest.mark.parametrize("column,rule", [("body", "isn't among nested, text, id"), ("id", "holds int64, not text")])
def test_column_that_a_file_lacks(tmp_path, layout, column, rule):
    file = store(tmp_path, *encoded(layout, TEXTS))
    with pytest.raises(DataError, match=f"part.[a-z]*: missing column: data.column={column} {rule}"):
        texts_of(file, reading(column=column))
    how = reading("skip", column=column)
    assert [texts_of(file, how, None, lane, 3) for lane in range(3)] == [[], [], []]
    assert how.problems.counts == {"missing_column": 1}  # once, not once a lane


@pytest.mark.parametrize("layout", ["parquet", "arrow.file", "arrow.stream"])
@pytest.mark.parametrize("kept", [0, 3, 60])
def test_no_beginning_or_end(tmp_path, layout, kept):
    content, *how = encoded(layout, TEXTS)
    file = store(tmp_path, content[:kept], *how)
    with pytest.raises(DataError, match="part.[a-z]*: truncated: "):
        texts_of(file, reading())
    skipping = reading("skip")
    assert [texts_of(file, skipping, None, lane, 2) for lane in range(2)] == [[], []]
    assert skipping.problems.counts == {"truncated": 1}


@pytest.mark.parametrize("layout", ["jsonl.gzip", "jsonl.zstd", "arrow.stream"])
def test_what_comes_before_the_cut_is_read(tmp_path, layout):
    texts = [random.Random(i).randbytes(5_000).hex() for i in range(57)]
    content, *how = encoded(layout, texts)
    file = store(tmp_path, content[: len(content) * 3 // 4], *how)
    skipping = reading("skip")
    found = list(read_records(file, skipping))
    count = len(found)
    assert 20 < count < 57 and [text for text, _ in found] == texts[:count]
    assert skipping.problems.counts == {"truncated": 1}
    with pytest.raises(DataError, match=rf"record {count} \(from 0\): truncated"):
        texts_of(file, reading(), found[10][1])
    lanes = [reading("skip") for _ in range(2)]
    shared = [texts_of(file, lanes[lane], None, lane, 2) for lane in range(2)]
    assert shared == [texts[:count:2], texts[1:count:2]]
    assert lanes[count % 2].problems.counts == {"truncated": 1} and lanes[1 - count % 2].problems.counts == {}


def damaged(content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + b"\xff" * (stop - start) + content[stop:]


@pytest.mark.parametrize("layout", ["jsonl.gzip", "jsonl.zstd", "parquet"])
def test_damage_in_the_middle(tmp_path, layout):
    texts = [random.Random(i).randbytes(200).hex() for i in range(57)]
    content, *how = encoded(layout, texts)
    middle = content.rindex(b"\x28\xb5\x2f\xfd") if layout == "jsonl.zstd" else len(content) // 2  # of its second frame
    file = store(tmp_path, damaged(content, middle, middle + 200), *how)
    skipping = reading("skip")
    found = texts_of(file, skipping)
    assert 10 < len(found) < 57 and found == texts[: len(found)]
    assert skipping.problems.counts == {"malformed": 1}
    with pytest.raises(DataError, match=rf"record {len(found)} \(from 0\): malformed"):
        texts_of(file, reading())


def test_damaged_offsets_of_an_arrow_batch_are_found(tmp_path):
    content, *how = encoded("arrow.stream", ["x" * 100] * 10)
    offsets = b"".join((100 * i).to_bytes(4, "little") for i in range(11))
    assert content.count(offsets) == 1
    file = store(tmp_path, content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" * 3 + offsets[20:]), *how)
    skipping = reading("skip")
    assert texts_of(file, skipping) == [] and skipping.problems.counts == {"malformed": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_has_shrunk_since_the_position_was_taken(tmp_path, layout):
    file = store(tmp_path, *encoded(layout, TEXTS))
    positions = [[p for _, p in read_records(file, reading(), None, lane, 2)] for lane in range(2)]
    store(tmp_path, *encoded(layout, TEXTS[:11]))
    for lane in range(2):
        skipping = reading("skip")
        assert texts_of(file, skipping, positions[lane][20], lane, 2) == []
        assert skipping.problems.counts == {"truncated": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_is_gone(tmp_path, layout):
    file = store(tmp_path, *encoded(layout, TEXTS))
    os.remove(file.url)
    with pytest.raises(DataError, match="record 0 .*: vanished: .*No such file"):
        texts_of(file, reading())
    skipping = reading("skip")
    assert texts_of(file, skipping, None, 1, 2) == [] and skipping.problems.counts == {"vanished": 1}


def test_a_file_that_cannot_be_read_is_unreachable(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "a")

    monkeypatch.setattr(records, "open_file", denied)
    skipping = reading("skip")
    assert texts_of(store(tmp_path, GOOD), skipping) == [] and skipping.problems.counts == {"unreachable": 1}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_over_http_from_every_position_despite_failures(layout, ranges):
    content, format, compression = encoded(layout, TEXTS)
    waits = []
    with serve({"part": content}, ranges=ranges) as served:
        file = DataFile(served.url + "part", "part", None, format, compression)
        how = reading(retry=Retry(3, sleep=waits.append))
        served.faults = [503, None, ~20, 503, ~0, ~100] if len(content) > 1024 else [503, None, ~20, 503, ~0]
        found = list(read_records(file, how))
        assert [text for text, _ in found] == TEXTS
        assert not served.faults and len(waits) == (5 if len(content) > 1024 else 4)
        for i in range(0, len(TEXTS), 7):
            assert list(read_records(file, how, found[i][1])) == found[i + 1 :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_server_that_stays_away_or_loses_the_file(layout):
    content, format, compression = encoded(layout, [random.Random(i).randbytes(3_000).hex() for i in range(57)])
    for fault, kind in ((503, "unreachable"), (404, "vanished")):
        waits = []
        with serve({"part": content}) as served:
            file = DataFile(served.url + "part", "corpus/part", None, format, compression)
            found = []
            skipping = reading("skip", retry=Retry(2, sleep=waits.append))
            for text, position in read_records(file, skipping, None, 1, 2):
                served.faults = served.faults or [fault] * 3
                found.append((text, position))
            assert 0 < len(found) < 28 and skipping.problems.counts == {kind: 1}
            assert waits == ([0.5, 1.0] if kind == "unreachable" else [])
            served.faults = [fault] * 3
            with pytest.raises(DataError, match=f"corpus/part, record .*: {kind}: "):
                texts_of(file, reading(retry=Retry(2, sleep=waits.append)), found[-1][1], 1, 2)
            served.faults = []
            rest = list(read_records(file, reading(), found[-1][1], 1, 2))
            assert [position[-1] for _, position in found + rest] == list(range(2, 57, 2))


def test_the_content_changing_on_the_server_is_vanished():
    with serve({"part": GOOD * 1000}) as served:
        found = read_records(DataFile(served.url + "part", "part", None, "jsonl", ""), how := reading("skip"))
        next(found)
        served.tag = '"2"'
        assert len(list(found)) < 999 and how.problems.counts == {"vanished": 1}
