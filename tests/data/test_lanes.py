"""Rows of one lane: every token of an epoch once, whatever the row length; states that land on the next row."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.documents import assert_every_token_once, documents_of
from tests.sources import write_jsonl
from v4train.data import streams
from v4train.data.files import find_files
from v4train.data.lanes import LaneReader, Packer, PackerState, RowConfig
from v4train.data.mixture import Mixture
from v4train.data.packing import MOST_PADDING
from v4train.data.problems import Problems
from v4train.data.records import Reading
from v4train.data.remote import Retry
from v4train.data.streams import IndexedStream, Lane, TextStream
from v4train.data.tokenizer import train_tokenizer

many_lengths = st.lists(st.integers(2, 40), min_size=3, max_size=40)
row_length = st.integers(1, 30)
packings = st.sampled_from(["best_fit", "concatenate"])


@pytest.fixture(autouse=True, scope="module")
def _small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "WINDOW_DOCUMENTS", 8)
        patch.setattr(streams, "LEAST_ROWS", 1)
        yield


def config(length, packing="best_fit", fim_rate=0.0, seed=1):
    return RowConfig(length, packing, fim_rate, (3, 4, 5), 2, seed)


def stream_of(documents, lane=0, lanes=1, epochs=1):
    return IndexedStream(documents, Lane(lane, lanes, 1, 0), epochs)


def rows_of(packer, most=10**6):
    rows = []
    while len(rows) < most and packer.advance():
        rows.append(packer.build()[0])
    return rows


def as_lists(rows):
    return [[field.tolist() for field in row] for row in rows]


def saved(packer):
    return PackerState(**json.loads(json.dumps(vars(packer.state))))


@settings(max_examples=60)
@given(many_lengths, row_length, packings, st.integers(1, 3))
def test_an_epoch_of_all_lanes_has_every_token_once(lengths, length, packing, lanes):
    documents = documents_of(lengths)
    packers = [Packer(stream_of(documents, lane, lanes), config(length, packing)) for lane in range(lanes)]
    assert_every_token_once([row for packer in packers for row in rows_of(packer)], documents)


@settings(max_examples=60)
@given(many_lengths, packings, st.lists(st.tuples(row_length, st.integers(0, 9)), max_size=6), row_length)
def test_a_change_of_length_loses_and_repeats_no_token(lengths, packing, parts, last):
    """However often, within a window too; each change as a run does it: a new packer from the state."""
    documents, state, rows = documents_of(lengths), None, []
    for length, most in parts:
        packer = Packer(stream_of(documents), config(length, packing), state)
        rows += rows_of(packer, most)
        state = saved(packer)
    rows += rows_of(Packer(stream_of(documents), config(last, packing), state))
    assert_every_token_once(rows, documents)


@settings(max_examples=60)
@given(many_lengths, packings, row_length, st.integers(0, 12), row_length, st.sampled_from([0.0, 0.5]))
def test_a_state_lands_on_the_next_row(lengths, packing, length, taken, other, fim_rate):
    """Also behind a change of length."""
    documents = documents_of(lengths)

    def packer(length, state=None):
        return Packer(stream_of(documents, epochs=2), config(length, packing, fim_rate), state)

    before = packer(other)
    rows_of(before, taken)
    running = packer(length, saved(before))
    following = rows_of(running, 7)
    for number in range(len(following) + 1):
        again = packer(length, saved(before))
        rows_of(again, number)
        # Nothing was read there: only then the changed length isn't in the state yet.
        assert as_lists(rows_of(packer(length, saved(again)), 7 - number)) == as_lists(following[number:])
    assert len(json.dumps(vars(running.state))) < 120


@settings(max_examples=40)
@given(many_lengths, row_length, st.integers(0, 5))
def test_fill_in_middle_keeps_every_token(lengths, length, seed):
    documents = documents_of(lengths)
    rows = rows_of(Packer(stream_of(documents), config(length, fim_rate=0.5, seed=seed)))
    inputs = Counter(np.concatenate([row.input_ids[row.document_ids >= 0] for row in rows]).tolist())
    fim = [inputs.pop(token, 0) for token in (3, 4, 5)]
    assert fim[0] == fim[1] == fim[2] <= len(lengths)
    assert inputs == Counter(documents.flat.tolist())


def test_a_document_that_was_cut_is_joined_again_for_longer_rows():
    """What was not trained on of a long document is one stretch of text again."""
    documents = documents_of([64])
    state = saved(Packer(stream_of(documents), config(4)))
    (row,) = rows_of(Packer(stream_of(documents), config(64), state))
    assert row.input_ids.tolist() == documents.flat.tolist() and set(row.document_ids.tolist()) == {0}


def test_windows_smaller_than_a_row_are_joined():
    documents = documents_of([2] * 40)
    rows = rows_of(Packer(stream_of(documents), config(30)))
    assert_every_token_once(rows, documents)
    assert sorted(int((row.document_ids >= 0).sum()) for row in rows) == [2, 2, 16, 30, 30]


@pytest.mark.parametrize("documents_a_window, least_rows, windows", [(1000, 1, 5), (10, 400, 5)])
def test_padding_of_many_windows(documents_a_window, least_rows, windows, monkeypatch):
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", documents_a_window)
    monkeypatch.setattr(streams, "LEAST_ROWS", least_rows)
    lengths = (np.random.default_rng(0).lognormal(5, 1, 5000).astype(int) + 2).tolist()
    packer, totals = Packer(stream_of(documents_of(lengths)), config(512)), Counter()
    while packer.advance():
        totals.update(packer.build()[1]._asdict())
    assert totals["tokens"] == sum(lengths) and totals["documents"] == len(lengths)
    assert totals["padding"] <= MOST_PADDING * (totals["tokens"] + totals["padding"]) + windows * 512
    assert totals["truncated"] < 0.02 * totals["fitting"]


def test_passes_so_far():
    packer = Packer(stream_of(documents_of([10] * 16), epochs=2), config(10))
    passes = []
    while packer.advance():
        passes.append(packer.epoch)
    assert passes == [i / 16 for i in range(1, 33)]


def test_passes_before_the_first_row_are_those_of_the_window_at_hand():
    """As of a source of a mixture that a run which goes on hasn't drawn from yet."""
    packer = Packer(stream_of(documents_of([10] * 16), epochs=2), config(10))
    for _ in range(20):
        packer.advance()
    assert Packer(stream_of(documents_of([10] * 16), epochs=2), config(10), saved(packer)).epoch == 1.0


