"""The recall task: what it says of its rows is so, and they are a function of seed and number alone."""

import numpy as np
import pytest

from tests.documents import documents_of
from v4train.data.packing import IGNORED_TARGET
from v4train.data.recall import OPENING, RecallTask
from v4train.data.tokenizer import train_tokenizer
from v4train.errors import ConfigError

LENGTH, ROWS = 200, 40
OPTIONS = {"distances": [16, 50, 150], "pairs": 3, "keys": 20, "values": 10}
TOKENIZER = train_tokenizer(["a text of words, and @ more of them\n" * 20], 300)


def task(seed=1, **others) -> RecallTask:
    return RecallTask(documents_of([30, 2, 90, 40], 1000), TOKENIZER, LENGTH, seed, **OPTIONS | others)


def statements(task: RecallTask, row: np.ndarray) -> list[tuple[int, int, int]]:
    """(place of the value, key, value) of every statement in a row, found by reading it."""
    opening, found = TOKENIZER.encode(OPENING).tolist(), []
    for start in range(len(row) - len(opening) - 1):
        key, value = row[start + len(opening) : start + len(opening) + 2]
        if row[start : start + len(opening)].tolist() == opening and key in task.keys and value in task.values:
            found.append((start + len(opening) + 1, int(key), int(value)))
    return found


def test_each_marked_target_repeats_a_value_at_its_distance_and_no_other_does():
    made, seen = task(), []
    for number in range(ROWS):
        (input_ids, document_ids, targets), distances = made.row(number)
        tokens = np.append(input_ids, targets[-1])
        assert input_ids.shape == document_ids.shape == targets.shape == distances.shape == (LENGTH,)
        assert (targets == tokens[1:]).all() and not document_ids.any() and (targets != IGNORED_TARGET).all()
        assert input_ids[0] == TOKENIZER.bos_id
        told, asked = {}, {}
        for place, key, value in statements(made, tokens):
            (asked if key in told else told)[key] = (place, value)
        assert asked.keys() == told.keys()
        expected = np.zeros(LENGTH, dtype=np.int64)
        for key, (place, value) in asked.items():
            assert value == told[key][1]
            expected[place - 1] = place - told[key][0]
        assert (distances == expected).all()
        seen += distances[distances > 0].tolist()
    counts = {distance: seen.count(distance) for distance in OPTIONS["distances"]}
    assert sum(counts.values()) == len(seen) and all(0.9 * ROWS <= count <= ROWS for count in counts.values()), counts


def test_rows_are_a_function_of_seed_and_number():
    one, again, other = task(), task(), task(seed=2)
    for number in (5, 0, 5):
        assert (one.row(number).row.input_ids == again.row(number).row.input_ids).all()
    assert (one.row(0).row.input_ids != one.row(1).row.input_ids).any()
    assert (one.row(0).row.input_ids != other.row(0).row.input_ids).any()
    assert set(one.keys) != set(other.keys)


def test_keys_and_values_are_different_ordinary_tokens():
    made = task()
    drawn = [*made.keys, *made.values]
    assert len(set(drawn)) == 30 and not set(drawn) & set(TOKENIZER.encode(OPENING))
    assert all(TOKENIZER.bytes_per_token[drawn] > 0)


def test_the_text_between_is_that_of_documents_without_their_ends():
    """`documents_of` numbers its tokens on from one document to the next."""
    made = task(pairs=1)
    row, distances = made.row(3)
    tokens, documents = row.input_ids[1:], documents_of([30, 2, 90, 40], 1000)
    ends = {int(documents.tokens(d)[place]) for d in range(4) for place in (0, -1)}
    assert not ends & set(tokens.tolist())


def test_distances_are_doubled_as_far_as_a_row_goes_where_none_are_given():
    width = len(TOKENIZER.encode(OPENING)) + 2
    assert task(distances=None).config.distances == [32, 64, 128]
    whole = RecallTask(documents_of([90], 1000), TOKENIZER, 64 + 1 + width, 1, **OPTIONS | {"distances": None})
    assert whole.config.distances == [32, 64]
    assert whole.row(1).distances.max() in (32, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distances": [2]}, "recall_distances=.2.: each must lie between"),
        ({"distances": [LENGTH]}, "recall_distances=.200.: each must lie between"),
        ({"distances": []}, "recall_distances=.*"),
        ({"values": 280}, "recall_values=280: the tokenizer has"),
        ({"values": 0}, "recall_values=0: at least 1"),
        ({"pairs": 21}, "recall_pairs=21: a row's keys differ"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        task(**options)


def test_documents_without_text_are_refused():
    with pytest.raises(ConfigError, match="next to none of them has any text"):
        RecallTask(documents_of([2, 2]), TOKENIZER, LENGTH, 1, **OPTIONS).row(0)
