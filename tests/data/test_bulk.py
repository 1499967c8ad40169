"""Tokenising a whole source: what is written is what the tokenizer says, bad records are counted, and it goes on."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.sources import source, write_jsonl
from v4train.data import bulk
from v4train.data.bulk import tokenize_source
from v4train.data.problems import DataError
from v4train.data.shards import Shards, document_hash
from v4train.data.tokenizer import Tokenizer, train_tokenizer
from v4train.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some words to learn " * 20], 280)


@pytest.fixture
def texts(tmp_path) -> list[str]:
    """Written as tmp_path/data/*.jsonl(.gz)."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["some", "words", "Ünïcode", "\n"], rng.integers(1, 60))) for _ in range(120)]
    texts = [text if text.strip() else "word" for text in texts]
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl")):
        write_jsonl(tmp_path / "data" / name, texts[40 * number : 40 * number + 40])
    return texts


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(bulk, "_BATCH_CHARACTERS", 2000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_every_document_is_written_in_order(texts, tokenizer, tmp_path):
    seen = []
    config = source("jsonl", tmp_path / "data")
    done = tokenize_source(config, tokenizer, tmp_path / "s", 1000, lambda now: seen.append(replace(now)))
    shards = Shards(tmp_path / "s")
    assert [shards.tokens(d)[1:-1].tolist() for d in range(len(texts))] == [tokenizer.encode(t).tolist() for t in texts]
    assert shards.hashes().tolist() == [document_hash(text) for text in texts]
    assert (done.documents, done.tokens, done.new_tokens) == (120, shards.num_tokens, shards.num_tokens)
    assert done.complete and done.skipped == {} and done.done_bytes == done.total_bytes > 0
    assert done.shards > 3
    assert [now.tokens for now in seen] == sorted(now.tokens for now in seen)
    assert [now.done_bytes for now in seen] == sorted(now.done_bytes for now in seen)
    assert {now.shards for now in seen} >= set(range(1, done.shards + 1)) and not seen[-2].complete


class Killed(BaseException):
    pass


def test_killed_after_any_report_it_goes_on_to_the_same_files(texts, tokenizer, tmp_path):
    with (tmp_path / "data" / "a.jsonl").open("a") as file:
        file.write('{"text": ""}\n\n{"other": 1}\n')
    config = source("jsonl", tmp_path / "data", on_error="skip")
    whole = tokenize_source(config, tokenizer, tmp_path / "whole", 2500)
    assert whole.skipped == {"empty": 1, "missing_column": 1}
    killed = 0
    for calls in range(1000):
        left = [calls]

        def report(now, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        folder = tmp_path / str(calls)
        try:
            tokenize_source(config, tokenizer, folder, 2500, report)
            break
        except Killed:
            killed += 1
        resumed = tokenize_source(config, tokenizer, folder, 2500)
        assert contents(folder) == contents(tmp_path / "whole")
        assert replace(resumed, new_tokens=0) == replace(whole, new_tokens=0)
    assert killed > 10


def test_a_complete_folder_is_left_as_it_is(texts, tokenizer, tmp_path):
    config = source("jsonl", tmp_path / "data")
    first = tokenize_source(config, tokenizer, tmp_path / "s", 500)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir() if path.name != ".lock"}
    again = tokenize_source(config, tokenizer, tmp_path / "s", 500, lambda now: pytest.fail("nothing to report"))
    assert (again.documents, again.tokens, again.new_tokens) == (first.documents, first.tokens, 0) and again.complete
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir() if p.name != ".lock"}


def test_other_data_or_another_tokenizer_are_refused(texts, tokenizer, tmp_path):
    config = source("jsonl", tmp_path / "data")
    tokenize_source(config, tokenizer, tmp_path / "s", 500)
    with pytest.raises(ConfigError, match="^out=.*another source"):
        tokenize_source(replace(config, column="body"), tokenizer, tmp_path / "s", 500)
    with pytest.raises(ConfigError, match="^out=.*another tokenizer"):
        tokenize_source(config, train_tokenizer(["x"], 262), tmp_path / "s", 500)


def test_bad_data_stop_it_by_default_and_are_left_out_on_request(texts, tokenizer, tmp_path):
    lines = gzip.decompress((tmp_path / "data" / "b.jsonl.gz").read_bytes()).splitlines(keepends=True)
    bad = b"".join([*lines[:20], b"[]\n", b'{"text": "\xff"}\n', *lines[20:]])
    (tmp_path / "data" / "b.jsonl.gz").write_bytes(gzip.compress(bad))
    config = source("jsonl", tmp_path / "data")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz, record 20.*data.on_error=skip"):
        tokenize_source(config, tokenizer, tmp_path / "s", 500)
    at = json.loads((tmp_path / "s" / "index.json").read_text())["shards"]
    assert len(at) > 1  # what was whole stays
    done = tokenize_source(replace(config, on_error="skip"), tokenizer, tmp_path / "s", 500)
    assert done.skipped == {"malformed": 1, "undecodable": 1} and done.documents == 120
    straight = tokenize_source(replace(config, on_error="skip"), tokenizer, tmp_path / "straight", 500)
    assert straight.tokens == done.tokens and contents(tmp_path / "s") == contents(tmp_path / "straight")


def test_text_files_are_documents(texts, tokenizer, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for number, text in enumerate(texts[:10]):
        (folder / f"{number}.txt").write_text(f"{number} {text}")
    done = tokenize_source(source("text", folder), tokenizer, tmp_path / "s", 100)
    shards = Shards(tmp_path / "s")
    found = {tokenizer.decode(shards.tokens(d).tolist()) for d in range(shards.num_documents)}
    assert found == {f"{number} {text}" for number, text in enumerate(texts[:10])} and done.documents == 10
