"""One sequence of rows, whoever reads it: any ranks and workers, stopped and resumed anywhere."""

import hashlib
import json
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.documents import assert_every_token_once
from tests.loading import G, loader, loaders, mixed, one_source, state_of, step_of, steps_of, streamed, two_sources
from v4train.data import loader as loader_module
from v4train.data.loader import BatchConfig, EndOfData, merged_states
from v4train.data.packing import Row

pytestmark = pytest.mark.usefixtures("small_windows")

KINDS = {
    "indexed": lambda tmp_path, lanes: one_source(lanes=lanes),
    "two": lambda tmp_path, lanes: two_sources(lanes=lanes, fim_rate=0.2),
    "streamed": lambda tmp_path, lanes: streamed(tmp_path, lanes=lanes),
    "mixed": lambda tmp_path, lanes: mixed(tmp_path, lanes=lanes),
}


def hash_of(steps):
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sequence_is_one_for_any_ranks_and_workers(kind, lanes, tmp_path):
    made = KINDS[kind](tmp_path, lanes)
    expected = hash_of(steps_of(loaders(made, 1, G), 6))
    for world in (1, 2, 4):
        for workers in (0, 1, 3):
            for micro in (1, G // world):
                ranks = loaders(made, world, micro, workers=workers)
                assert hash_of(steps_of(ranks, 6)) == expected
                assert len({one.progress.data_hash for one in ranks}) == 1
    assert hash_of(steps_of(loaders(made, 1, seed=8), 6)) != expected


@settings(max_examples=25)
@given(
    st.sampled_from(["indexed", "two"]),
    st.sampled_from([1, 2, 3, 8, 11]),
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_stopped_anywhere_and_resumed_by_others(kind, lanes, runs):
    """`runs`: data ranks, rows of a micro-batch and steps of each."""
    made = KINDS[kind](None, lanes)
    expected, state, found = steps_of(loaders(made, 1), sum(steps for *_, steps in runs)), None, []
    for world, micro, steps in runs:
        ranks = loaders(made, world, micro, state)
        found += steps_of(ranks, steps)
        state = state_of(ranks)
    assert found == expected


@pytest.mark.parametrize("kind", ["streamed", "mixed"])
@pytest.mark.parametrize("lanes", [2, 5])
def test_streamed_and_resumed_by_others(kind, lanes, tmp_path):
    made = KINDS[kind](tmp_path, lanes)
    expected, state, found = steps_of(loaders(made, 1), 12), None, []
    for world, steps, workers in ((2, 1, 1), (4, 4, 3), (1, 2, 0), (2, 5, 2)):
        ranks = loaders(made, world, state=state, workers=workers)
        found += steps_of(ranks, steps)
        state = state_of(ranks)
    assert found == expected
    assert state["progress"] == state_of(_trained(made, 12))["progress"]


def _trained(made, steps):
    ranks = loaders(made, 1)
    steps_of(ranks, steps)
    return ranks


def test_another_batch_size_goes_on_with_the_next_rows():
    made = one_source(lanes=3)
    expected = sum(steps_of(loaders(made, 1), 6), [])
    ranks = loaders(made, 2)
    found = sum(steps_of(ranks, 3), [])
    found += sum(steps_of(loaders(made, 4, state=state_of(ranks), total=4), 6), [])
    assert found == expected


@pytest.mark.parametrize("lanes", [1, 2])
def test_every_document_of_an_epoch_is_read_once(lanes):
    made = one_source(epochs=1, lanes=lanes)
    documents = made[0].sources["text"].validation
    one, rows = loader(made, total=1), []
    with pytest.raises(EndOfData):
        while True:
            (batch,) = one.next_step()
            rows.append(Row(*(tensor[0].numpy() for tensor in (batch.input_ids, batch.document_ids, batch.targets))))
    if lanes == 1:
        assert_every_token_once(rows, documents)
    else:  # it ends with the first lane that is dry
        inputs = np.concatenate([row.input_ids[row.document_ids >= 0] for row in rows])
        assert len(set(inputs.tolist())) == len(inputs) > 0.8 * documents.num_tokens


@settings(max_examples=25)
@given(
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 4]),
    st.lists(st.tuples(st.integers(2, 30), st.integers(0, 3)), min_size=2, max_size=5),
    st.sampled_from(["best_fit", "concatenate"]),
)
def test_a_change_of_length_loses_and_repeats_nothing(lanes, world, phases, packing):
    """Several ranks, several changes within a window: together the rows are those of one process."""
    made = one_source(epochs=1, count=300, lanes=lanes, packing=packing)
    documents = made[0].sources["text"].validation

    def run(world):
        ranks, rows = loaders(made, world, total=4), []
        for length, steps in phases:
            state = state_of(ranks)
            for one in ranks:
                one.load_state_dict(state)
                one.set_sequence_length(length)
            rows += [row for _ in range(steps) for row in step_of(ranks)]
        return rows, state_of(ranks)

    rows, state = run(world)
    alone, state_alone = run(1)
    assert rows == alone and state == state_alone
    # The rest of the epoch, by one process a lane: nothing is missing, nothing comes twice
    rest = loader(made, total=1)
    rest.load_state_dict(state)
    rest.set_sequence_length(17)
    rows += _rest_of_lanes(rest, lanes)
    assert_every_token_once([Row(*map(np.array, row)) for row in rows], documents)
    assert rest.progress.tokens >= sum(4 * length * steps for length, steps in phases)


