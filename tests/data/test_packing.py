import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4train.data.corpus import TokenizedDocuments
from v4train.data.packing import Packing, Stream, permutation
from v4train.errors import ConfigError

PAD = 2


def documents_of(lengths):
    """Every token differs from every other: token t of the corpus is 10 + t."""
    offsets = np.cumsum([0, *lengths])
    return TokenizedDocuments(np.arange(10, 10 + offsets[-1], dtype=np.uint32), offsets.astype(np.int64))


def naive_rows(documents, order, length):
    """Every row of a stream, token by token; the last one padded."""
    stream = []
    for document in order:
        for position in range(documents.offsets[document], documents.offsets[document + 1]):
            stream.append((int(documents.tokens[position]), int(document)))
    rows = []
    for first in range(0, len(stream), length):
        inputs, ids, targets = [], [], []
        for position in range(first, first + length):
            token, document = stream[position] if position < len(stream) else (PAD, -1)
            following, next_document = stream[position + 1] if position + 1 < len(stream) else (None, None)
            inputs.append(token)
            ids.append(document)
            targets.append(following if document == next_document else -100)
        rows.append((inputs, ids, targets))
    return rows


def as_lists(row):
    return tuple(field.tolist() for field in row)


lengths_and_row = st.tuples(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 25))


@settings(max_examples=200, deadline=None)
@given(case=lengths_and_row, seed=st.integers(0, 2**40))
def test_rows_of_a_stream_equal_the_naive_ones(case, seed):
    lengths, length = case
    documents = documents_of(lengths)
    order = permutation(len(lengths), seed)
    stream = Stream(documents, order)
    expected = naive_rows(documents, order, length)
    assert [as_lists(stream.row(i * length, length, PAD)) for i in range(len(expected))] == expected
    assert all(field.dtype == np.int64 and field.shape == (length,) for field in stream.row(0, length, PAD))


@settings(max_examples=200, deadline=None)
@given(case=lengths_and_row, seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_token_once(case, seed, epoch):
    lengths, length = case
    documents = documents_of(lengths)
    if documents.num_tokens < length:
        with pytest.raises(ConfigError, match=f"train.sequence_length={length}"):
            Packing(documents, length, seed, PAD)
        return
    packing = Packing(documents, length, seed, PAD)
    assert packing.rows_per_epoch == documents.num_tokens // length
    rows = [packing.row(epoch * packing.rows_per_epoch + i) for i in range(packing.rows_per_epoch)]
    inputs = np.concatenate([row.input_ids for row in rows])
    targets = np.concatenate([row.targets for row in rows])
    ids = np.concatenate([row.document_ids for row in rows])
    # Inputs: no token twice; those that never appear are the counted rest.
    assert len(set(inputs.tolist())) == len(inputs)
    assert len(inputs) + packing.dropped_tokens_per_epoch == documents.num_tokens
    # Targets: every token that isn't its document's first one, save those behind the last whole row.
    valid = targets != -100
    assert len(set(targets[valid].tolist())) == valid.sum()
    last_tokens = set((documents.offsets[1:] - 1 + 10).tolist())
    assert set(inputs[~valid].tolist()) == last_tokens & set(inputs.tolist())
    # The following token of the same document, and never another's.
    np.testing.assert_array_equal(targets[valid], inputs[valid] + 1)
    np.testing.assert_array_equal(np.searchsorted(documents.offsets, inputs - 10, side="right") - 1, ids)
    # Same rows as the naive stream, in an order of their own.
    naive = naive_rows(documents, permutation(len(lengths), seed, epoch, 0), length)[: packing.rows_per_epoch]
    assert sorted(map(as_lists, rows)) == sorted(naive)
    located = [packing.locate(epoch * packing.rows_per_epoch + i) for i in range(packing.rows_per_epoch)]
    assert [as_lists(row) for row in rows] == [naive[r] for e, r in located]
    assert sorted(located) == [(epoch, r) for r in range(packing.rows_per_epoch)]


def test_row_number_is_a_pure_function():
    documents = documents_of([7] * 40)
    packing, other = Packing(documents, 5, 3, PAD), Packing(documents, 5, 3, PAD)
    numbers = [0, 500, 56, 3, 55, 57, 112, 0, 168, 1]
    forward = {n: as_lists(other.row(n)) for n in sorted(numbers)}
    assert all(as_lists(packing.row(n)) == forward[n] for n in numbers)


def test_orders_differ_between_epochs_and_seeds():
    documents = documents_of([10] * 50)

    def epoch(seed, number):
        packing = Packing(documents, 25, seed, PAD)
        return [as_lists(packing.row(number * packing.rows_per_epoch + i)) for i in range(packing.rows_per_epoch)]

    assert len({str(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4
    assert sorted(epoch(0, 0)) != sorted(epoch(0, 1))  # other neighbours, not only another order of the same rows


def test_a_huge_document_does_not_fill_a_batch():
    packing = Packing(documents_of([20] * 100 + [2000]), 20, 0, PAD)
    huge = [bool((packing.row(n).document_ids == 100).any()) for n in range(packing.rows_per_epoch)]
    batches = np.array(huge[:200]).reshape(10, 20).mean(1)
    assert 0.2 < batches.min() and batches.max() < 0.8


def test_permutation_is_one_and_does_not_change():
    assert sorted(permutation(1000, 1, 2, 3).tolist()) == list(range(1000))
    assert permutation(8, 0, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # NumPy 2.x; a resumed run relies on it
    assert permutation(0, 1).tolist() == []
