"""Multi-token prediction: what it reads and predicts, and its loss, against explicit twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.model.packings import batch_of, layouts
from tests.models import random_model, random_tokens, tiny_config
from v4train.data.loader import Batch
from v4train.model.mtp import next_tokens


def naive_next_tokens(tokens, ids, targets):
    """Position by position: the next token if it is the same document's, and the target of that next position."""
    read, documents, predict = (torch.full_like(tokens, value) for value in (0, -1, -100))
    batch, length = tokens.shape
    for b in range(batch):
        for t in range(length):
            if ids[b, t] < 0:
                continue
            if t + 1 < length and ids[b, t + 1] == ids[b, t]:
                read[b, t], documents[b, t], predict[b, t] = tokens[b, t + 1], ids[b, t], targets[b, t + 1]
            if t + 1 == length and targets[b, t] >= 0:
                read[b, t], documents[b, t] = targets[b, t], ids[b, t]
    return read, documents, predict


@settings(max_examples=60)
@given(layout=layouts)
def test_next_tokens(layout):
    tokens, ids, targets = batch_of(layout, [7, -1, 30])
    targets[1, -1] = 5  # the last document goes on in the next row: its next token is known, the one after is not
    for ours, expected in zip(next_tokens(tokens, ids, targets), naive_next_tokens(tokens, ids, targets), strict=True):
        assert torch.equal(ours, expected)


@settings(max_examples=60)
@given(layout=layouts, count=st.integers(2, 4), odd=st.integers(0, 2**16))
def test_next_tokens_of_shards(layout, count, odd):
    """With two look-ahead tokens each shard of a row has what the whole row has there.

    Here and there a document's next token is in another row, or a token is no target.
    """
    batch = Batch(*batch_of(layout, [7, -1, 30]))
    fields = (batch.input_ids, batch.document_ids, batch.targets)
    batch = Batch(*(x[:, : x.shape[1] // count * count].clone() for x in fields))
    generator = torch.Generator().manual_seed(odd)
    untrained, cut = torch.rand(2, *batch.targets.shape, generator=generator) < 0.2
    ends = (batch.targets < 0) & (batch.document_ids >= 0)
    batch.targets[untrained], batch.targets[ends & cut] = -100, 5
    whole = next_tokens(batch.input_ids, batch.document_ids, batch.targets)
    shards = [batch.shard(index, count, torch.device("cpu")) for index in range(count)]
    parts = [next_tokens(shard.input_ids, shard.document_ids, shard.targets) for shard in shards]
    for expected, *got in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(got, 1), expected)
    assert torch.equal(torch.cat([shard.own_targets for shard in shards], 1), batch.targets)


def test_next_tokens_spelled_out():
    tokens, ids = torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 0, 1, 1]])
    read, documents, predict = next_tokens(tokens, ids, torch.tensor([[4, 5, -100, 7, 8]]))
    assert read.tolist() == [[4, 5, 0, 7, 8]]
    assert documents.tolist() == [[0, 0, -1, 1, 1]]
    assert predict.tolist() == [[5, -100, -100, 8, -100]]


def naive_mtp_loss(model, streams, tokens, ids, targets):
    """Mean over valid tokens of the loss of V4.md 2.6, with each of its pieces written out; streams: [B, S, C, M]."""
    mtp, embedding, lm_head = model.mtp, model.embedding.lookup.weight, model.head.lm_head.weight

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight

    read, documents, predict = naive_next_tokens(tokens, ids, targets)
    token_part = norm(embedding[read], mtp.token_norm) @ mtp.token_projection.weight.T
    each = [token_part + norm(stream, mtp.hidden_norm) @ mtp.hidden_projection.weight.T for stream in streams.unbind(2)]
    hidden = mtp.block(torch.stack(each, 2), read, documents, None)[0]
    output = norm(mtp.output_norm.collapse(hidden), mtp.output_norm.norm)
    return F.cross_entropy((output @ lm_head.T).flatten(0, 1), predict.flatten(), ignore_index=-100)


@pytest.mark.parametrize("residual", ["mhc", "plain"])
def test_loss_and_gradients(residual):
    model = random_model(tiny_config("swa csa", residual__kind=residual)).double().eval()
    tokens, ids, targets = batch_of([19, -2, 12], [33])
    targets[1, -1] = 3
    ours = model(tokens, ids, targets).losses["mtp_loss"]
    state = (None, tokens, ids, targets)
    for part in (model.embedding, *model.blocks):
        state = part(*state)
    theirs = naive_mtp_loss(model, state[0], tokens, ids, targets)
    model.losses.collect()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    names = [name for name, _ in model.named_parameters() if "indexer" not in name and not name.startswith("head.out")]
    parameters = [model.get_parameter(name) for name in names]
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    for name, mine, other in zip(names, *gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-9, msg=name)
    reached = {name.split(".")[0] for name, gradient in zip(names, gradients[0], strict=True) if gradient.norm() > 1e-6}
    assert reached == {"embedding", "blocks", "head", "mtp"}  # the trunk learns from it; embedding and head are shared


def test_weight_of_the_loss():
    model = random_model(tiny_config("swa", mtp__loss_weight=0.7)).eval()
    tokens, ids, targets = batch_of([20, 9])
    output = model(tokens, ids, targets)
    expected = output.losses["lm_loss"] + 0.7 * output.losses["mtp_loss"]
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_logits_know_nothing_of_it():
    with_mtp = random_model(tiny_config("swa csa")).eval()
    without = random_model(tiny_config("swa csa", mtp__num_layers=0)).eval()
    missing = without.load_state_dict(with_mtp.state_dict(), strict=False)
    assert not missing.missing_keys and all(key.startswith("mtp.") for key in missing.unexpected_keys)
    tokens = random_tokens(2, 30)
    logits = with_mtp(tokens).logits
    assert torch.equal(logits, without(tokens).logits)
    logits.sum().backward()
    assert all(parameter.grad is None for parameter in with_mtp.mtp.parameters())
    targets = tokens.roll(-1, 1)
    assert torch.equal(with_mtp(tokens, None, targets).losses["lm_loss"], without(tokens, None, targets).loss)
