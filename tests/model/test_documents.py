"""Document starts and compression blocks against a loop over documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.packings import documents_in, ids_of, layouts, visible_entries
from v4train.model.attention.compressor import compress
from v4train.model.documents import (
    compression_blocks,
    document_starts,
    gather_blocks,
    lay_out,
    place,
    tokens_before,
)
from v4train.model.seams import Sequence

RATIOS = [1, 4, 7, 16]
batches = st.lists(layouts, min_size=1, max_size=3)


def naive_blocks(ids, ratio):
    """Fields of `Blocks` by name, filled block by block and token by token."""
    batch, length = ids.shape
    slots = length // ratio
    fields = {
        "tokens": torch.zeros(batch, slots, ratio, dtype=torch.long),
        "valid": torch.zeros(batch, slots, dtype=torch.bool),
        "has_previous": torch.zeros(batch, slots, dtype=torch.bool),
        "positions": torch.zeros(batch, slots, dtype=torch.long),
        "slot": torch.full((batch, length), slots * ratio),
    }
    used = [0] * batch
    for row, start, stop in documents_in(ids):
        for block in range((stop - start) // ratio):
            entry = used[row]
            used[row] += 1
            fields["valid"][row, entry] = True
            fields["has_previous"][row, entry] = block > 0
            fields["positions"][row, entry] = block * ratio
            for offset in range(ratio):
                token = start + block * ratio + offset
                fields["tokens"][row, entry, offset] = token
                fields["slot"][row, token] = entry * ratio + offset
    return fields


@settings(max_examples=60)
@given(rows=batches)
def test_starts(rows):
    ids = ids_of(*rows)
    expected = torch.arange(ids.shape[1]).repeat(ids.shape[0], 1)  # a padded position starts at itself
    for row, start, stop in documents_in(ids):
        expected[row, start:stop] = start
    assert torch.equal(document_starts(ids), expected)


@pytest.mark.parametrize("ratio", RATIOS)
@settings(max_examples=40)
@given(rows=batches)
def test_every_field_of_blocks(ratio, rows):
    ids = ids_of(*rows)
    blocks = compression_blocks(ids, ratio)
    for name, expected in naive_blocks(ids, ratio).items():
        assert torch.equal(getattr(blocks, name), expected), name
    visible = visible_entries(ids, ratio)
    length = ids.shape[1]
    assert torch.equal(blocks.visible(0, length, slice(0, length // ratio)), visible)
    begin, stop = length // 3, length // 2 + 1
    reach = blocks.reach(begin, stop)
    assert torch.equal(blocks.visible(begin, stop, reach), visible[:, begin:stop, reach])
    assert not visible[:, begin:stop, reach.stop :].any() and not visible[:, begin:stop, : reach.start].any()
    assert reach.stop == stop // ratio
    assert torch.equal(blocks.end - blocks.first, visible.sum(-1))


@pytest.mark.parametrize("ratio", RATIOS)
@settings(max_examples=20)
@given(rows=batches)
def test_gathered_blocks_and_their_gradient(ratio, rows):
    ids = ids_of(*rows)
    generator = torch.Generator().manual_seed(len(rows))
    x = torch.randn(*ids.shape, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    blocks, fields = compression_blocks(ids, ratio), naive_blocks(ids, ratio)
    taken = gather_blocks(x, blocks)
    cotangent = torch.randn(taken.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(taken, x, cotangent)
    expected = torch.zeros_like(x)  # unused slots give none, whatever arrives there
    for row, entry in fields["valid"].nonzero().tolist():
        for offset in range(ratio):
            token = fields["tokens"][row, entry, offset]
            assert torch.equal(taken[row, entry, offset], x[row, token])
            expected[row, token] = cotangent[row, entry, offset]
    assert torch.equal(gradient, expected)


def test_gradcheck_of_gather():
    ids = ids_of([5, -1, 8], [3, 2, 9])
    blocks = compression_blocks(ids, 4)
    x = torch.randn(*ids.shape, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_blocks(x, blocks) * blocks.valid[..., None, None], x)


def test_a_row_without_documents_and_a_row_shorter_than_a_block():
    blocks = compression_blocks(ids_of([-8], [3]), 4)
    assert blocks.valid.tolist() == [[False, False]] * 2
    assert not blocks.visible(0, 8, slice(0, 2)).any()
    assert blocks.slot.unique().tolist() == [8]


class ShardOf(Sequence):
    """Shard `index` of `count` of rows whose documents are known."""

    def __init__(self, documents, index, count):
        self.documents, self.index, self.count = documents, index, count

    def begin(self, length):
        return self.index * length

    def whole(self, document_ids):
        return self.documents


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ratio", [1, 4, 16])
@settings(max_examples=40)
@given(rows=batches, count=st.integers(2, 4))
def test_shards_make_the_entries_of_the_whole_row(ratio, overlap, rows, count):
    """Each from its own tokens and the few in front of them; every query sees what it saw."""
    ids = ids_of(*rows)
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % count), value=-1)
    length, parts = ids.shape[1] // count, 2 if overlap else 1
    kv, gate = torch.randn(2, *ids.shape, parts * 3, dtype=torch.float64)
    bias = torch.randn(ratio, parts * 3, dtype=torch.float64)
    blocks = compression_blocks(ids, ratio)
    expected = compress(kv, gate, bias, blocks, overlap)
    made, seen = [], []
    for index in range(count):
        own = slice(index * length, (index + 1) * length)
        sequence = ShardOf(ids, index, count)
        where = place(ids[:, own], None, sequence)
        assert torch.equal(where.starts + where.positions, torch.arange(ids.shape[1])[own].expand_as(where.starts))
        shard, sees = lay_out(where, ratio, overlap, sequence)
        tokens = slice(max(0, own.start - tokens_before(ratio, overlap)), own.stop)
        entries = compress(kv[:, tokens], gate[:, tokens], bias, shard.own, overlap)
        made.append(entries[:, shard.leading :])
        seen.append((sees.first, sees.end))
        assert sees.reach(0, length).stop == own.stop // ratio
    gathered = torch.cat(made, dim=1)
    ours = torch.take_along_dim(gathered, shard.order[..., None], dim=1)
    valid = blocks.valid[..., None]
    torch.testing.assert_close(torch.where(valid, ours, 0), torch.where(valid, expected, 0))
    for name, parts_of in zip(("first", "end"), zip(*seen, strict=True), strict=True):
        assert torch.equal(torch.cat(parts_of, dim=1), getattr(blocks, name))
