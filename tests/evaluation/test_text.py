"""Bits per byte by source and position, against logits and loops."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.documents import documents_of, indexed_source
from tests.models import random_model
from tests.runs import tiny
from v4train.config import load
from v4train.data import Batch, Corpus, train_tokenizer, validation_batches
from v4train.evaluation.scores import Scores, scorer
from v4train.evaluation.text import position_edges, positions, text_figures, text_sums, text_sums_by_source
from v4train.model import model_config

LENGTH = 48
TOKENIZER = train_tokenizer(["some text to learn from, é and ü\n" * 9], 280)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = load(tiny(tmp_path_factory.mktemp("model"), "run", "train.sequence_length=48"))
    return random_model(model_config(config.model), seed=2).eval()


def batch() -> Batch:
    """Two packed rows, one padded at its end."""
    documents = torch.zeros(2, LENGTH, dtype=torch.long)
    documents[0, 20:], documents[1, 5:30], documents[1, 30:] = 1, 1, -1
    ids = torch.randint(6, 280, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    targets[0, 19] = targets[1, 4] = -100
    targets[1, 29:] = -100
    return Batch(ids[:, :-1], documents, targets)


def test_positions_count_the_tokens_of_the_same_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [3, -1, -1, -1, -1, -1]])
    assert positions(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_edges_double():
    assert position_edges(100) == [0, 16, 32, 64]
    assert position_edges(64) == [0, 16, 32]
    assert position_edges(8) == [0]


def test_scores_are_those_of_the_logits(model):
    made = batch()
    scores = scorer(model, "cpu")(made)
    logits = model(made.input_ids, made.document_ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), made.targets.flatten(), reduction="none", ignore_index=-100)
    valid = made.targets != -100
    torch.testing.assert_close(scores.nats[valid], expected.view_as(scores.nats)[valid])
    assert torch.equal(scores.likeliest[valid], (logits.argmax(-1) == made.targets)[valid])
    assert torch.equal(scores.counted, valid)
    assert model.losses.tokens is None


def test_sums_by_position_are_those_of_a_loop(model):
    made, edges = batch(), [0, 4, 16]
    scores_of = scorer(model, "cpu")
    scores = scores_of(made)
    table = torch.as_tensor(TOKENIZER.bytes_per_token)
    found = text_sums([made], scores_of, table, edges)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for row in range(2):
        for place in range(LENGTH):
            target = int(made.targets[row, place])
            if target == -100:
                continue
            documents = made.document_ids[row].tolist()
            before = sum(other == documents[place] for other in documents[:place])
            own = expected[sum(before >= edge for edge in edges) - 1]
            own += torch.tensor([scores.nats[row, place].item(), TOKENIZER.bytes_per_token[target], 1.0])
    torch.testing.assert_close(found, expected.double())


def uniform(batch: Batch) -> Scores:
    counted = batch.targets != -100
    return Scores(counted * math.log(280), torch.zeros_like(counted), counted)


def corpus() -> Corpus:
    names = {"a": ([30, 200, 9], 6), "b": ([150, 40], 70)}
    return Corpus({name: indexed_source(name, documents_of(*of)) for name, of in names.items()})


def test_a_model_that_knows_nothing_has_the_bits_per_byte_of_the_vocabulary():
    length = 32
    options = {"tokens": 400, "length": length, "batch_size": 2}
    sums = text_sums_by_source(corpus(), TOKENIZER, uniform, **options)
    found = text_figures(sums, ["a", "b"], length)
    for name, source in corpus().sources.items():
        batches = list(validation_batches(source.validation, length, 2, 200, 0, 1, TOKENIZER.pad_id))
        targets = np.concatenate([b.targets.numpy().ravel() for b in batches])
        targets = targets[targets != -100]
        size = TOKENIZER.bytes_per_token[targets].sum()
        own = found["by_source"][name]
        assert own["tokens"] == len(targets) > 100
        assert own["bits_per_byte"] == pytest.approx(math.log2(280) * len(targets) / size)
        assert own["loss"] == pytest.approx(math.log(280))
    assert found["all"]["tokens"] == sum(of["tokens"] for of in found["by_source"].values())
    assert found["all"]["tokens"] == sum(of["tokens"] for of in found["by_position"])
    assert [(of["start"], of["stop"]) for of in found["by_position"]] == [(0, 16), (16, 32)]


def test_ranks_together_have_what_one_has():
    options = {"tokens": 400, "length": 32, "batch_size": 2}
    whole = text_sums_by_source(corpus(), TOKENIZER, uniform, **options)
    parts = [text_sums_by_source(corpus(), TOKENIZER, uniform, **options, rank=(rank, 3)) for rank in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    assert all(part.sum() > 0 for part in parts)


def test_targets_without_bytes_have_no_bits_per_byte():
    found = text_figures(torch.tensor([[[2.0, 0.0, 1.0]]]), ["a"], 16)
    assert found["all"] == {"bits_per_byte": None, "loss": 2.0, "tokens": 1}
    assert text_figures(torch.zeros(1, 1, 3), ["a"], 16)["by_position"] == []
