"""Text to ids and back: a byte-level BPE trained on the training documents, or an existing tokenizer.json."""

import hashlib
import json
import logging
import os
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from v4train.data.cache import cached_folder
from v4train.errors import ConfigError
from v4train.terminal import Work

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<fim_begin>", "<fim_hole>", "<fim_end>")  # ids 0 to 5 of our own
_BYTES = 256
_RECIPE = 2  # part of the cache key: raise it when a change here alters what training gives

# How known tokenizers spell a role; the first that a tokenizer has is taken. Ours and Gemma's, DeepSeek's, Llama 3's,
# gpt-oss's, Llama 2's and Mistral's; GPT-2, its heirs and Qwen have one token for all.
_BOS = ("<bos>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|startoftext|>", "<s>", "<|endoftext|>")
_EOS = ("<eos>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "</s>")
_PAD = ("<pad>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<|pad|>", "[PAD]")
# Begin, hole and end of fill-in-middle: ours, DeepSeek's, StarCoder's, Qwen's and Gemma's, CodeLlama's.
_FIM = (
    SPECIAL_TOKENS[3:],
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)

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
    """Config group `tokenizer`. Values and their meaning: conf/tokenizer/."""

    vocab_size: int
    cache_dir: str
    path: str | None
    train_bytes: int

    def __post_init__(self) -> None:
        if self.path is None:
            check_vocab_size(self.vocab_size)
        if self.train_bytes < 1:
            raise ConfigError("tokenizer.train_bytes", self.train_bytes, "at least one byte", "for example 268435456")


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


class FillInMiddle(NamedTuple):
    """Ids around the parts of a document: begin, prefix, hole, suffix, end, middle."""

    begin: int
    hole: int
    end: int


class Tokenizer:
    """Text <-> ids. A special token's name inside a text is ordinary text: its id never comes out of `encode`.

    Attributes:
        json: the content of its tokenizer.json.
        fingerprint: SHA-256 of it, hex.
        vocab_size: ids are [0, vocab_size) (int); an existing tokenizer may leave some of them unused.
        bos_id, eos_id, pad_id: of our own tokenizers 0, 1, 2; an existing one may use one id for several.
        fim_ids: FillInMiddle, 3, 4, 5 of our own; None where an existing tokenizer has none.
        bytes_per_token: int64 [vocab_size], the UTF-8 bytes an entry stands for; 0 for special tokens and unused ids.
            Where an existing tokenizer normalises text or puts a space before it, this counts what it makes of it.
    """

    def __init__(self, json_text: str, name: str | Path = "tokenizer.json") -> None:
        """`json_text`: the content of a tokenizer.json, ours or of another byte-level BPE or SentencePiece model.

        `name` is for messages. Raises ConfigError (tokenizer.path): it isn't one, or has no token for BOS or EOS.
        """
        self.json = json_text
        self.fingerprint: str = hashlib.sha256(json_text.encode()).hexdigest()
        content, self._backend = _parse(json_text, name)
        self._backend.encode_special_tokens = True  # "<eos>" in a text is five characters, not the end
        self._backend.no_truncation()
        self._backend.no_padding()
        added = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}
        self.bos_id, self.eos_id = _role("BOS", _BOS, added, name), _role("EOS", _EOS, added, name)
        self.pad_id: int = next((added[token] for token in _PAD if token in added), self.eos_id)
        fim = _fim_names(added)
        self.fim_ids = FillInMiddle(*(added[token] for token in fim)) if fim else None
        self.vocab_size: int = max(self._backend.get_vocab().values()) + 1
        self.bytes_per_token = _bytes_per_token(self._backend, content, self.vocab_size, name)

    def encode(self, text: str) -> np.ndarray:
        """int64 [n], without special tokens."""
        return _ids(self._backend.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores; several threads may call it at once."""
        return [_ids(e) for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids without an entry have none; a torn character becomes U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json (which transformers reads too) at `path`, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
        temporary.write_bytes(self.json.encode())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Raises ConfigError (tokenizer.path) where there is no file, or no tokenizer in it."""
        try:
            return cls(Path(path).expanduser().read_bytes().decode(), path)
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or error
            raise ConfigError("tokenizer.path", path, f"can't be read ({what})", "name a tokenizer.json") from error


def _ids(encoding: tokenizers.Encoding) -> np.ndarray:
    return np.array(array("I", encoding.ids), dtype=np.int64)  # three times as fast as from the list


def _parse(json_text: str, name: str | Path) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """The JSON, and a tokenizer in which every token of a role is special, as DeepSeek's for fill-in-middle aren't."""
    try:
        content = json.loads(json_text)
        roles = {*_BOS, *_EOS, *_PAD, *(_fim_names(token["content"] for token in content["added_tokens"]) or ())}
        plain = [t for t in content["added_tokens"] if t["content"] in roles and not t["special"]]
        for token in plain:
            token["special"] = True
        return content, tokenizers.Tokenizer.from_str(json.dumps(content) if plain else json_text)
    except Exception as error:  # tokenizers raises no other class
        what = " ".join(str(error).split())
        rule = f"not a tokenizer that `tokenizers` {tokenizers.__version__} reads ({type(error).__name__}: {what})"
        raise ConfigError("tokenizer.path", name, rule, "name a tokenizer.json of Hugging Face's format") from error


def _role(role: str, spellings: Sequence[str], added: dict[str, int], name: str | Path) -> int:
    found = next((added[token] for token in spellings if token in added), None)
    if found is None:
        rule = f"it has no {role} token: none of its added tokens is {', '.join(spellings)}"
        raise ConfigError("tokenizer.path", name, rule, "use another tokenizer, or add such a token to it")
    return found


def _fim_names(added: Iterable[str]) -> tuple[str, str, str] | None:
    known = set(added)
    return next((names for names in _FIM if known.issuperset(names)), None)


def _bytes_per_token(backend: tokenizers.Tokenizer, content: dict, size: int, name: str | Path) -> np.ndarray:
    kinds = set(_types([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]))
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        found = ", ".join(sorted(kinds))
        rule = f"neither byte-level nor of SentencePiece ({found}): what text a token stands for is unknown"
        raise ConfigError("tokenizer.path", name, rule, "use a byte-level BPE, as DeepSeek, Llama 3, Qwen and GPT-2 do")
    byte_level = "ByteLevel" in kinds
    added = backend.get_added_tokens_decoder()
    counts = np.zeros(size, np.int64)
    for token, i in backend.get_vocab().items():
        if i in added:
            counts[i] = 0 if added[i].special else len(token.encode())
        elif byte_level:
            counts[i] = len(token)  # spelt with one character a byte
        else:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            counts[i] = 1 if is_byte else len(token.replace("▁", " ").encode())
    return counts


def _types(part: Any) -> Iterator[str]:
    """The "type" of every component of a tokenizer.json's part, nested ones included."""
    if isinstance(part, dict):
        yield from [part["type"]] if isinstance(part.get("type"), str) else []
    for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else []:
        yield from _types(child)


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


def cached_tokenizer(config: TokenizerConfig, fingerprint: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of `config.path`, or one trained on the texts, from the cache or made there.

    `fingerprint` stands for the texts, which are read only where none is cached. Safe for many processes.
    Raises ConfigError (tokenizer.*).
    """
    if config.path is not None:
        return existing_tokenizer(config.path, config.vocab_size)

    def build(folder: Path) -> None:
        started = time.monotonic()
        with Work("training the tokenizer") as work:  # what is read first is counted, merges come after that
            chosen = work.counted(first_bytes(texts(), config.train_bytes))
            tokenizer = train_tokenizer(chosen, config.vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        seconds = time.monotonic() - started
        logger.info("tokenizer: %d entries trained in %.1f s", tokenizer.vocab_size, seconds)

    recipe = f"{fingerprint} {config.vocab_size} {config.train_bytes} {_RECIPE}"
    key = hashlib.sha256(recipe.encode()).hexdigest()
    folder = cached_folder(config.cache_dir, f"tokenizer-{key[:20]}", build)
    return Tokenizer.load(folder / "tokenizer.json")


def existing_tokenizer(path: str | Path, most: int) -> Tokenizer:
    """The tokenizer.json at `path`, unless it has more than `most` entries. Raises ConfigError (tokenizer.path)."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > most:
        rule = f"it has {tokenizer.vocab_size} entries, tokenizer.vocab_size (at most model.vocab_size) is {most}"
        raise ConfigError("tokenizer.path", path, rule, f"set model.vocab_size={tokenizer.vocab_size} or more")
    return tokenizer


def first_bytes(texts: Iterable[str], most: int) -> Iterator[str]:
    """Whole texts from the start until `most` bytes of UTF-8 are reached."""
    for text in texts:
        yield text
        most -= len(text.encode())
        if most <= 0:
            return
