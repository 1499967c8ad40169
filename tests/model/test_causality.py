"""What may influence what: nothing flows back in time, between documents, or out of padding."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.packings import batch_of, documents_in, ids_of, layouts, shifted
from tests.models import random_model, random_tokens, tiny_config

V4_MIXES = ["swa swa", "csa csa", "hca hca", "swa csa hca csa", "hca csa swa"]
FULL_MIXES = ["mha gqa", "mqa mla", "mla mla:window=6"]
MIXES = [
    *V4_MIXES,
    *FULL_MIXES,
    "dsa dsa",
    "gqa:window=5 mha:window=3:dilation=4",
    "mqa:window=4:global_tokens=2 mla:window=3:dilation=2:global_tokens=3:sink=true",
    "mha gqa mla dsa csa hca",
]
CLOSE = 1e-10  # in fp64, so that no rounding of another shape hides a leak

every_mix = pytest.mark.parametrize("mix", MIXES)
examples = settings(max_examples=6)


@functools.cache
def model_of(mix):
    return random_model(tiny_config(mix)).double()


@torch.no_grad()
def logits_of(mix, tokens, ids):
    return model_of(mix).eval()(tokens, ids).logits


@torch.no_grad()
def trained(mix, tokens, ids, targets):
    """(sums of the losses that are means over tokens, balance loss, router loads) of one training forward pass."""
    model = model_of(mix).train()
    losses, counts = model(tokens, ids, targets).losses, model.count(tokens, ids, targets)
    kinds = [count for count in ("indexer_kl_csa", "indexer_kl_dsa") if count in counts]
    counted = {"lm_loss": "lm_loss", "mtp_loss": "mtp_loss"}
    if len(kinds) == 1:  # with both kinds the loss is a mean of means over different tokens
        counted["indexer_kl"] = kinds[0]
    sums = torch.stack([losses[name] * counts[count] for name, count in counted.items()])
    loads = torch.stack([router.take_load() for router in model.routers().values()])
    return sums, losses["balance_loss"], loads


def replaced(tokens, where):
    """Other tokens at the positions of a bool mask."""
    return torch.where(where, (tokens + 1 + random_tokens(*tokens.shape, vocab_size=63, seed=9)) % 64, tokens)


def check(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@every_mix
@examples
@given(layout=layouts, where=st.floats(0, 1, exclude_max=True))
def test_a_future_token_changes_no_earlier_logit(mix, layout, where):
    tokens, ids, _ = batch_of([30, *layout], layout)
    position = int(where * tokens.shape[1])
    future = torch.arange(tokens.shape[1]).expand_as(tokens) >= position
    before, after = (logits_of(mix, each, ids) for each in (tokens, replaced(tokens, future)))
    check(after[:, :position], before[:, :position], CLOSE)
    assert (after[:, position] - before[:, position]).abs().max() > 1e-3


@pytest.mark.parametrize("mix", [*V4_MIXES, *FULL_MIXES])
def test_one_token_reaches_every_later_position_that_may_see_it(mix):
    """Of two layers or more; a window of 8 alone reaches 7 positions a layer."""
    tokens, ids, _ = batch_of([50])
    where = torch.arange(50)[None] == 3
    changed = (logits_of(mix, tokens, ids) - logits_of(mix, replaced(tokens, where), ids))[0].abs().amax(-1) > 1e-6
    assert not changed[:3].any() and changed[3:11].all()
    if mix == "swa swa":
        assert changed[:18].sum() == 15 and not changed[18:].any()
    else:
        assert changed[18:].any()


@every_mix
@examples
@given(layout=layouts, data=st.data())
def test_another_document_changes_nothing(mix, layout, data):
    tokens, ids, _ = batch_of([5, *layout, 20])
    documents = documents_in(ids)
    _, start, stop = documents[data.draw(st.integers(0, len(documents) - 1))]
    outside = torch.ones_like(tokens, dtype=torch.bool)
    outside[0, start:stop] = False
    before, after = (logits_of(mix, each, ids) for each in (tokens, replaced(tokens, outside)))
    check(after[0, start:stop], before[0, start:stop], CLOSE)


@every_mix
@examples
@given(layout=layouts)
def test_packed_documents_equal_each_alone(mix, layout):
    tokens, ids, _ = batch_of([*layout, 34], [-3, 40, 1, *layout])
    packed = logits_of(mix, tokens, ids)
    for row, start, stop in documents_in(ids):
        alone = logits_of(mix, tokens[row : row + 1, start:stop], None)
        check(packed[row, start:stop], alone[0], CLOSE)


@every_mix
@examples
@given(layout=layouts)
def test_losses_and_loads_of_a_packed_batch_are_those_of_its_documents(mix, layout):
    batch = batch_of([*layout, -2, 34], [-3, 40, *layout])
    sums, _, loads = trained(mix, *batch)
    parts = []
    for row, start, stop in documents_in(batch[1]):
        parts.append(trained(mix, *[field[row : row + 1, start:stop] for field in batch]))
    expected = sum(part[0] for part in parts)
    assert sums[0] > 1 and len(sums) == 2 + (("csa" in mix) != ("dsa" in mix))
    torch.testing.assert_close(sums, expected, atol=1e-7, rtol=CLOSE)
    assert torch.equal(loads, sum(part[2] for part in parts))


@pytest.mark.parametrize("mix", ["swa csa hca csa"])
@examples
@given(layout=st.lists(st.integers(1, 30), min_size=1, max_size=4), gaps=st.lists(st.integers(0, 6), min_size=5))
def test_padding_anywhere_changes_no_loss(mix, layout, gaps):
    """The balance loss, a mean over rows, included."""
    layout = [3, *layout]
    padded_layout = [part for pair in zip([-gap for gap in gaps], layout, strict=False) for part in pair if part]
    padded_layout = [*padded_layout, *layout[len(gaps) :], -2]
    tokens, ids, targets = batch_of(layout)
    padded_ids = ids_of(padded_layout)
    padded_tokens = random_tokens(*padded_ids.shape, seed=5)
    padded_tokens[padded_ids >= 0] = tokens[0]
    ours = trained(mix, padded_tokens, padded_ids, shifted(padded_tokens, padded_ids))
    sums, balance, loads = trained(mix, tokens, ids, targets)
    torch.testing.assert_close(ours[0], sums, atol=1e-7, rtol=CLOSE)
    check(ours[1], balance, CLOSE)
    assert torch.equal(ours[2], loads)


@every_mix
def test_no_document_ids_is_one_document_a_row(mix):
    tokens = random_tokens(2, 45)
    zeros, targets = torch.zeros_like(tokens), tokens.roll(-1, 1)
    assert torch.equal(logits_of(mix, tokens, None), logits_of(mix, tokens, zeros))
    model = model_of(mix).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens, None, targets).loss, model(tokens, zeros, targets).loss)
