import json

import numpy as np
import pytest
import torch

from v4train.data.corpus import Corpus, TokenizedDocuments
from v4train.data.loader import Loader
from v4train.data.packing import Packing
from v4train.errors import ConfigError

GLOBAL, LENGTH = 16, 12


def corpus_of(lengths, fingerprint="f"):
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    side = TokenizedDocuments(np.arange(10, 10 + offsets[-1], dtype=np.uint16), offsets)
    return Corpus("text", side, side, fingerprint)


CORPUS = corpus_of([5, 60, 7, 33, 12, 2, 90, 41])  # 250 tokens, 20 rows: a step of 16 rows crosses epochs


def loader(rank=0, world=1, micro=2, corpus=CORPUS, length=LENGTH, batch=GLOBAL, seed=7):
    return Loader(corpus, length, batch, micro, rank, world, seed)


def rows_of(batches):
    return [row for b in batches for row in torch.stack([b.input_ids, b.document_ids, b.targets], 1).tolist()]


def global_steps(world, micro, steps):
    """The rows of each step in global order, put together from all the ranks."""
    loaders = [loader(rank, world, micro) for rank in range(world)]
    result = []
    for _ in range(steps):
        per_rank = [one.next_step() for one in loaders]
        assert all(len(batches) == GLOBAL // (world * micro) for batches in per_rank)
        result.append(rows_of(batch for micro_step in zip(*per_rank, strict=True) for batch in micro_step))
    return result


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 16), (2, 2), (2, 8), (4, 1), (4, 4)])
def test_the_global_rows_do_not_depend_on_the_ranks(world, micro):
    packing = Packing(CORPUS.train, LENGTH, 7, 2)
    expected = [[[f.tolist() for f in packing.row(s * GLOBAL + i)] for i in range(GLOBAL)] for s in range(4)]
    assert global_steps(world, micro, 4) == expected


def test_batches_are_int64_of_the_promised_shape():
    batch = loader(micro=4).next_step()[0]
    for tensor in (batch.input_ids, batch.document_ids, batch.targets):
        assert tensor.dtype == torch.int64 and tensor.shape == (4, LENGTH)


def test_no_target_crosses_a_document():
    for batch in (b for _ in range(5) for b in loader(micro=16).next_step()):
        document = np.searchsorted(CORPUS.train.offsets, batch.input_ids.numpy() - 10, side="right") - 1
        np.testing.assert_array_equal(document, batch.document_ids.numpy())
        is_last = np.isin(batch.input_ids.numpy() - 10 + 1, CORPUS.train.offsets)
        np.testing.assert_array_equal(batch.targets.numpy() == -100, is_last)


@pytest.mark.parametrize("steps", [0, 1, 3, 50])
def test_resume_is_exact_and_may_change_the_ranks(steps):
    running = loader()
    for _ in range(steps):
        running.next_step()
    state = json.loads(json.dumps(running.state_dict()))
    assert len(json.dumps(state)) < 300
    expected = [rows_of(running.next_step()) for _ in range(3)]
    same = loader()
    same.load_state_dict(state)
    assert [rows_of(same.next_step()) for _ in range(3)] == expected
    assert same.state_dict() == running.state_dict()
    halves = [loader(rank, 2, 8) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    assert [sum((rows_of(half.next_step()) for half in halves), []) for _ in range(3)] == expected


def test_a_loader_may_go_back():
    one = loader()
    start, first = one.state_dict(), rows_of(one.next_step())
    for _ in range(9):
        one.next_step()
    one.load_state_dict(start)
    assert rows_of(one.next_step()) == first


@pytest.mark.parametrize(
    "other, key",
    [
        ({"corpus": corpus_of([50, 200], "g")}, "data"),
        ({"seed": 8}, "seed"),
        ({"length": 24}, "train.sequence_length"),
    ],
)
def test_a_position_in_other_rows_is_refused(other, key):
    with pytest.raises(ConfigError) as error:
        loader(**other).load_state_dict(loader().state_dict())
    assert error.value.key == key


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"length": 251}, "train.sequence_length"),
        ({"length": 0}, "train.sequence_length"),
        ({"micro": 3}, "train.global_batch_size"),
        ({"micro": 0}, "train.micro_batch_size"),
        ({"world": 3}, "train.global_batch_size"),
        ({"batch": 0}, "train.global_batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(settings, key):
    with pytest.raises(ConfigError) as error:
        loader(**settings)
    assert error.value.key == key


def test_data_tokens_and_epoch_count_all_ranks():
    one = loader(1, 2)
    assert one.data_tokens == {"text": 0}
    one.next_step()
    assert one.data_tokens == {"text": GLOBAL * LENGTH}
    assert one.epoch == GLOBAL / 20
