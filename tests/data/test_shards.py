"""Folders of shards: what is written comes back, whatever kills the writer, and damage is named."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from v4train.data.shards import Shards, ShardWriter, document_hash, held_out
from v4train.data.tokenizer import Tokenizer, train_tokenizer
from v4train.errors import ConfigError

SHARD_TOKENS = 60


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text"], 270)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return ["", *("".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(0, 40))) for _ in range(14))]


def write(folder: Path, tokenizer: Tokenizer, texts: list[str], source: str = "test") -> None:
    """From where the folder stands to the end; a position is the number of the next text."""
    with ShardWriter(folder, tokenizer, source, SHARD_TOKENS) as writer:
        for number in range(writer.position or 0, 0 if writer.complete else len(texts)):
            writer.add(tokenizer.encode(texts[number]), document_hash(texts[number]))
            if writer.is_full:
                writer.flush(number + 1)
        if not writer.complete:
            writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer, texts) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    write(folder, tokenizer, texts)
    return folder


@pytest.fixture
def copy(written, tmp_path) -> Path:
    """To be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in contents(written).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_document_hash_is_the_head_of_sha256():
    assert document_hash("é") == int(hashlib.sha256("é".encode()).hexdigest()[:16], 16)
    hashes = np.array([0, 2**62, 2**63, 2**64 - 1], np.uint64)
    assert held_out(hashes, 0.5).tolist() == [True, True, False, False] == [held_out(int(h), 0.5) for h in hashes]
    assert not held_out(hashes, 0.0).any() and not held_out(0, 0.0)


def test_documents_come_back(written, tokenizer, texts):
    shards = Shards(written)
    expected = [[0, *tokenizer.encode(text).tolist(), 1] for text in texts]
    assert shards.num_documents == len(texts) and shards.num_tokens == sum(map(len, expected))
    for number, ids in enumerate(expected):
        assert shards.tokens(number, 0, len(ids)).tolist() == ids == shards.tokens(number).tolist()
        assert shards.tokens(number, 1, 5).tolist() == ids[1:5]
        assert shards.tokens(number, 0, 1000).tolist() == ids  # nothing of the next document
        assert shards.tokens(number, len(ids), 1000).tolist() == []
    assert shards.tokens(1).dtype == np.uint16 and not shards.tokens(1).flags.owndata
    assert shards.hashes().tolist() == [document_hash(text) for text in texts] and shards.hashes().dtype == np.uint64
    order = np.random.default_rng(1).permutation(len(texts)).reshape(1, -1)
    lengths = shards.lengths(order)
    assert lengths.dtype == np.int64 and lengths.tolist() == [[len(expected[d]) for d in order[0]]]
    assert shards.lengths(np.array([], np.int64)).shape == (0,)
    for outside in (-1, len(texts)):
        with pytest.raises(IndexError):
            shards.tokens(outside)
        with pytest.raises(IndexError):
            shards.lengths(np.array([0, outside]))


def test_the_index_lists_every_file_with_its_size_and_checksum(written, tokenizer):
    files, index = contents(written), json.loads((written / "index.json").read_text())
    assert index["format"] == 1 and index["dtype"] == "<u2" and index["complete"] and index["source"] == "test"
    assert files["tokenizer.json"].decode() == tokenizer.json
    assert index["tokenizer"] == hashlib.sha256(files["tokenizer.json"]).hexdigest() == tokenizer.fingerprint
    assert len(index["shards"]) >= 5 and [s["name"] for s in index["shards"]][:2] == ["00000", "00001"]
    assert all(shard["tokens"] >= SHARD_TOKENS for shard in index["shards"][:-1])
    listed = {file: digest for shard in index["shards"] for file, digest in shard["sha256"].items()}
    assert listed == {f: hashlib.sha256(c).hexdigest() for f, c in files.items() if not f.endswith(".json")}
    assert {f: size for s in index["shards"] for f, size in s["bytes"].items()} == {f: len(files[f]) for f in listed}
    assert np.load(written / "00000.offsets.npy")[-1] == len(files["00000.tokens"]) / 2 == index["shards"][0]["tokens"]


