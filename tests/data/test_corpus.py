import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from v4train.data.corpus import load_corpus, load_data
from v4train.data.sources import DataConfig, find_documents
from v4train.data.tokenizer import TokenizerConfig

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from v4train.data import DataConfig, TokenizerConfig, load_data
tokenizer, corpus = load_data(DataConfig("text", sys.argv[1], 0.2), TokenizerConfig(300, sys.argv[2], None, 1 << 28))
print(tokenizer.fingerprint, corpus.fingerprint, int(corpus.train.tokens.sum()), int(corpus.validation.tokens.sum()))
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document number {i} caf\u00e9\n" * (i + 1))
    return folder


def load(folder, cache, vocab_size=300):
    return load_data(DataConfig("text", str(folder), 0.2), TokenizerConfig(vocab_size, str(cache), None, 1 << 28))


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_every_document_is_bos_its_text_eos(folder, tmp_path, vocab_size):
    tokenizer, corpus = load(folder, tmp_path / "cache", vocab_size)
    documents = find_documents(DataConfig("text", str(folder), 0.2))
    assert corpus.source == "text"
    for side in ("train", "validation"):
        tokens, offsets = getattr(corpus, side).tokens, getattr(corpus, side).offsets
        texts = [document.read() for document in getattr(documents, side)]
        assert getattr(corpus, side).num_documents == len(texts) == len(offsets) - 1
        assert getattr(corpus, side).num_tokens == len(tokens) == offsets[-1]
        for text, start, stop in zip(texts, offsets[:-1], offsets[1:], strict=True):
            ids = tokens[start:stop]
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            assert (ids[1:-1] > 2).all() and tokenizer.decode(ids) == text
            assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


def test_tokens_wider_than_16_bits(tmp_path, folder, monkeypatch):
    tokenizer, corpus = load(folder, tmp_path / "a")
    monkeypatch.setattr(tokenizer, "vocab_size", (1 << 16) + 1)
    wide = load_corpus(find_documents(DataConfig("text", str(folder), 0.2)), tokenizer, tmp_path / "b")
    assert (corpus.train.tokens.itemsize, wide.train.tokens.itemsize) == (2, 4)
    np.testing.assert_array_equal(wide.train.tokens, corpus.train.tokens)


def test_found_again_without_work(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path / "cache")[1]
    monkeypatch.setattr("v4train.data.tokenizer.train_tokenizer", None)
    monkeypatch.setattr("v4train.data.corpus._write", None)
    again = load(folder, tmp_path / "cache")[1]
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)


def test_fingerprint_follows_text_and_tokenizer(folder, tmp_path):
    fingerprints = {load(folder, tmp_path / "cache", size)[1].fingerprint for size in (270, 275)}
    (folder / "07.txt").write_text("changed\n")
    fingerprints.add(load(folder, tmp_path / "cache", 270)[1].fingerprint)
    assert len(fingerprints) == 3


def test_a_torn_tokens_file_is_made_again(folder, tmp_path):
    expected = np.array(load(folder, tmp_path / "cache")[1].train.tokens)
    (file,) = (tmp_path / "cache").glob("corpus-*/train.tokens")
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(load(folder, tmp_path / "cache")[1].train.tokens, expected)


def test_processes_that_build_at_once_get_the_same(folder, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "cache")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert len(set(outputs)) == 1 and outputs[0][1] == ""
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2
    assert not list((tmp_path / "cache").glob("*.tmp-*"))
