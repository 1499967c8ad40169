"""Sources opened: tokens from the cache or made there, held-out documents, fingerprints, and what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.documents import data_config
from tests.sources import write_jsonl
from v4train.data import corpus as corpus_module
from v4train.data.corpus import check_data, load_data, tokenized
from v4train.data.problems import DataError
from v4train.data.shards import INDEX, ShardWriter, document_hash
from v4train.data.sources import find_documents
from v4train.data.streams import Lane
from v4train.data.tokenizer import TokenizerConfig, train_tokenizer
from v4train.errors import ConfigError

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from tests.documents import data_config
from v4train.data import TokenizerConfig, load_data
tokenizer, corpus = load_data(data_config(path=sys.argv[1]), TokenizerConfig(300, sys.argv[2], None, 1 << 28))
print(tokenizer.fingerprint, corpus.fingerprint, int(corpus.sources["text"].validation.flat.sum()))
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document number {i} caf\u00e9\n" * (i + 1))
    return folder


def load(folder, cache, vocab_size=300, **others):
    config = TokenizerConfig(vocab_size, str(cache), None, 1 << 28)
    return load_data(data_config(path=str(folder), **others), config, 1000)


def sides(folder, tokenizer, cache):
    train, validation, _ = tokenized(find_documents(data_config(path=str(folder))), tokenizer, cache)
    return {"train": train, "validation": validation}


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_every_document_is_bos_its_text_eos(folder, tmp_path, vocab_size):
    tokenizer, corpus = load(folder, tmp_path / "cache", vocab_size)
    documents = find_documents(data_config(path=str(folder)))
    source = corpus.sources["text"]
    for side, found in sides(folder, tokenizer, tmp_path / "cache").items():
        texts = [document.read() for document in getattr(documents, side)]
        assert found.num_documents == len(texts) == len(found.offsets) - 1
        assert found.num_tokens == len(found.flat) == found.offsets[-1]
        sizes = found.lengths(np.arange(len(texts)))
        for number, text in enumerate(texts):
            ids = found.tokens(number)
            assert len(ids) == sizes[number] and ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            assert (ids[1:-1] > 5).all() and tokenizer.decode(ids) == text
            assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
            assert found.tokens(number, 1, 3).tolist() == ids[1:3].tolist()
            assert found.tokens(number, 1, 10**9).tolist() == ids[1:].tolist()
    train, validation = sides(folder, tokenizer, tmp_path / "cache").values()
    assert (source.num_tokens, source.most_lanes) == (train.num_tokens, train.num_documents)
    assert source.validation.flat.tolist() == validation.flat.tolist()


def test_tokens_wider_than_16_bits(tmp_path, folder, monkeypatch):
    tokenizer, _ = load(folder, tmp_path / "a")
    narrow = sides(folder, tokenizer, tmp_path / "a")["train"]
    monkeypatch.setattr(tokenizer, "vocab_size", (1 << 16) + 1)
    wide = sides(folder, tokenizer, tmp_path / "b")["train"]
    assert (narrow.flat.itemsize, wide.flat.itemsize) == (2, 4)
    np.testing.assert_array_equal(wide.flat, narrow.flat)


def test_found_again_without_work(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path / "cache")[1]
    monkeypatch.setattr("v4train.data.tokenizer.train_tokenizer", None)
    monkeypatch.setattr("v4train.data.corpus._write", None)
    again = load(folder, tmp_path / "cache")[1]
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.sources["text"].validation.flat, first.sources["text"].validation.flat)


def test_fingerprint_follows_text_and_tokenizer(folder, tmp_path):
    fingerprints = {load(folder, tmp_path / "cache", size)[1].fingerprint for size in (270, 275)}
    (folder / "07.txt").write_text("changed\n")
    fingerprints.add(load(folder, tmp_path / "cache", 270)[1].fingerprint)
    assert len(fingerprints) == 3


def test_a_torn_tokens_file_is_made_again(folder, tmp_path):
    tokenizer, _ = load(folder, tmp_path / "cache")
    expected = np.array(sides(folder, tokenizer, tmp_path / "cache")["train"].flat)
    (file,) = (tmp_path / "cache").glob("corpus-*/train.tokens")
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(sides(folder, tokenizer, tmp_path / "cache")["train"].flat, expected)


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


# Streamed sources and shards

TEXTS = [f"text {i} of several" for i in range(50)]


@pytest.fixture
def tokenizer_config(tmp_path):
    train_tokenizer(["text"], 262).save(tmp_path / "tokenizer.json")
    return TokenizerConfig(300, str(tmp_path / "cache"), str(tmp_path / "tokenizer.json"), 1000)


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "lines").mkdir()
    for number in range(2):
        write_jsonl(tmp_path / "lines" / f"{number}.jsonl", TEXTS[number::2])
    return {"source": "jsonl", "path": str(tmp_path / "lines")}


def shards_of(folder, tokenizer, texts=TEXTS, finish=True):
    with ShardWriter(folder, tokenizer, "texts") as writer:
        for text in texts:
            writer.add(tokenizer.encode(text), document_hash(text))
        writer.finish() if finish else writer.flush(0)
    return {"source": "shards", "path": str(folder)}


def test_streamed_held_out_documents_come_from_the_cache(lines, tokenizer_config, monkeypatch):
    data = data_config(**lines)
    first = load_data(data, tokenizer_config, 50)[1]
    monkeypatch.setattr(corpus_module, "_collected", None)
    again = load_data(data, tokenizer_config, 50)[1]
    found = [one.sources["jsonl"].validation for one in (first, again)]
    assert found[0].flat.tolist() == found[1].flat.tolist() and found[0].num_tokens >= 50
    assert first.fingerprint == again.fingerprint
    assert first.sources["jsonl"].num_tokens is first.sources["jsonl"].most_lanes is None


@pytest.mark.parametrize("others", [{"validation_fraction": 0.3}, {"max_document_bytes": 10**6}, {"column": "body"}])
def test_a_streamed_fingerprint_is_of_what_decides_the_documents(lines, tokenizer_config, others, monkeypatch):
    monkeypatch.setattr(corpus_module, "cached_folder", _without_validation)
    made = [load_data(data_config(**lines, **own), tokenizer_config, 50)[1] for own in ({}, {"retries": 3}, others)]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint


def _without_validation(cache_dir, name, build):
    folder = Path(cache_dir) / "none"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.zeros(0, np.uint32))
    np.save(folder / "offsets.npy", np.zeros(1, np.int64))
    return folder


def test_bad_data_among_the_held_out_ones_are_an_error(lines, tokenizer_config):
    path = Path(lines["path"]) / "0.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(DataError, match=r"0\.jsonl, record 0 .*malformed"):
        load_data(data_config(**lines), tokenizer_config, 50)
    assert load_data(data_config(**lines, on_error="skip"), tokenizer_config, 50)[1].sources


def test_a_mixture_has_its_sources_by_name(lines, folder, tokenizer_config, tmp_path):
    tokenizer = train_tokenizer(["text"], 262)
    sources = {"a": lines, "b": {"source": "text", "path": str(folder)}, "c": shards_of(tmp_path / "shards", tokenizer)}
    _, corpus = load_data(data_config(sources=sources), tokenizer_config, 90)
    assert list(corpus.sources) == [source.name for source in corpus.sources.values()] == ["a", "b", "c"]
    assert corpus.default_lanes == corpus_module.STREAMED_LANES
    assert all(source.stream(Lane(0, 1, 1, 0)).window(20) is not None for source in corpus.sources.values())
    with pytest.raises(
        ConfigError, match=r"data\.lanes=31: source b has only 2\d documents .*data\.lanes=2\d or fewer"
    ):
        corpus.check_lanes(31)
    del sources["a"]
    assert load_data(data_config(sources=sources), tokenizer_config, 90)[1].default_lanes == 1


def refusal(data, config, tokens=50):
    with pytest.raises(ConfigError) as error:
        load_data(data, config, tokens)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_can_not_be_loaded(lines, tokenizer_config, tmp_path):
    tokenizer = train_tokenizer(["text"], 262)
    assert refusal(data_config(**lines), tokenizer_config, 0).startswith("train.validation_tokens=0: source jsonl is")
    tiny = data_config(**lines, validation_fraction=1e-9)
    assert refusal(tiny, tokenizer_config).startswith("data.validation_fraction=1e-09: source jsonl has no document")
    other = shards_of(tmp_path / "other", train_tokenizer(["other other other"], 270))
    assert "were made by tokenizer" in refusal(data_config(**other), tokenizer_config)
    begun = shards_of(tmp_path / "begun", tokenizer, finish=False)
    assert "isn't finished" in refusal(data_config(**begun), tokenizer_config)
    two = shards_of(tmp_path / "two", tokenizer, TEXTS[:2])
    none = data_config(**two, validation_fraction=1e-9)
    assert "holds out 0 of 2 documents" in refusal(none, tokenizer_config)
    assert "holds out 2 of 2 documents" in refusal(data_config(**two, validation_fraction=1 - 1e-9), tokenizer_config)
    content = (tmp_path / "tokenizer.json").read_text().replace("<fim_hole>", "<other>")
    (tmp_path / "tokenizer.json").write_text(content)
    assert "no tokens for fill-in-middle" in refusal(data_config(**lines, fim_rate=0.1), tokenizer_config)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"packing": "tight"}, "data.packing=tight: unknown; use one of best_fit, concatenate"),
        ({"when_dry": "wait"}, "data.when_dry=wait: unknown; use one of stop, drop"),
        ({"fim_rate": 1.5}, "data.fim_rate=1.5: a share of the documents, 0 to 1; for example 0.1"),
        ({"fim_rate": float("nan")}, "data.fim_rate=nan: a share"),
        ({"workers": -1}, "data.workers=-1: it can't be negative; use 0"),
        ({"lanes": 0}, "data.lanes=0: at least 1; use null"),
        ({"weights": {"web": 1}}, "data.weights=web: no such source; one of text"),
        ({"weights": [1]}, "data.weights=1: each of several weights"),
        ({"source": "web"}, "data.source=web: no such source; one of stdlib, text, shards, jsonl, parquet, arrow, hub"),
        ({"source": None}, "data.source=None: "),
        ({"source": None, "weights": {"a": 1}}, "data.source=None: "),
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0: a share between 0 and 1; for example"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0: "),
        ({"on_error": "ignore"}, "data.on_error=ignore: no such policy; one of error, skip"),
        ({"epochs": 0}, "data.epochs=0: at least 1; use null"),
        ({"retries": -1}, "data.retries=-1: at least 0; for example 0"),
        ({"max_document_bytes": 0}, "data.max_document_bytes=0: at least 1; for example 1"),
        ({"path": "/no/such"}, "data.path=/no/such: no such file, folder or glob match; name text files"),
        ({"path": None}, "data.path=None: "),
        ({"source": "stdlib", "path": "/no/such"}, "data.path=/no/such: no such folder"),
        ({"source": "jsonl", "path": None}, "data.path=None: source jsonl needs to know where its data are; name them"),
        ({"source": "hub", "path": []}, "data.path=[]: source hub needs"),
        ({"source": "shards", "path": "/no/such"}, f"data.path=/no/such: there is no {INDEX} in that folder; name"),
        ({"sources": {"a": 3}}, "data.sources.a=3: each source of a mixture is a group of keys; give it source="),
        ({"sources": {"a": {"pth": 1}}}, "data.sources.a.pth=1: unknown key; did you mean data.sources.a.path?"),
        ({"sources": {"a": {"epochs": "x"}}}, "data.sources.a.epochs=x: "),
        ({"sources": {"a": {"source": "web"}}}, "data.sources.a.source=web: no such source"),
        ({"sources": {"a": {"source": "stdlib", "path": None}}, "weights": {"b": 1}}, "data.weights=b: no such source"),
        ({"sources": {"a": {"path": "/no/such"}}}, "data.sources.a.path=/no/such: no such file"),
        ({"sources": {"a": {"source": "jsonl", "path": None}}}, "data.sources.a.path=None: source jsonl needs"),
    ],
)
def test_each_broken_rule_is_one_line(values, message, folder):
    with pytest.raises(ConfigError) as error:
        check_data(data_config(**{"path": str(folder)} | values))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert error.value.rule and error.value.remedy


def test_what_keeps_the_rules(folder):
    check_data(data_config(path=str(folder), fim_rate=0.1, lanes=3, epochs=1, workers=0))
    check_data(data_config(source="jsonl", path="http://nowhere.invalid/x.jsonl"))  # asks no network
    check_data(data_config(source="stdlib", path=None))
    sources = {"a": {"source": "stdlib", "path": None}, "b": {"path": str(folder)}}
    check_data(data_config(sources=sources, weights=[{"from_tokens": 0, "a": 1}, {"from_tokens": 10, "b": 0.5}]))