class Killed(BaseException):
    pass


def dying_after(calls: int, function):
    """`function`, but its call number `calls` (from 0) ends the process instead: whatever it was to do isn't done."""
    left = [calls]

    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == -1:
            raise Killed
        if left[0] < -1:
            return None  # a dead process does nothing any more
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_killed_at_any_moment_it_goes_on_to_the_same_files(name, written, tokenizer, texts, tmp_path, monkeypatch):
    expected, survived = contents(written), 0
    for calls in range(1000):
        folder = tmp_path / f"{name}{calls}"
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "close", lambda self: self._lock.release())  # killed: nothing is tidied up
            patch.setattr(os, name, dying_after(calls, getattr(os, name)))
            try:
                write(folder, tokenizer, texts)
                break
            except Killed:
                survived += 1
        if (folder / "index.json").exists():
            index = json.loads((folder / "index.json").read_text())
            for shard in index["shards"]:
                for file, digest in shard["sha256"].items():
                    assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
        write(folder, tokenizer, texts)
        assert contents(folder) == expected
    assert survived > 20


def test_a_writer_that_ends_early_leaves_whole_shards(tokenizer, texts, tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "s", tokenizer, "test", 10) as writer:
        writer.add([5] * 10, 1)
        assert writer.is_full
        writer.flush([3, 4])
        writer.add([5], 2)
        assert not writer.is_full
        raise RuntimeError
    assert sorted(contents(tmp_path / "s")) == [
        "00000.hashes.npy",
        "00000.offsets.npy",
        "00000.tokens",
        "index.json",
        "tokenizer.json",
    ]
    with ShardWriter(tmp_path / "s", tokenizer, "test", 10) as writer:
        assert (writer.position, writer.num_documents, writer.num_tokens, writer.complete) == ([3, 4], 1, 12, False)
        writer.flush([3, 5])  # nothing was added: only the position changes
        assert writer.num_shards == 1 and writer.position == [3, 5]
        writer.finish()
        with pytest.raises(ValueError, match="complete"):
            writer.add([5], 2)
    assert Shards(tmp_path / "s").tokens(0).tolist() == [0, *[5] * 10, 1]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(copy, tokenizer):
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"shards": index["shards"][:1], "complete": False}))
    for name in ("00000.tokens.tmp", "00077.hashes.npy.tmp", "notes.txt", "12.tokens", "index.json.tmp"):
        (copy / name).touch()
    ShardWriter(copy, tokenizer, "test").close()
    shard = {"00000.hashes.npy", "00000.offsets.npy", "00000.tokens"}
    assert contents(copy).keys() == {*shard, "index.json", "tokenizer.json", "notes.txt", "12.tokens"}


def test_a_large_vocabulary_takes_four_bytes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 65537)
    with ShardWriter(tmp_path / "s", tokenizer, "test") as writer:
        writer.add(np.array([65536, 7]), 2**64 - 1)
        writer.finish()
    shards = Shards(tmp_path / "s")
    assert shards.tokens(0).dtype == np.uint32 and shards.tokens(0).tolist() == [0, 65536, 7, 1]
    assert shards.hashes().tolist() == [2**64 - 1]


