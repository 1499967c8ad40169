"""Byte-level BPE: trained on the training documents, cached, every text comes back unchanged."""

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from v4train.data.cache import cached_folder
from v4train.data.sources import Documents
from v4train.errors import ConfigError

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")  # ids 0, 1, 2, as in DeepSeek-V4
_BYTES = 256
_RECIPE = 1  # part of the cache key: raise it when a change here alters what training gives

# The pre-tokeniser of DeepSeek-V3 and V4 (their tokenizer.json): digits in groups of up to three, runs of Chinese and
# Japanese characters, then a GPT-style split into words, punctuation and white space.
_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

logger = logging.getLogger("v4train")


@dataclass
class TokenizerConfig:
    """Config group `tokenizer`."""

    vocab_size: int  # entries asked for, special tokens included; a small corpus may fill fewer
    cache_dir: str  # folder where tokenizers and tokens are kept

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)


def check_vocab_size(vocab_size: int) -> None:
    """Raise ConfigError unless all bytes and special tokens have an entry."""
    smallest = len(SPECIAL_TOKENS) + _BYTES
    if vocab_size < smallest:
        raise ConfigError(
            "tokenizer.vocab_size",
            vocab_size,
            f"at least {smallest}: {_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens",
            "raise model.vocab_size, which it follows",
        )


class Tokenizer:
    """Text <-> ids. A special token's name inside a text is ordinary text: ids 0, 1, 2 never come out of `encode`.

    Attributes:
        vocab_size: entries it really has (int); ids are [0, vocab_size).
        bos_id, eos_id, pad_id: 0, 1, 2.
        bytes_per_token: int64 [vocab_size], the UTF-8 bytes an entry stands for; 0 for special tokens.
        fingerprint: SHA-256 of its JSON, hex.
    """

    bos_id, eos_id, pad_id = range(len(SPECIAL_TOKENS))

    def __init__(self, json_text: str) -> None:
        """`json_text`: the content of a tokenizer.json. Raises ValueError where the special tokens aren't ours."""
        self._json = json_text
        self._backend = tokenizers.Tokenizer.from_str(json_text)
        self._backend.encode_special_tokens = True  # "<eos>" in a text is five characters, not the end
        if tuple(self._backend.id_to_token(i) for i in range(len(SPECIAL_TOKENS))) != SPECIAL_TOKENS:
            raise ValueError(f"not a v4train tokenizer: ids 0, 1, 2 must be {', '.join(SPECIAL_TOKENS)}")
        self.vocab_size: int = self._backend.get_vocab_size()
        self.fingerprint: str = hashlib.sha256(json_text.encode()).hexdigest()
        # A byte-level token is spelt with one character a byte.
        self.bytes_per_token = np.array([len(self._backend.id_to_token(i)) for i in range(self.vocab_size)], np.int64)
        self.bytes_per_token[: len(SPECIAL_TOKENS)] = 0

    def encode(self, text: str) -> np.ndarray:
        """int64 [n], without special tokens."""
        return np.array(self._backend.encode(text).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        return [np.array(encoding.ids, dtype=np.int64) for encoding in self._backend.encode_batch_fast(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids without an entry have none; a torn character becomes U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json (which transformers reads too) at `path`, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
        temporary.write_text(self._json, encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        return cls(Path(path).read_text(encoding="utf-8"))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE merges from `texts`; the same texts give the same tokenizer. Raises ConfigError (tokenizer.vocab_size)."""
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str())


def load_tokenizer(config: TokenizerConfig, documents: Documents) -> Tokenizer:
    """The tokenizer trained on the training documents, from the cache or made there (safe for many processes).

    Raises ConfigError (tokenizer.vocab_size, tokenizer.cache_dir).
    """

    def build(folder: Path) -> None:
        started = time.monotonic()
        tokenizer = train_tokenizer((document.read() for document in documents.train), config.vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        seconds = time.monotonic() - started
        count = len(documents.train)
        logger.info("tokenizer: %d entries trained from %d documents in %.1f s", tokenizer.vocab_size, count, seconds)

    key = hashlib.sha256(f"{documents.fingerprint} {config.vocab_size} {_RECIPE}".encode()).hexdigest()
    folder = cached_folder(config.cache_dir, f"tokenizer-{key[:20]}", build)
    return Tokenizer.load(folder / "tokenizer.json")
