"""Rows that are passed over, and steps that are looked at before their time: the sequence stays what it is."""

import json

import pytest

from tests.loading import LENGTH, G, loader, loaders, one_source, state_of, step_of, steps_of, two_sources
from v4train.data.loader import EndOfData, merged_states

pytestmark = pytest.mark.usefixtures("small_windows")

GAP = [3 * G, 5 * G]


def rows_of(batches) -> list:
    return [batch.input_ids.tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_looking_ahead_moves_nothing(workers):
    plain, curious = loader(two_sources(), workers=workers), loader(two_sources(), workers=workers)
    expected = [rows_of(plain.next_step()) for _ in range(6)]
    before = curious.state_dict()
    assert [rows_of(curious.look_ahead(steps)) for steps in (3, 0, 2, 1)] == [expected[i] for i in (3, 0, 2, 1)]
    assert curious.state_dict() == before
    assert [rows_of(curious.next_step()) for _ in range(6)] == expected
    assert curious.state_dict() == plain.state_dict()
    for one in (plain, curious):
        one.close()


def test_looking_ahead_to_the_end_of_the_data():
    plain, curious = (loader(one_source(epochs=1, count=40)) for _ in range(2))
    steps = 0
    with pytest.raises(EndOfData):
        while True:
            plain.next_step()
            steps += 1
    assert steps > 2
    curious.next_step()
    with pytest.raises(EndOfData):
        curious.look_ahead(steps - 1)
    for _ in range(steps - 1):
        curious.next_step()
    with pytest.raises(EndOfData):
        curious.next_step()


@pytest.mark.parametrize(("world", "looks"), [(1, False), (2, False), (4, True)])
def test_rows_are_passed_over(world, looks):
    """By any number of ranks: what is trained on is the sequence without them, tokens are those trained on."""
    whole = loaders(two_sources(), 1)
    expected = [step for number, step in enumerate(step_of(whole) for _ in range(9)) if not 3 <= number < 5]
    ranks = loaders(two_sources(), world)
    for one in ranks:
        one.pass_over(*GAP)
    got = []
    for _ in range(7):
        for one in ranks if looks else ():
            one.look_ahead(3)
        got.append(step_of(ranks))
    assert got == expected
    progress = ranks[0].progress
    assert (progress.rows, progress.tokens, progress.passed_over) == (9 * G, 7 * G * LENGTH, 2 * G * LENGTH)
    assert progress.by_source.total() + progress.padding == progress.tokens
    assert progress.data_hash != whole[0].progress.data_hash


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_that_passes_over_rows_is_resumed_exactly(stop):
    """Before, at and behind the gap, on another number of ranks; weights by tokens change on the way."""
    weights = [{"from_tokens": 0, "a": 1}, {"from_tokens": 6 * G * LENGTH, "b": 1}]
    whole = loaders(two_sources(weights=weights), 1)
    whole[0].pass_over(*GAP)
    expected = [step_of(whole) for _ in range(7)]
    ranks = loaders(two_sources(weights=weights), 2)
    for one in ranks:
        one.pass_over(*GAP)
    got = steps_of(ranks, stop)
    others = loaders(two_sources(weights=weights), 4, state=state_of(ranks))
    got += steps_of(others, 7 - stop)
    assert got == expected
    assert others[0].progress == whole[0].progress and others[0].progress.by_source["b"] > 0


def test_going_back_forgets_a_gap_that_was_not_known_then():
    one = loader(two_sources())
    one.next_step()
    then = one.state_dict()
    one.pass_over(*GAP)
    (first,) = {len(rows_of(one.next_step())) for _ in range(4)}
    one.load_state_dict(then)
    other = loader(two_sources())
    expected = [rows_of(other.next_step()) for _ in range(5)][1:]
    assert [rows_of(one.next_step()) for _ in range(4)] == expected and first == G


def test_how_many_steps_come_before_a_row():
    one = loader(two_sources())
    one.pass_over(*GAP)
    one.next_step()
    assert one.gaps == [GAP]
    # The steps to come begin with rows G, 2G, 5G, 6G
    assert [one.steps_before(row) for row in (0, G, 2 * G - 1, 2 * G, 3 * G, 5 * G, 6 * G, 7 * G)] == [
        *(0, 0, 0, 1, 2, 2, 3, 4)
    ]
    one.close()


def test_a_step_behind_a_gap_can_be_taken_back():
    one = loader(one_source())
    one.pass_over(0, 2 * G)
    before = json.dumps(one.state_dict())
    taken = rows_of(one.next_step())
    one.take_back()
    assert json.dumps(one.state_dict()) == before
    assert rows_of(one.next_step()) == taken


def test_a_position_of_an_older_version_has_no_gaps():
    one = loader(one_source())
    state = merged_states([one.state_dict()])
    del state["gaps"], state["progress"]["passed_over"]
    one.load_state_dict(state)
    assert one.progress.passed_over == 0 and len(one.next_step()) == G