def test_a_folder_begun_otherwise_is_refused(copy, tokenizer, tmp_path):
    before = contents(copy)
    other = train_tokenizer(["other text"], 271)
    both = f"{tokenizer.fingerprint} there, {other.fingerprint} now"
    with pytest.raises(ConfigError, match=f"^out={copy}: .*another tokenizer: {both}"):
        ShardWriter(copy, other, "test")
    with pytest.raises(ConfigError, match=f"^out={copy}: .*another source: test there, jsonl now"):
        ShardWriter(copy, tokenizer, "jsonl")
    assert contents(copy) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="^out=.*holds other things .thesis.tex."):
        ShardWriter(tmp_path / "mine", tokenizer, "test")
    with ShardWriter(tmp_path / "s", tokenizer, "test"):
        with pytest.raises(ConfigError, match="^out=.*another process is writing"):
            ShardWriter(tmp_path / "s", tokenizer, "test")
    ShardWriter(tmp_path / "s", tokenizer, "test").close()  # free again
    with pytest.raises(ConfigError, match="^shard_tokens=0"):
        ShardWriter(tmp_path / "s", tokenizer, "test", 0)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^out=.*can't be written"):
        ShardWriter(tmp_path / "file", tokenizer, "test")


def test_a_full_disk_is_one_line(tokenizer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with ShardWriter(tmp_path / "s", tokenizer, "test") as writer:
        writer.add([5], 1)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="^out=.*No space left on device.*goes on after the last whole shard"):
            writer.flush(1)


def test_another_tokenizer_is_refused(written, tokenizer):
    shards = Shards(written)
    shards.check_tokenizer(tokenizer.fingerprint)
    both = f"tokenizer {tokenizer.fingerprint}, the run has abc; use tokenizer.path="
    with pytest.raises(ConfigError, match=f"^data.path={written}: .*{both}"):
        shards.check_tokenizer("abc")
    assert Tokenizer.load(shards.tokenizer_path).fingerprint == shards.tokenizer_fingerprint


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("file", ["00000.tokens", "00001.offsets.npy", "00002.hashes.npy", "tokenizer.json"])
def test_damage_is_named(copy, file, verify):
    path = copy / file
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ConfigError, match=f"^data.path={path}: it is missing"):
        Shards(copy, verify)
    path.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=f"^data.path={path}: it"):
        Shards(copy, verify)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if verify or file == "tokenizer.json":
        with pytest.raises(ConfigError, match=f"^data.path={path}: its SHA-256 is"):
            Shards(copy, verify)
    else:
        Shards(copy, verify)  # that is what verify=False saves


def test_a_folder_that_is_no_complete_index_is_refused(copy, tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="^data.path=.*no folder of shards: index.json can't be read"):
        Shards(tmp_path / "none")
    index = json.loads((copy / "index.json").read_text())
    for content, rule in {
        json.dumps(index | {"complete": False}): "isn't finished .* whole shards so far.; run the same",
        json.dumps(index | {"shards": []}): "holds no document",
        json.dumps(index | {"format": 2}): "isn't an index of format 1",
        "[]": "isn't an index of format 1",
        "{": "isn't JSON",
    }.items():
        (copy / "index.json").write_text(content)
        with pytest.raises(ConfigError, match=f"^data.path={copy}.*{rule}"):
            Shards(copy)


def test_shards_that_vanish_later_are_named(copy):
    shards = Shards(copy)
    shards.tokens(0)
    for path in copy.glob("*.tokens"):
        path.unlink()
    assert len(shards.tokens(0)) > 0  # mapped already
    with pytest.raises(ConfigError, match=r"^data.path=.*\.tokens: it can't be mapped"):
        shards.tokens(shards.num_documents - 1)


def test_the_fingerprint_is_of_the_content(written, copy, tokenizer, texts, tmp_path):
    assert Shards(copy).fingerprint == Shards(written).fingerprint
    write(tmp_path / "other", tokenizer, [*texts[:-1], texts[-1] + "!"])
    assert Shards(tmp_path / "other").fingerprint != Shards(written).fingerprint


def test_many_shards_need_few_open_files(written, monkeypatch, tokenizer, texts):
    monkeypatch.setattr("v4train.data.shards._OPEN_SHARDS", 2)
    shards = Shards(written)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    lengths = shards.lengths(np.arange(len(texts)))
    assert lengths.sum() == shards.num_tokens == sum(len(shards.tokens(d)) for d in range(len(texts)))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 4