@settings(max_examples=25)
@given(
    st.sampled_from([1, 3, 4]),
    st.sampled_from([1, 2, 4]),
    st.lists(
        st.tuples(st.integers(2, 30), st.sampled_from([4, 8, 12]), st.sampled_from([1, 2]), st.integers(0, 3)),
        min_size=2,
        max_size=5,
    ),
)
def test_a_change_of_batch_and_length_goes_on_with_the_next_row(lanes, world, phases):
    """On any number of ranks, whose lanes become others; and as a loader that is made anew for each phase."""
    made = one_source(epochs=1, count=800, lanes=lanes)

    def run(world, anew):
        ranks, rows = loaders(made, world, total=4), []
        for length, total, micro, steps in phases:
            micro, state = micro if total % (micro * world) == 0 else 1, state_of(ranks)
            if anew:
                ranks = loaders(made, world, micro, state, length=length, total=total)
            for one in ranks if not anew else ():
                one.load_state_dict(state)
                one.set_batch(BatchConfig(total, micro, one.batch.rank, world))
                one.set_sequence_length(length)
            rows += [row for _ in range(steps) for row in step_of(ranks)]
        return rows, state_of(ranks)

    rows, state = run(world, False)
    alone, state_alone = run(1, True)
    assert rows == alone and state == state_alone
    assert state["progress"]["rows"] == sum(total * steps for _, total, _, steps in phases)
    seen = [
        token for ids, documents, _ in rows for token, document in zip(ids, documents, strict=True) if document >= 0
    ]
    assert len(set(seen)) == len(seen)


def _rest_of_lanes(one, lanes):
    """All rows that are left of every lane, also behind the first one that is dry."""
    rows = []
    for lane in range(lanes):
        reader = one._reader(lane)
        while (row := reader.read(lambda number: True, 0)) is not None:
            rows.append([field.tolist() for field in row.row])
    return rows


def test_streamed_lengths_change_without_loss(tmp_path):
    made = streamed(tmp_path, epochs=1, lanes=1)
    every, ranks = Counter(), loaders(made, 2, total=2)
    for length, steps in ((12, 3), (20, 2), (5, 4), (64, 0), (30, 1)):
        state = state_of(ranks)
        for one in ranks:
            one.load_state_dict(state)
            one.set_sequence_length(length)
        for row in (row for _ in range(steps) for row in step_of(ranks)):
            every.update(row[0])
    rest = loader(made, total=1, length=30)
    rest.load_state_dict(state_of(ranks))
    for row in _rest_of_lanes(rest, 1):
        every.update(row[0])
    fresh, expected = loader(made, total=1, length=400), Counter()
    for row in _rest_of_lanes(fresh, 1):
        expected.update(row[0])
    every.pop(2), expected.pop(2)  # padding
    assert every == expected and every[made[1].bos_id] > 80


def test_a_step_taken_back_comes_again():
    made = two_sources(lanes=3)
    expected, one = steps_of(loaders(made, 1), 4), loader(made, workers=2)
    step_of([one])
    state = one.state_dict()
    one.next_step()
    one.take_back()
    assert one.state_dict() == state
    assert steps_of([one], 3) == expected[1:]


def test_a_loader_may_go_back():
    one = loader(two_sources(lanes=2))
    state, first = merged_states([one.state_dict()]), step_of([one])
    steps_of([one], 5)
    one.load_state_dict(state)
    assert step_of([one]) == first and one.progress.rows == G


def test_a_position_is_small():
    ranks = loaders(one_source(), 1)
    steps_of(ranks, 50)
    assert len(json.dumps(state_of(ranks))) < 700


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_thread_of_its_own_puts_the_steps_together(workers, monkeypatch):
    threads, stack = [], loader_module.stack_rows
    monkeypatch.setattr(
        loader_module, "stack_rows", lambda rows: threads.append(threading.current_thread()) or stack(rows)
    )
    steps_of(loaders(one_source(lanes=3), 1, workers=workers), 4)
    assert {thread is threading.main_thread() for thread in threads} == {workers == 0} and len(set(threads)) == 1
