"""The gated mean of a block against a loop over entries and channels."""

import pytest
import torch
from hypothesis import given, settings

from tests.model.packings import documents_in, ids_of, layouts
from v4train.model.attention.compressor import Compressor, compress
from v4train.model.documents import Shard, compression_blocks


def naive_compress(kv, gate, bias, ids, ratio, overlap):
    """[(row, entry number, value [c])], each value from its own list of (token, channel offset, bias row)."""
    width = kv.shape[-1] // (2 if overlap else 1)
    used, entries = [0] * ids.shape[0], []
    for row, start, stop in documents_in(ids):
        for first in range(start, stop - ratio + 1, ratio):
            own = width if overlap else 0
            terms = [(first + j, own, j) for j in range(ratio)]
            if overlap and first > start:
                terms = [(first - ratio + j, 0, j) for j in range(ratio)] + terms
            value = []
            for channel in range(width):
                logits = torch.stack([gate[row, t, at + channel] + bias[j, at + channel] for t, at, j in terms])
                values = torch.stack([kv[row, t, at + channel] for t, at, _ in terms])
                value.append((logits.exp() / logits.exp().sum() * values).sum())
            entries.append((row, used[row], torch.stack(value)))
            used[row] += 1
    return entries


def inputs(ids, ratio, width, overlap):
    generator = torch.Generator().manual_seed(ratio)
    channels = width * (2 if overlap else 1)
    shapes = [(*ids.shape, channels), (*ids.shape, channels), (ratio, channels)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("ratio", [1, 4, 7])
@settings(max_examples=8)
@given(layout=layouts)
def test_entries_and_gradients(ratio, overlap, layout):
    ids = ids_of(layout, [9, -1, 8, 5])
    kv, gate, bias = inputs(ids, ratio, 2, overlap)
    ours = compress(kv, gate, bias, compression_blocks(ids, ratio), overlap)
    expected = naive_compress(kv, gate, bias, ids, ratio, overlap)
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = torch.stack([ours[row, entry] for row, entry, _ in expected])
    values = torch.stack([value for *_, value in expected])
    torch.testing.assert_close(kept, values, atol=1e-12, rtol=0)
    weight = torch.stack([cotangent[row, entry] for row, entry, _ in expected])
    ours = torch.autograd.grad((kept * weight).sum(), (kv, gate, bias))
    theirs = torch.autograd.grad((values * weight).sum(), (kv, gate, bias))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_the_first_block_of_a_document_has_no_previous():
    """Tokens before a document change nothing in its first entry, and do reach the second entry's own document."""
    ids = ids_of([8, 12])
    kv, gate, bias = inputs(ids, 4, 2, overlap=True)
    blocks = compression_blocks(ids, 4)
    before = compress(kv, gate, bias, blocks, overlap=True)
    with torch.no_grad():
        kv[0, :8] += 1
        gate[0, :8] -= 1
        kv[0, 8:12, :2] += 1  # channels [:c] of the second document's first block: read by its second entry only
    after = compress(kv, gate, bias, blocks, overlap=True)
    unchanged = [torch.equal(before[0, entry], after[0, entry]) for entry in range(5)]
    assert unchanged == [False, False, True, False, True]


def test_module_projects_compresses_and_normalises():
    ids = ids_of([11, 6])
    module = Compressor(6, 3, 4, overlap=True, eps=1e-6).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(*ids.shape, 6, generator=generator, dtype=torch.float64)
    kv, gate = (torch.cat([x @ matrix.T for matrix in part.weight], dim=-1) for part in (module.kv, module.gate))
    ours = module(x, Shard(compression_blocks(ids, 4), 0, None))
    for row, entry, value in naive_compress(kv, gate, module.position_bias, ids, 4, overlap=True):
        expected = value / (value.square().mean() + 1e-6).sqrt() * module.norm.weight
        torch.testing.assert_close(ours[row, entry], expected, atol=1e-12, rtol=0)
