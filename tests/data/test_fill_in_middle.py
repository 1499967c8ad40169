"""Fill-in-middle: the same tokens, told in another order."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.documents import FIRST, documents_of
from v4train.data.fill_in_middle import FillInMiddle
from v4train.data.packing import Piece, build_row, concatenate

BEGIN, HOLE, END = 3, 4, 5


def window_of(lengths, key=(0, 1)):
    documents = documents_of(lengths)
    return SimpleNamespace(key=key, lengths=np.diff(documents.offsets), tokens=documents.tokens)


def rearranged(lengths, rate=1.0, seed=0, key=(0, 1)):
    return FillInMiddle(window_of(lengths, key), rate, (BEGIN, HOLE, END), seed)


def whole(window, document):
    return window.tokens(document, 0, int(window.lengths[document])).tolist()


def told_in_order(ids):
    """The document again, from prefix, suffix and middle."""
    begin, hole, end = (ids.index(token) for token in (BEGIN, HOLE, END))
    assert begin == 1 and begin < hole < end
    return [ids[0], *ids[begin + 1 : hole], *ids[end + 1 : -1], *ids[hole + 1 : end], ids[-1]]


many_lengths = st.lists(st.integers(2, 40), min_size=1, max_size=20)


@settings(max_examples=100)
@given(many_lengths, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**40))
def test_a_document_is_all_there_in_prefix_suffix_middle_order(lengths, rate, seed):
    plain, window = window_of(lengths), rearranged(lengths, rate, seed)
    for document, size in enumerate(lengths):
        ids = whole(window, document)
        assert len(ids) == window.lengths[document]
        if len(ids) == size:
            assert rate < 1 and ids == whole(plain, document)
        else:
            assert rate > 0 and told_in_order(ids) == whole(plain, document)  # BOS and EOS at their places


@settings(max_examples=50)
@given(many_lengths, st.integers(0, 50), st.integers(0, 50))
def test_a_part_is_the_part_of_the_whole(lengths, start, size):
    window = rearranged(lengths)
    for document in range(len(lengths)):
        part = window.tokens(document, start, start + size)
        assert part.tolist() == whole(window, document)[start : start + size]


def test_of_a_long_document_no_more_is_read_than_asked_for():
    read = []
    window = window_of([100_000])
    tokens = window.tokens
    window.tokens = lambda document, start, stop: read.append(stop - start) or tokens(document, start, stop)
    FillInMiddle(window, 1.0, (BEGIN, HOLE, END), 0).tokens(0, 50_000, 50_100)
    assert sum(read) <= 100


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_kept_and_cuts_lie_anywhere(rate):
    count = 20_000
    window = rearranged([22] * count, rate, 3)
    chosen = np.flatnonzero(window.lengths == 25)
    assert abs(len(chosen) / count - rate) < 4 * np.sqrt(rate * (1 - rate) / count)
    middles = np.array([(ids := whole(window, d)).index(HOLE) - ids.index(BEGIN) - 1 for d in chosen[:1000]])
    # The first of two uniform cuts of 0..20 tokens: a third of the body on average
    assert abs(middles.mean() / 20 - 1 / 3) < 0.04 and middles.min() == 0 and middles.max() > 15


def test_it_is_a_function_of_seed_and_place():
    lengths = [30] * 50

    def told(**others):
        window = rearranged(lengths, 0.5, **others)
        return [whole(window, document) for document in range(50)]

    assert told() == told()
    assert len({str(told(**others)) for others in ({}, {"seed": 1}, {"key": (0, 2)}, {"key": (1, 1)})}) == 4


def test_rows_predict_the_document_as_it_is_told():
    window = rearranged([20, 9])
    stream = [(d, i) for d in (0, 1) for i in range(int(window.lengths[d]))]
    rows = concatenate([Piece(d, 0, int(window.lengths[d])) for d in (0, 1)], 7)
    made = [build_row(row, window, 7, 2) for row in rows]
    inputs = np.concatenate([row.input_ids[row.document_ids >= 0] for row in made]).tolist()
    assert inputs == whole(window, 0) + whole(window, 1)
    targets = np.concatenate([row.targets for row in made])[: len(stream)].tolist()
    assert targets == whole(window, 0)[1:] + [-100] + whole(window, 1)[1:] + [-100]
    assert {BEGIN, HOLE, END} <= set(targets) and min(set(inputs) - {BEGIN, HOLE, END}) == FIRST
