import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from v4train.data.sources import DataConfig, find_documents
from v4train.data.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from v4train.errors import ConfigError

ROOT = Path(__file__).parents[2]

TEXTS = [open(path, encoding="utf-8").read() for path in (np.__file__, pytest.__file__, __file__)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 600)


# Characters that pre-tokenisers treat differently, and any others.
UNICODE = st.text() | st.text(alphabet=" \t\r\n\u00a0aZ\u00e9\u0301019_'\"<>\u65e5\u30ab\U0001f600\ufeff\0")


@settings(max_examples=300, deadline=None)
@given(text=UNICODE)
def test_any_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 600
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.bytes_per_token.shape == (600,) and tokenizer.bytes_per_token.dtype == np.int64
    assert tokenizer.bytes_per_token[:3].tolist() == [0, 0, 0]
    assert tokenizer.bytes_per_token[3:259].tolist() == [1] * 256
    assert tokenizer.bytes_per_token[259:].min() >= 2


def test_merges_are_learnt(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_special_token_in_a_text_is_text(tokenizer, name):
    ids = tokenizer.encode(f"a{name}b")
    assert ids.min() > 2
    assert tokenizer.decode(ids) == f"a{name}b"
    for batch_ids in tokenizer.encode_batch([name, f" {name}"]):
        assert batch_ids.min() > 2


def test_decode_leaves_out_special_and_unused_ids(tokenizer):
    ids = tokenizer.encode("caf\u00e9")
    assert tokenizer.decode([0, *ids, 1, 2, 5000]) == "caf\u00e9"
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd") or tokenizer.decode(ids[:-1]) in "caf\u00e9"


def test_digits_go_in_groups_of_at_most_three():
    tokenizer = train_tokenizer(["1234567 1234567 123456 12345678 "] * 50, 400)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1234567")]
    assert pieces == ["123", "456", "7"]
    assert max(len(p) for i in range(400) if (p := tokenizer.decode([i])).strip().isdigit()) == 3


def test_batch_is_each(tokenizer):
    for one, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(one))


def test_a_small_corpus_fills_fewer_entries():
    tokenizer = train_tokenizer(["ab ab"], 1000)
    assert 259 < tokenizer.vocab_size == len(tokenizer.bytes_per_token) < 270
    assert tokenizer.decode(tokenizer.encode("zebra \u00fc")) == "zebra \u00fc"


def test_too_small_a_vocabulary_is_refused():
    assert train_tokenizer(["x"], 259).vocab_size == 259
    with pytest.raises(ConfigError, match="^tokenizer.vocab_size=258"):
        train_tokenizer(["x"], 258)


def test_training_is_reproducible_and_saving_exact(tokenizer, tmp_path):
    assert train_tokenizer(TEXTS, 600).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(TEXTS, 601).fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="<bos>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())


def test_cache_holds_one_tokenizer_a_vocabulary_trained_on_the_training_side(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(20):
        (tmp_path / "data" / f"{i}.txt").write_text(f"word{chr(97 + i) * 6} " * 20)
    documents = find_documents(DataConfig("text", str(tmp_path / "data"), 0.2))
    cache = str(tmp_path / "cache")
    trained = [load_tokenizer(TokenizerConfig(size, cache), documents) for size in (300, 300, 310)]
    assert trained[0].fingerprint == trained[1].fingerprint != trained[2].fingerprint
    assert len(list((tmp_path / "cache").glob("tokenizer-*/tokenizer.json"))) == 2
    alone = train_tokenizer([document.read() for document in documents.train], 300)
    assert trained[0].fingerprint == alone.fingerprint


def test_nothing_is_said_when_a_process_forks_after_tokenising():
    """Older versions of tokenizers warned of TOKENIZERS_PARALLELISM here; 0.23 doesn't."""
    program = (
        "import os\nfrom v4train.data.tokenizer import train_tokenizer\n"
        "t = train_tokenizer(['some words %d' % i for i in range(2000)], 400)\n"
        "t.encode_batch(['a b c'] * 2000)\n"
        "pid = os.fork()\n"
        "if pid == 0: t.encode_batch(['a b c'] * 2000); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], timeout=60, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