def test_passes_so_far_go_on_where_the_length_changes():
    """What is left of a window is packed anew; what was taken of it stays taken."""
    state, passes = None, []
    for length in (10, 20, 40, 10):
        packer = Packer(stream_of(documents_of([10] * 16), epochs=2), config(length), state)
        for _ in range(40 // length):
            assert packer.advance()
            passes.append(packer.epoch)
        state = saved(packer)
    assert passes == [i / 16 for i in (1, 2, 3, 4, 6, 8, 12, 13, 14, 15, 16)]


def text_stream(folder, lane=0, lanes=1, epochs=1):
    files = find_files(str(folder), "jsonl", name=None, split="train", retry=Retry(0))
    reading = Reading("text", 1000, Retry(0), Problems("error"))
    return TextStream(files, reading, train_tokenizer(["text"], 262), 0.0, Lane(lane, lanes, 1, 0), epochs)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_ENCODED", 50)
    monkeypatch.setattr(streams, "WINDOW_ROWS", 4)
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i} " * (i % 7 + 1) for i in range(30)])
    return tmp_path


@pytest.mark.parametrize("lanes", [2, 4])
def test_streamed_rows_are_the_same_from_any_state(folder, lanes):
    for lane in range(lanes):
        running, states = Packer(text_stream(folder, lane, lanes), config(16, fim_rate=0.3)), []
        rows = []
        while True:
            states.append(saved(running))
            if not running.advance():
                break
            rows.append(running.build()[0])
        assert len(rows) > 10
        for number in range(0, len(rows) + 1, 3):
            again = Packer(text_stream(folder, lane, lanes), config(16, fim_rate=0.3), states[number])
            assert as_lists(rows_of(again)) == as_lists(rows[number:])


