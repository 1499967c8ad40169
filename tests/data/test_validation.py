"""Validation rows: the same for any number of ranks, every held-out token once, and never one that is trained on."""

import pytest
import torch

from tests.documents import FIRST, IGNORED, data_config, documents_of
from tests.sources import write_jsonl
from v4train.data.corpus import load_data
from v4train.data.shards import ShardWriter, document_hash
from v4train.data.streams import Lane
from v4train.data.tokenizer import TokenizerConfig, train_tokenizer
from v4train.data.validation import num_validation_rows, padding_row, validation_batches

PAD = 2
DOCUMENTS = documents_of([5, 40, 7, 33, 12, 2])  # 99 tokens, 6 documents


def rows(batch_size=2, max_tokens=0, world=1, length=10, padding=False):
    """Rows of all ranks in global order; checks that every rank makes the same number of equal-shaped batches."""
    per_rank = [
        list(validation_batches(DOCUMENTS, length, batch_size, max_tokens, r, world, PAD)) for r in range(world)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    shape = per_rank[0][0].input_ids.shape
    assert shape[0] <= batch_size and shape[1] == length
    found = []
    for batches in zip(*per_rank, strict=True):
        for row in range(shape[0]):
            for batch in batches:
                assert batch.input_ids.shape == batch.document_ids.shape == batch.targets.shape == shape
                found.append(torch.stack([batch.input_ids[row], batch.document_ids[row], batch.targets[row]]).tolist())
    return found if padding else [row for row in found if set(row[1]) != {-1}]


@pytest.mark.parametrize("max_tokens", [0, 1, 35, 60, 10**9])
@pytest.mark.parametrize("world, batch_size", [(2, 2), (3, 1), (4, 3), (16, 1)])
def test_every_world_size_sees_the_same_rows(world, batch_size, max_tokens):
    assert rows(batch_size, max_tokens, world) == rows(1, max_tokens, 1)


def test_every_target_is_counted_once():
    targets = [t for row in rows() for t in row[2] if t != IGNORED]
    firsts = set((DOCUMENTS.offsets[:-1] + FIRST).tolist())
    assert sorted(targets) == [t for t in range(FIRST, FIRST + 99) if t not in firsts]
    inputs = [t for row in rows() for t, document in zip(row[0], row[1], strict=True) if document != -1]
    assert sorted(inputs) == list(range(FIRST, FIRST + 99))


def test_a_target_is_the_next_token_of_its_document():
    for inputs, documents, targets in rows():
        for place, (token, document, target) in enumerate(zip(inputs, documents, targets, strict=True)):
            assert target in (IGNORED, token + 1)
            if target != IGNORED and place < 9:
                assert inputs[place + 1] == target and documents[place + 1] == document


def test_what_is_padded_counts_nowhere():
    found = rows(4, 0, 2, padding=True)  # 10 rows: 5 a rank, in two batches of 3
    assert len(found) == 12 and [field.tolist() for field in padding_row(10, PAD)] == found[-1]
    for inputs, documents, targets in found:
        for token, document, target in zip(inputs, documents, targets, strict=True):
            assert document != -1 or (token == PAD and target == IGNORED)


@pytest.mark.parametrize(
    ("max_tokens", "batch_size", "world", "batches", "size"),
    [(1, 8, 1, 1, 1), (1, 8, 4, 1, 1), (40, 8, 2, 1, 2), (0, 8, 1, 2, 5), (0, 4, 1, 3, 4), (0, 5, 2, 1, 5)],
)
def test_few_rows_make_small_batches(max_tokens, batch_size, world, batches, size):
    """No padding row where fewer rows would have done."""
    made = list(validation_batches(DOCUMENTS, 10, batch_size, max_tokens, 0, world, PAD))
    assert [len(batch.input_ids) for batch in made] == [size] * batches


def test_max_tokens_takes_the_first_rows_of_all_documents():
    everything = rows()
    assert len(everything) == 10 == num_validation_rows(DOCUMENTS, 10, 0)
    assert rows(max_tokens=35) == everything[:3]
    assert rows(max_tokens=1) == everything[:1]
    places = [row[0][0] for row in everything]
    assert places != sorted(places)  # a part of them draws on all documents


def test_fewer_tokens_than_a_row_are_enough():
    (row,) = rows(batch_size=1, length=200)
    assert sum(target != IGNORED for target in row[2]) == 99 - 6
    assert row[1].count(-1) == 101


TEXTS = [f"document {i} " * (i % 4 + 1) for i in range(60)]


def make_source(kind, tmp_path, tokenizer):
    folder = tmp_path / kind
    if kind == "shards":
        with ShardWriter(folder, tokenizer, "texts", shard_tokens=500) as writer:
            for text in TEXTS:
                writer.add(tokenizer.encode(text), document_hash(text))
                if writer.is_full:
                    writer.flush(None)
            writer.finish()
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        write_jsonl(folder / "a.jsonl", TEXTS[:20])
        write_jsonl(folder / "b.jsonl.gz", TEXTS[20:])
    if kind == "text":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)
    return {"source": kind, "path": str(folder)}


@pytest.mark.parametrize("kind", ["text", "jsonl", "shards"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_every_document_is_either_trained_on_or_held_out(kind, lanes, tmp_path):
    tokenizer = train_tokenizer(["text"], 262)
    tokenizer.save(tmp_path / "tokenizer.json")
    config = TokenizerConfig(262, str(tmp_path / "cache"), str(tmp_path / "tokenizer.json"), 1000)
    data = data_config(**make_source(kind, tmp_path, tokenizer), epochs=1)
    _, corpus = load_data(data, config, validation_tokens=10**6)
    (source,) = corpus.sources.values()
    held_out = source.validation
    apart = [tokenizer.decode(held_out.tokens(i)) for i in range(held_out.num_documents)]
    trained = []
    for lane in range(lanes):
        stream = source.stream(Lane(lane, lanes, 1, 0))
        while (window := stream.window(50)) is not None:
            trained += [tokenizer.decode(window.tokens(i, 0, int(size))) for i, size in enumerate(window.lengths)]
    assert sorted(trained + apart) == sorted(TEXTS) and trained and apart
    if source.num_tokens is not None:
        every = sum(len(tokenizer.encode(text)) + 2 for text in TEXTS)
        assert (source.num_tokens, source.most_lanes) == (every - held_out.num_tokens, len(trained))


@pytest.mark.parametrize("kind", ["jsonl", "shards"])
def test_only_so_many_tokens_are_held_ready(kind, tmp_path):
    tokenizer = train_tokenizer(["text"], 262)
    tokenizer.save(tmp_path / "tokenizer.json")
    config = TokenizerConfig(262, str(tmp_path / "cache"), str(tmp_path / "tokenizer.json"), 1000)
    data = data_config(**make_source(kind, tmp_path, tokenizer))
    sizes = []
    for tokens in (10**6, 100):
        (source,) = load_data(data, config, tokens)[1].sources.values()
        sizes.append(source.validation.num_tokens)
    assert 100 <= sizes[1] < 100 + 60 < sizes[0]
