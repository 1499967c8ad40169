import numpy as np
import pytest
import torch

from v4train.data.corpus import Corpus, TokenizedDocuments
from v4train.data.validation import num_validation_rows, validation_batches

OFFSETS = np.cumsum([0, 5, 40, 7, 33, 12, 2]).astype(np.int64)  # 99 tokens, 6 documents
SIDE = TokenizedDocuments(np.arange(10, 109, dtype=np.uint16), OFFSETS)
CORPUS = Corpus("text", SIDE, SIDE, "f")


def rows(batch_size=2, max_tokens=0, world=1, length=10, padding=False):
    """Rows of all ranks in global order; checks that every rank makes the same number of equal-shaped batches."""
    per_rank = [list(validation_batches(CORPUS, length, batch_size, max_tokens, r, world)) for r in range(world)]
    assert len({len(batches) for batches in per_rank}) == 1
    found = []
    for batches in zip(*per_rank, strict=True):
        for row in range(batch_size):
            for batch in batches:
                assert batch.input_ids.shape == batch.document_ids.shape == batch.targets.shape == (batch_size, length)
                found.append(torch.stack([batch.input_ids[row], batch.document_ids[row], batch.targets[row]]).tolist())
    return found if padding else [row for row in found if set(row[1]) != {-1}]


@pytest.mark.parametrize("max_tokens", [0, 1, 35, 60, 10**9])
@pytest.mark.parametrize("world, batch_size", [(2, 2), (3, 1), (4, 3), (16, 1)])
def test_every_world_size_sees_the_same_rows(world, batch_size, max_tokens):
    assert rows(batch_size, max_tokens, world) == rows(1, max_tokens, 1)


def test_every_target_is_counted_once():
    targets = [t for row in rows() for t in row[2] if t != -100]
    firsts = set((OFFSETS[:-1] + 10).tolist())
    assert sorted(targets) == [t for t in range(10, 109) if t not in firsts]
    inputs = [t for row in rows() for t, document in zip(row[0], row[1], strict=True) if document != -1]
    assert sorted(inputs) == list(range(10, 109))


def test_what_is_padded_counts_nowhere():
    for inputs, documents, targets in rows(4, 0, 2, padding=True):
        for token, document, target in zip(inputs, documents, targets, strict=True):
            assert document != -1 or (token == 2 and target == -100)


def test_max_tokens_takes_the_first_rows():
    everything = rows()
    assert len(everything) == 10 == num_validation_rows(CORPUS, 10, 0)
    assert rows(max_tokens=35) == everything[:3]
    assert rows(max_tokens=1) == everything[:1]


def test_fewer_tokens_than_a_row_are_enough():
    (row,) = rows(batch_size=1, length=200)
    assert sum(target != -100 for target in row[2]) == 99 - 6
    assert row[1].count(-1) == 101
