import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tests.sources import source
from v4train.data.sources import find_documents
from v4train.data.texts import find_tokenizer
from v4train.data.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    TokenizerConfig,
    cached_tokenizer,
    train_tokenizer,
)
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
    assert tokenizer.fim_ids == (3, 4, 5)
    assert tokenizer.bytes_per_token[:6].tolist() == [0] * 6
    assert tokenizer.bytes_per_token[6:262].tolist() == [1] * 256
    assert tokenizer.bytes_per_token[262:].min() >= 2


def test_merges_are_learnt(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_special_token_in_a_text_is_text(tokenizer, name):
    ids = tokenizer.encode(f"a{name}b")
    assert ids.min() > 5
    assert tokenizer.decode(ids) == f"a{name}b"
    for batch_ids in tokenizer.encode_batch([name, f" {name}"]):
        assert batch_ids.min() > 5


def test_decode_leaves_out_special_and_unused_ids(tokenizer):
    ids = tokenizer.encode("caf\u00e9")
    assert tokenizer.decode([0, *ids, 1, 2, 3, 4, 5, 5000]) == "caf\u00e9"
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
    assert 262 < tokenizer.vocab_size == len(tokenizer.bytes_per_token) < 273
    assert tokenizer.decode(tokenizer.encode("zebra \u00fc")) == "zebra \u00fc"


def test_too_small_a_vocabulary_is_refused():
    assert train_tokenizer(["x"], 262).vocab_size == 262
    with pytest.raises(ConfigError, match="^tokenizer.vocab_size=261: at least 262"):
        train_tokenizer(["x"], 261)


def test_training_is_reproducible_and_saving_exact(tokenizer, tmp_path):
    assert train_tokenizer(TEXTS, 600).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(TEXTS, 601).fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def byte_level(special, merges=(), plain=(), template=False) -> str:
    """A tokenizer.json of Hugging Face's format: all bytes, then `merges`, `special` and `plain` added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, list(merges)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(plain))
    if template:  # Llama 3 puts BOS before every text
        ids = [(special[0], backend.token_to_id(special[0]))]
        backend.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=ids)
    return backend.to_str()


DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
DEEPSEEK_FIM = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")  # in the order of its file, and not special there


@pytest.mark.parametrize(
    "special, plain, roles, fim",
    [
        (SPECIAL_TOKENS, (), (256, 257, 258), (259, 260, 261)),
        (DEEPSEEK, DEEPSEEK_FIM, (256, 257, 258), (260, 259, 261)),
        (("<|endoftext|>",), (), (256, 256, 256), None),
        (("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"), (), (256, 257, 258), None),
        (("<unk>", "<s>", "</s>"), (), (257, 258, 258), None),
        (("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), (), (256,) * 3, (257, 259, 258)),
        (("<|endoftext|>", "<fim_prefix>"), (), (256, 256, 256), None),  # two of three are missing
    ],
)
def test_special_tokens_of_existing_tokenizers_are_found_by_their_role(special, plain, roles, fim):
    tokenizer = Tokenizer(byte_level(special, [("a", "b")], plain))
    one_more = [role + 1 for role in roles]  # behind the merge
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == one_more
    assert tokenizer.fim_ids == (None if fim is None else tuple(i + 1 for i in fim))
    text = "".join(["ab", *special, *plain])
    ids = tokenizer.encode(text)
    assert ids.max() <= 256 and tokenizer.decode(ids) == text  # a name in a text is text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.bytes_per_token[257:].tolist() == [0] * (tokenizer.vocab_size - 257)
    assert tokenizer.decode([*one_more, *ids, *(tokenizer.fim_ids or ())]) == text


def test_an_existing_tokenizer_adds_nothing_of_its_own():
    backend = tokenizers.Tokenizer.from_str(byte_level(["<|endoftext|>"], template=True))
    backend.enable_truncation(2)
    backend.enable_padding(length=7)
    assert len(backend.encode("abcdef").ids) == 7
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.decode(tokenizer.encode("abcdef")) == "abcdef" and len(tokenizer.encode("abcdef")) == 6
    assert [len(ids) for ids in tokenizer.encode_batch(["abcdef", "", "a"])] == [6, 0, 1]


def test_added_tokens_that_are_text_count_their_bytes():
    tokenizer = Tokenizer(byte_level(["<|endoftext|>"], plain=["dürfen", "<think>"]))
    assert tokenizer.bytes_per_token[256:].tolist() == [0, 7, 7]
    ids = tokenizer.encode("wir dürfen<think>")
    assert {257, 258} < set(ids.tolist()) and tokenizer.bytes_per_token[ids].sum() == len("wir dürfen<think>".encode())


def test_ids_without_a_token_have_no_bytes():
    content = json.loads(byte_level(["<|endoftext|>"], plain=["word"]))
    content["model"]["vocab"]["far"] = 300
    tokenizer = Tokenizer(json.dumps(content))
    assert tokenizer.vocab_size == 301 == len(tokenizer.bytes_per_token)
    assert tokenizer.bytes_per_token[260:].tolist() == [0] * 40 + [3]


def test_bytes_of_a_sentencepiece_tokenizer():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab", "é"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("a", "b"), ("▁", "ab")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(backend.to_str())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.fim_ids) == (1, 2, 2, None)
    text = "ab ab é\U0001f600\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.bytes_per_token[:4].tolist() == [0, 0, 0, 1]


def test_tokenizers_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    no_end = byte_level(["<s>"])
    words = tokenizers.Tokenizer(models.WordPiece({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>", "</s>"])
    refused = {
        "no BOS token: none of its added tokens is <bos>": tokenizers.Tokenizer(models.BPE()).to_str(),
        "no EOS token: none of its added tokens is <eos>": no_end,
        "neither byte-level nor of SentencePiece": words.to_str(),
        "not a tokenizer": "{}",
        "not a tokenizer that": "nonsense",
    }
    path = tmp_path / "tokenizer.json"
    for rule, content in refused.items():
        path.write_text(content)
        with pytest.raises(ConfigError, match=rule) as caught:
            Tokenizer.load(path)
        assert str(caught.value).startswith(f"tokenizer.path={path}: ") and "\n" not in str(caught.value)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="^tokenizer.path=.*can't be read"):
            Tokenizer.load(missing)


def test_an_existing_tokenizer_is_used_as_it_is(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level(DEEPSEEK))
    config = TokenizerConfig(259, str(tmp_path / "cache"), str(path), 1000)
    tokenizer = cached_tokenizer(config, "", lambda: pytest.fail("no text is read"))
    assert tokenizer.json == path.read_text() and tokenizer.vocab_size == 259
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match="^tokenizer.path=.*it has 259 entries, .* is 258; set model.vocab_size=259"):
        cached_tokenizer(TokenizerConfig(258, "", str(path), 1000), "", list)


def test_training_reads_whole_texts_up_to_a_number_of_bytes(tmp_path):
    texts, read = ["aé" * 50, "bc" * 50, "de" * 50], []

    def reading():
        for text in texts:
            read.append(text)
            yield text

    trained = cached_tokenizer(TokenizerConfig(280, str(tmp_path), None, 151), "x", reading)
    assert read == texts[:2]
    assert trained.fingerprint == train_tokenizer(texts[:2], 280).fingerprint
    again = cached_tokenizer(TokenizerConfig(280, str(tmp_path), None, 151), "x", reading)
    assert again.fingerprint == trained.fingerprint and len(read) == 2
    cached_tokenizer(TokenizerConfig(280, str(tmp_path), None, 150), "x", reading)
    assert read[2:] == texts[:1]
    with pytest.raises(ConfigError, match="^tokenizer.train_bytes=0"):
        TokenizerConfig(280, "", None, 0)


def test_cache_holds_one_tokenizer_a_vocabulary_trained_on_the_training_side(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(20):
        (tmp_path / "data" / f"{i}.txt").write_text(f"word{chr(97 + i) * 6} " * 20)
    sources, cache = {"texts": source("text", tmp_path / "data")}, str(tmp_path / "cache")
    trained = [find_tokenizer(TokenizerConfig(size, cache, None, 1 << 20), sources) for size in (300, 300, 310)]
    assert trained[0].fingerprint == trained[1].fingerprint != trained[2].fingerprint
    assert len(list((tmp_path / "cache").glob("tokenizer-*/tokenizer.json"))) == 2
    documents = find_documents(sources["texts"])
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
