"""Lanes of documents: nothing left out or repeated in an epoch, the same windows from any position on."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.documents import documents_of
from tests.sources import write_jsonl
from v4train.data import streams
from v4train.data.files import find_files
from v4train.data.problems import DataError, Problems
from v4train.data.records import Reading
from v4train.data.remote import Retry
from v4train.data.shards import document_hash, held_out
from v4train.data.streams import IndexedStream, Lane, TextStream
from v4train.data.tokenizer import train_tokenizer
from v4train.errors import ConfigError

LENGTH = 4
TOKENIZER = train_tokenizer(["some text to begin with"], 262)
RETRY = Retry(0)


def contents(window):
    return [window.tokens(i, 0, int(size)).tolist() for i, size in enumerate(window.lengths)]


def windows_of(stream, length=LENGTH, most=1000):
    """(documents, key, position behind) of each window."""
    found = []
    while len(found) < most and (window := stream.window(length)) is not None:
        found.append((contents(window), window.key, stream.position))
    return found


def documents_in(windows):
    return [document for documents, *_ in windows for document in documents]


def indexed(documents, number=0, count=1, seed=1, epochs=1, source=0):
    return IndexedStream(documents, Lane(number, count, seed, source), epochs)


def with_held_out(documents):
    """The same, every third one held out."""
    object.__setattr__(documents, "trained", lambda numbers: numbers % 3 != 0)
    return documents


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 5)
    monkeypatch.setattr(streams, "LEAST_ROWS", 1)
    monkeypatch.setattr(streams, "_ENCODED", 30)


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_the_lanes_share_an_indexed_epoch(lanes, small_windows):
    documents = documents_of([2 + i % 5 for i in range(47)])
    everything = [documents.tokens(i).tolist() for i in range(47)]
    for epochs in (1, 2):
        found = [documents_in(windows_of(indexed(documents, lane, lanes, epochs=epochs))) for lane in range(lanes)]
        assert sorted(sum(found, [])) == sorted(everything * epochs)
        assert max(map(len, found)) - min(map(len, found)) <= epochs


def test_epochs_seeds_and_sources_have_orders_of_their_own(small_windows):
    documents = documents_of([3] * 40)
    two_epochs = documents_in(windows_of(indexed(documents, epochs=2)))
    orders = [two_epochs[:40], two_epochs[40:]]
    orders += [documents_in(windows_of(indexed(documents, **others))) for others in ({"seed": 2}, {"source": 1})]
    assert len({str(order) for order in orders}) == 4
    assert two_epochs[:40] == documents_in(windows_of(indexed(documents)))
    keys = [key for _, key, _ in windows_of(indexed(documents, epochs=2))]
    assert len(set(keys)) == len(keys)


def test_held_out_documents_are_no_indexed_training_documents(small_windows):
    documents = with_held_out(documents_of([3] * 20))
    found = sum((documents_in(windows_of(indexed(documents, lane, 2, epochs=2))) for lane in range(2)), [])
    expected = [documents.tokens(i).tolist() for i in range(20) if i % 3]
    assert sorted(found) == sorted(expected * 2)
    only = documents_of([3] * 9)
    object.__setattr__(only, "trained", lambda numbers: numbers == 4)
    assert documents_in(windows_of(indexed(only, epochs=2))) == [only.tokens(4).tolist()] * 2


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 4))
def test_indexed_windows_from_any_position(count, lanes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "WINDOW_DOCUMENTS", 3)
        patch.setattr(streams, "LEAST_ROWS", 1)
        documents, lanes = documents_of([2] * count), min(lanes, count)
        stream = indexed(documents, lanes - 1, lanes, epochs=3)
        start, found = stream.position, windows_of(stream)
        for number, position in enumerate([start, *(position for *_, position in found)]):
            again = indexed(documents, lanes - 1, lanes, epochs=3)
            again.seek(json.loads(json.dumps(position)))
            assert windows_of(again) == found[number:]


def test_an_indexed_window_has_rows_enough_for_any_length(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 5)
    stream = indexed(documents_of([2] * 2000))
    assert [len(documents) for documents, *_ in windows_of(stream, length=1)[:2]] == [10, 10]  # 16 tokens or more
    stream.seek([0, 0])
    assert [len(documents) for documents, *_ in windows_of(stream, length=100)] == [800, 800, 400]


def test_passes_of_an_indexed_stream(small_windows):
    stream = indexed(documents_of([2] * 20), epochs=2)
    passes = []
    while stream.window(LENGTH) is not None:
        passes.append(stream.epoch)
    assert passes == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]


# Streamed ones

COUNTS = {"a.jsonl": 40, "b.jsonl.gz": 25, "c.jsonl": 3, "d.jsonl": 30}
TEXTS = {name: [f"{name} number {i}" for i in range(count)] for name, count in COUNTS.items()}
ALL_TEXTS = sum(TEXTS.values(), [])


@pytest.fixture
def folder(tmp_path, small_windows, monkeypatch):
    monkeypatch.setattr(streams, "WINDOW_ROWS", 10)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in TEXTS.items():
        write_jsonl(folder / name, texts)
    return folder


def streamed(folder, number=0, count=1, epochs=1, seed=1, fraction=0.0, problems=None):
    files = find_files(str(folder), "jsonl", name=None, split="train", retry=RETRY)
    reading = Reading("text", 1000, RETRY, problems or Problems("error"))
    return TextStream(files, reading, TOKENIZER, fraction, Lane(number, count, seed, 0), epochs)


def texts_in(windows):
    return [TOKENIZER.decode(ids) for ids in documents_in(windows)]


@pytest.mark.parametrize("lanes", [1, 2, 4, 5, 9])
def test_the_lanes_share_a_streamed_epoch(lanes, folder):
    """With files for each lane, and with fewer files than lanes (from 5 on)."""
    found = [texts_in(windows_of(streamed(folder, lane, lanes, epochs=2))) for lane in range(lanes)]
    assert Counter(sum(found, [])) == Counter(ALL_TEXTS * 2)
    if lanes <= 4:  # whole files
        for texts in found:
            own = Counter(text.split()[0] for text in texts)
            assert lanes > 1 or own == {name: 2 * count for name, count in COUNTS.items()}


def test_a_streamed_document_is_bos_text_eos(folder):
    for ids in documents_in(windows_of(streamed(folder))):
        assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id
        assert ids[1:-1] == TOKENIZER.encode(TOKENIZER.decode(ids)).tolist()


@pytest.mark.parametrize("lanes", [1, 3, 5])
def test_streamed_windows_from_any_position(lanes, folder):
    stream = streamed(folder, lanes - 1, lanes, epochs=2)
    start, found = stream.position, windows_of(stream)
    assert len(found) > 4 and stream.position is None
    assert len({key for _, key, _ in found}) == len(found)
    for number, position in enumerate([start, *(position for *_, position in found)]):
        again = streamed(folder, lanes - 1, lanes, epochs=2)
        again.window(LENGTH)
        again.seek(json.loads(json.dumps(position)))
        assert windows_of(again) == found[number:]


def test_an_epoch_ends_with_a_window_and_has_its_own_order(folder):
    for length in (3, 4, 7, 50):
        windows = windows_of(streamed(folder, epochs=3), length)
        ends = np.cumsum([len(documents) for documents, *_ in windows])
        assert len(ALL_TEXTS) in ends and 2 * len(ALL_TEXTS) in ends
    texts = texts_in(windows)
    orders = [texts[i * len(ALL_TEXTS) : (i + 1) * len(ALL_TEXTS)] for i in range(3)]
    assert all(Counter(order) == Counter(ALL_TEXTS) for order in orders)
    assert len({str(order) for order in orders}) > 1  # of 24 orders of four files


def test_held_out_documents_are_no_streamed_training_documents(folder):
    found = texts_in(windows_of(streamed(folder, fraction=0.3)))
    assert Counter(found) == Counter(text for text in ALL_TEXTS if not held_out(document_hash(text), 0.3))
    assert 0 < len(found) < len(ALL_TEXTS)


def test_a_window_has_about_as_many_tokens_as_its_rows_take(folder):
    *windows, _ = windows_of(streamed(folder), length=20)
    longest = max(len(TOKENIZER.encode(text)) + 2 for text in ALL_TEXTS)
    for documents, *_ in windows:
        assert 200 <= sum(map(len, documents)) < 200 + longest


def test_going_on_reads_nothing_again(folder, monkeypatch):
    opened = []
    read_records = streams.read_records
    monkeypatch.setattr(streams, "read_records", lambda file, *rest: opened.append(file) or read_records(file, *rest))
    windows_of(streamed(folder))
    assert len(opened) == len(COUNTS)


def test_a_lane_without_documents_is_an_error(folder):
    for name in TEXTS:
        write_jsonl(folder / name, [])
    write_jsonl(folder / "a.jsonl", ["one", "two"])
    assert len(documents_in(windows_of(streamed(folder, 1, 5)))) == 1
    with pytest.raises(ConfigError, match=r"data\.lanes=5: no document .* lane 3 of 5; use fewer"):
        streamed(folder, 3, 5, epochs=None).window(LENGTH)
    with pytest.raises(ConfigError, match=r"data\.lanes=1: no document"):
        streamed(folder, fraction=1.0).window(LENGTH)


def test_bad_data_end_the_stream_or_are_counted(folder):
    for name in ("b.jsonl.gz", "c.jsonl", "d.jsonl"):
        (folder / name).unlink()
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join([*lines[:20], "{broken\n", *lines[20:]]))
    stream = streamed(folder)
    good = []
    with pytest.raises(DataError, match=r"a\.jsonl, record 20"):
        while True:
            good.append((contents(stream.window(LENGTH)), stream.position))
    position = good[-1][1]
    for _ in range(2):  # the place is not lost, the error not forgotten
        stream.seek(position)
        with pytest.raises(DataError, match=r"a\.jsonl, record 20"):
            windows_of(stream)
    problems = Problems("skip")
    assert texts_in(windows_of(streamed(folder, problems=problems))) == TEXTS["a.jsonl"]
    assert problems.counts == {"malformed": 1}


def test_passes_of_a_streamed_stream(folder):
    stream = streamed(folder, epochs=2)
    passes = [0.0]
    while stream.window(LENGTH) is not None:
        passes.append(stream.epoch)
    assert passes == sorted(passes) and {0.0, 0.25, 0.5, 0.75, 1.0, 1.25} <= set(passes)
    assert stream.epoch == 2.0