def test_streamed_tokens_survive_changes_of_length(folder):
    every = Counter(t for row in rows_of(Packer(text_stream(folder), config(500))) for t in row.input_ids.tolist())
    state, found, targets = None, Counter(), 0
    for length, most in [(16, 3), (40, 1), (8, 20), (16, 0), (24, 10), (64, 10**6)]:
        packer = Packer(text_stream(folder), config(length), state)
        for row in rows_of(packer, most):
            found.update(row.input_ids[row.document_ids >= 0].tolist())
            targets += int((row.targets >= 0).sum())
        state = saved(packer)
    assert {t: n for t, n in found.items() if t != 2} == {t: n for t, n in every.items() if t != 2}
    assert targets == sum(found.values()) - 90


def test_a_file_is_opened_once(folder, monkeypatch):
    """Windows that follow on one another are read on: a compressed file is not gone through again and again."""
    opened = []
    read_records = streams.read_records
    monkeypatch.setattr(streams, "read_records", lambda file, *rest: opened.append(file) or read_records(file, *rest))
    assert len(rows_of(Packer(text_stream(folder), config(16)))) > 40
    assert len(opened) == 3


# Several sources


def reader(lengths, when_dry="stop", weights=None, epochs=1, state=None, lane=0, lanes=1, tokens_before=None):
    first, packers = 10, {}
    for number, (name, own) in enumerate(lengths.items()):
        stream = IndexedStream(documents_of(own, first), Lane(lane, lanes, 1, number), epochs)
        packers[name] = Packer(stream, config(8), PackerState(**state["sources"][name]) if state else None)
        first += sum(own)
    before = tokens_before or (lambda number: number * 8)
    return LaneReader(lane, lanes, packers, Mixture(list(lengths), weights), before, when_dry, state)


def read_all(reader, wanted=lambda number: True, first=0):
    rows = []
    while (row := reader.read(wanted, first)) is not None:
        rows.append(row)
    return rows


TWO = {"short": [8] * 6, "long": [8] * 40}


@pytest.mark.parametrize("lanes", [1, 2])
def test_sources_that_run_dry_are_dropped(lanes):
    found = [read_all(reader(TWO, "drop", lane=lane, lanes=lanes)) for lane in range(lanes)]
    for lane, rows in enumerate(found):
        assert [row.number for row in rows] == list(range(lane, lane + lanes * len(rows), lanes))
    assert Counter(row.source for rows in found for row in rows) == {"short": 6, "long": 40}
    inputs = [token for rows in found for row in rows for token in row.row.input_ids.tolist()]
    assert sorted(inputs) == list(range(10, 10 + 46 * 8))


def test_a_source_that_runs_dry_stops_the_lane():
    one = reader(TWO, "stop")
    rows = read_all(one)
    assert Counter(row.source for row in rows)["short"] == 6 and len(rows) < 16
    assert one.read(lambda number: True, 0) is None  # and stays so


def test_without_end_nothing_runs_dry():
    one = reader(TWO, "stop", epochs=None)
    rows = [one.read(lambda number: True, 0) for _ in range(100)]
    assert abs(Counter(row.source for row in rows)["short"] - 50) < 4
    assert rows[-1].epochs["short"] > 5


@pytest.mark.parametrize("when_dry", ["stop", "drop"])
def test_a_lane_goes_on_from_every_row(when_dry):
    rows = read_all(reader(TWO, when_dry))
    for number, row in enumerate(rows, 1):
        state = json.loads(json.dumps(row.state))
        again = read_all(reader(TWO, when_dry, state=state))
        assert [(r.number, r.source, as_lists([r.row]), r.state, r.digest) for r in again] == [
            (r.number, r.source, as_lists([r.row]), r.state, r.digest) for r in rows[number:]
        ]


def test_rows_that_are_not_wanted_are_passed_over():
    rows = {row.number: row for row in read_all(reader(TWO, "drop"))}
    found = read_all(reader(TWO, "drop"), lambda number: number % 3 == 1, first=10)
    assert [row.number for row in found] == list(range(10, 46, 3))
    assert all(as_lists([row.row]) == as_lists([rows[row.number].row]) for row in found)
    assert all(row.state == rows[row.number].state for row in found)


def test_weights_follow_the_tokens_before_a_row():
    weights = [{"from_tokens": 0, "long": 1}, {"from_tokens": 80, "short": 1, "long": 0}]
    rows = read_all(reader(TWO, "stop", weights))
    assert [row.source for row in rows] == ["long"] * 10 + ["short"] * 6
