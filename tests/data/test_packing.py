"""Packing against slow twins: nothing lost, little padded, few documents cut."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.documents import IGNORED, assert_every_token_once, documents_of
from v4train.data import packing
from v4train.data.packing import (
    MOST_PADDING,
    PACKINGS,
    Packed,
    Piece,
    best_fit,
    build_row,
    concatenate,
    packed,
    permutation,
    raw_numbers,
    rejoined,
    shuffled,
)

PAD = 2

many_lengths = st.lists(st.integers(2, 40), min_size=1, max_size=60)
row_length = st.integers(1, 30)


def pieces_of(lengths):
    return [Piece(i, 0, size) for i, size in enumerate(lengths)]


def fill(row):
    return sum(piece.size for piece in row)


def naive_best_fit(lengths, length):
    """Fills of the rows: every piece goes into the fullest row that has room, the longest piece first."""
    rows = [length for size in lengths for _ in range(size // length)]
    for rest in sorted((size % length for size in lengths if size % length), reverse=True):
        having_room = [i for i, taken in enumerate(rows) if taken + rest <= length]
        if having_room:
            rows[max(having_room, key=rows.__getitem__)] += rest
        else:
            rows.append(rest)
    return sorted(rows)


def without_joining(lengths, length):
    with patch.object(packing, "_without_gaps", lambda rows, _: rows):
        return best_fit(pieces_of(lengths), length)


@settings(max_examples=200)
@given(many_lengths, row_length)
def test_best_fit_fills_rows_as_the_naive_one_does(lengths, length):
    assert sorted(map(fill, without_joining(lengths, length))) == naive_best_fit(lengths, length)


@settings(max_examples=200)
@given(many_lengths, row_length)
def test_best_fit_cuts_no_document_that_fits_before_rows_are_joined(lengths, length):
    for row in without_joining(lengths, length):
        assert fill(row) <= length
        assert all(piece.size in (lengths[piece.document], lengths[piece.document] % length, length) for piece in row)
        assert all(piece.size == lengths[piece.document] for piece in row if lengths[piece.document] <= length)


@settings(max_examples=300)
@given(many_lengths, row_length)
def test_only_the_emptiest_rows_are_joined_and_no_more_than_it_takes(lengths, length):
    before, after = without_joining(lengths, length), best_fit(pieces_of(lengths), length)
    total = sum(lengths)
    most = max(-(-total // length), int(total / (length * (1 - MOST_PADDING))))
    assert len(after) == min(len(before), most)
    kept = [row for row in before if row in after]
    joined = [row for row in before if row not in after]
    assert not joined or not kept or max(map(fill, joined)) <= min(map(fill, kept))
    # Without the fullest of the joined ones there would be too many rows.
    fills = sorted(map(fill, joined))
    assert not joined or len(kept) + 1 + -(-sum(fills[:-1]) // length) > len(after)
    in_joined = {piece.document for row in joined for piece in row}
    cut = {p.document for row in after for p in row if p.size < lengths[p.document] <= length}
    assert cut <= in_joined


@settings(max_examples=100)
@given(many_lengths, row_length, st.sampled_from(sorted(PACKINGS)))
def test_every_token_is_in_one_row_and_one_target(lengths, length, name):
    documents = documents_of(lengths)
    rows = PACKINGS[name](pieces_of(lengths), length)
    assert len(rows) <= max(-(-documents.num_tokens // length), documents.num_tokens / (length * (1 - MOST_PADDING)))
    assert_every_token_once([build_row(row, documents, length, PAD) for row in rows], documents)


def test_padding_and_cuts_of_many_documents():
    lengths = (np.random.default_rng(0).lognormal(6, 1.3, 4000).astype(int) + 2).tolist()
    total = sum(lengths)

    def shares(name):
        each = [packed(row, np.array(lengths), 1024) for row in PACKINGS[name](pieces_of(lengths), 1024)]
        _, padding, documents, _, truncated = (sum(column) for column in zip(*each, strict=True))
        assert documents == len(lengths)
        return padding / total, truncated / documents

    padding, truncated = shares("best_fit")
    assert padding <= MOST_PADDING and truncated < 0.5 * shares("concatenate")[1]


@settings(max_examples=100)
@given(many_lengths, row_length)
def test_concatenation_is_the_naive_one(lengths, length):
    stream = [(document, token) for document, size in enumerate(lengths) for token in range(size)]
    expected = [stream[first : first + length] for first in range(0, len(stream), length)]
    rows = concatenate(pieces_of(lengths), length)
    assert [[(p.document, token) for p in row for token in range(p.start, p.stop)] for row in rows] == expected


def test_a_row_token_by_token():
    documents = documents_of([4, 5, 3])  # 10.., 14.., 19..
    row = build_row([Piece(1, 1, 3), Piece(2, 0, 3), Piece(0, 2, 4)], documents, 9, PAD)
    assert row.input_ids.tolist() == [15, 16, 19, 20, 21, 12, 13, PAD, PAD]
    assert row.document_ids.tolist() == [0, 0, 1, 1, 1, 2, 2, -1, -1]
    no = IGNORED
    assert row.targets.tolist() == [16, 17, 20, 21, no, 13, no, no, no]  # 17: the document goes on elsewhere
    assert {field.dtype for field in row} == {np.dtype(np.int64)}


def test_what_is_counted_of_a_row():
    lengths = np.array([4, 5, 30, 6])
    assert packed([Piece(0, 0, 4), Piece(1, 0, 3)], lengths, 10) == Packed(7, 3, 2, 2, 1)
    assert packed([Piece(2, 0, 10)], lengths, 10) == Packed(10, 0, 1, 0, 0)  # it never fitted
    assert packed([Piece(2, 10, 20)], lengths, 10) == Packed(10, 0, 0, 0, 0)
    assert packed([Piece(1, 3, 5), Piece(3, 0, 6)], lengths, 10) == Packed(8, 2, 1, 1, 0)


def test_pieces_that_follow_on_one_another_are_joined():
    pieces = [Piece(1, 4, 6), Piece(0, 8, 9), Piece(1, 0, 4), Piece(0, 0, 4), Piece(2, 0, 1), Piece(1, 6, 7)]
    assert rejoined(pieces) == [Piece(0, 0, 4), Piece(0, 8, 9), Piece(1, 0, 7), Piece(2, 0, 1)]
    assert rejoined([]) == []


def test_permutation_is_one_and_does_not_change():
    assert sorted(permutation(1000, 1, 2, 3).tolist()) == list(range(1000))
    assert permutation(8, 0, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # a resumed run relies on it
    assert permutation(0, 1).tolist() == []


@pytest.mark.parametrize("count", [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 20_000])
def test_shuffled_is_a_permutation(count):
    assert sorted(shuffled(np.arange(count), count, 5, count).tolist()) == list(range(count))


def test_shuffled_is_a_function_of_each_index_and_the_key():
    count = 10**12
    index = np.array([0, 1, 7, count - 1, 123_456_789_012])
    together = shuffled(index, count, 3)
    assert [int(shuffled(index[i : i + 1], count, 3)[0]) for i in range(5)] == together.tolist()
    assert ((0 <= together) & (together < count)).all() and len(set(together.tolist())) == 5
    assert shuffled(index, count, 4).tolist() != together.tolist()
    assert index.tolist() == [0, 1, 7, count - 1, 123_456_789_012]  # left as it was
    assert shuffled(index[:0], count, 3).tolist() == []


def test_shuffled_and_raw_numbers_do_not_change():
    """A resumed run relies on them."""
    assert shuffled(np.arange(10), 10, 0, 0, 0).tolist() == [9, 5, 1, 6, 4, 8, 7, 0, 2, 3]
    assert shuffled(np.arange(3), 10**9, 7, 1, 2).tolist() == [921201888, 762623030, 28168428]
    assert raw_numbers(2, 1, 2, 3).tolist() == [12368030237656201616, 2047858591075935483]


def test_shuffled_looks_random():
    order = shuffled(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04
    halves = (order < 5000).reshape(100, 100).sum(1)  # places of each hundred in the first half: binomial
    assert 4 < halves.std() < 6
