"""Whole sources read from any position on, and the texts that a tokenizer is trained from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sources import source, write_jsonl
from v4train.data.problems import Problems
from v4train.data.shards import ShardWriter, document_hash, held_out
from v4train.data.texts import find_tokenizer, source_texts
from v4train.data.tokenizer import TokenizerConfig, train_tokenizer
from v4train.errors import ConfigError


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in {"a.jsonl": 5, "b.jsonl.gz": 3, "c.jsonl": 1}.items():
        write_jsonl(folder / name, [f"{name} {i}" for i in range(count)])
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_reading_goes_on_from_every_position(kind, folder):
    if kind == "text":
        (folder / "b.jsonl.gz").unlink()  # binary
    texts, problems = source_texts(source(kind, folder)), Problems("error")
    found = list(texts.read(problems))
    assert len(found) == (9 if kind == "jsonl" else 2)
    if kind == "jsonl":
        assert [text for text, _ in found][4:6] == ["a.jsonl 4", "b.jsonl.gz 0"]
    done = [texts.done_bytes(position) for _, position in found]
    assert done == sorted(done) and texts.total_bytes == sum(path.stat().st_size for path in folder.iterdir())
    for number, (_, position) in enumerate(found, 1):
        again = source_texts(source(kind, folder))
        assert list(again.read(problems, json.loads(json.dumps(position)))) == found[number:]


def test_a_fingerprint_is_of_what_decides_the_texts(folder):
    config = source("jsonl", folder)
    fingerprint = source_texts(config).fingerprint
    for same in ({"on_error": "skip"}, {"retries": 3}, {"validation_fraction": 0.1}):
        assert source_texts(replace(config, **same)).fingerprint == fingerprint
    for other in ({"column": "body"}, {"max_document_bytes": 5}):
        assert source_texts(replace(config, **other)).fingerprint != fingerprint
    write_jsonl(folder / "c.jsonl", ["other"])
    assert source_texts(config).fingerprint != fingerprint


def test_a_tokenizer_is_trained_from_what_is_not_held_out(folder):
    texts = source_texts(source("jsonl", folder, validation_fraction=0.5))
    all_texts = [text for text, _ in texts.read(Problems("error"))]
    training = list(texts.training_texts(10**6))
    assert training == [text for text in all_texts if not held_out(document_hash(text), 0.5)]
    assert 0 < len(training) < len(all_texts)


def test_a_sample_is_spread_over_the_files(tmp_path):
    for number in range(100):
        write_jsonl(tmp_path / f"{number:02}.jsonl", [f"{number:02} {i:02}xxxxx" for i in range(50)])  # of 10 bytes
    texts = source_texts(source("jsonl", tmp_path, validation_fraction=0.0))
    sample = list(texts.training_texts(1000))
    assert 1000 <= sum(map(len, sample)) <= 1100
    files = [int(text[:2]) for text in sample]
    assert set(files) == set(range(0, 100, 4)) and max(map(files.count, files)) <= 5
    write_jsonl(tmp_path / "00.jsonl", ["00 00xxxxx"])  # what it lacks comes from the others
    assert 1000 <= sum(map(len, texts.training_texts(1000))) <= 1100
    assert sum(map(len, texts.training_texts(10**9))) == 10 + 24 * 500


def config(tmp_path: Path, path: Path | None = None, vocab_size: int = 280) -> TokenizerConfig:
    return TokenizerConfig(vocab_size, str(tmp_path / "cache"), path and str(path), 100)


def test_a_tokenizer_is_found_by_its_path_or_trained(folder, tmp_path):
    streamed, indexed = source("jsonl", folder), source("text", folder, on_error="skip")
    trained = find_tokenizer(config(tmp_path), {"a": streamed})
    texts = source_texts(streamed).training_texts(100)
    assert trained.fingerprint == train_tokenizer(texts, 280).fingerprint
    alone = find_tokenizer(config(tmp_path), {"b": indexed})
    assert alone.fingerprint == train_tokenizer(source_texts(indexed).training_texts(100), 280).fingerprint
    halves = [text for each in (streamed, indexed) for text in source_texts(each).training_texts(50)]
    mixed = find_tokenizer(config(tmp_path), {"a": streamed, "b": indexed})
    assert mixed.fingerprint == train_tokenizer(halves, 280).fingerprint
    assert len(list((tmp_path / "cache").glob("tokenizer-*/tokenizer.json"))) == 3
    find_tokenizer(config(tmp_path), {"a": replace(streamed, validation_fraction=0.9)})  # others are held out
    assert len(list((tmp_path / "cache").glob("tokenizer-*/tokenizer.json"))) == 4
    trained.save(tmp_path / "mine.json")
    gone = {"a": replace(streamed, path=str(tmp_path / "gone"))}
    assert find_tokenizer(config(tmp_path, tmp_path / "mine.json"), gone).fingerprint == trained.fingerprint


def test_shards_bring_their_tokenizer(folder, tmp_path):
    own = train_tokenizer(["own"], 264)
    with ShardWriter(tmp_path / "shards", own, "x") as writer:
        writer.add([7], 1)
        writer.finish()
    sources = {"a": source("jsonl", folder), "b": source("shards", tmp_path / "shards")}
    assert find_tokenizer(config(tmp_path), sources).fingerprint == own.fingerprint
    with pytest.raises(ConfigError, match="^tokenizer.path=.*it has 264 entries"):
        find_tokenizer(config(tmp_path, vocab_size=263), sources)
    with pytest.raises(ConfigError, match="^data.source=shards: it is tokenised already"):
        source_texts(sources["b"])
