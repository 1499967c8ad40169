"""Patterns of layers: `"swa*2 (csa hca)*20 csa"`, and options of single ones: `"(gqa:window=128 gqa)*18"`."""

import re
from typing import Any

from v4train.errors import ConfigError

# Attention kinds, and what a layer of each may set beside its kind
LOCAL_OPTIONS = ("window", "dilation", "global_tokens", "sink")
ATTENTION_KINDS = {
    "mha": LOCAL_OPTIONS,
    "mqa": LOCAL_OPTIONS,
    "gqa": LOCAL_OPTIONS,
    "mla": LOCAL_OPTIONS,
    "dsa": ("sink",),
    "swa": ("window",),
    "csa": ("window",),
    "hca": ("window",),
}
INDEXED_KINDS = ("csa", "dsa")  # with a lightning indexer
LARGEST = 2**40
EXAMPLE = 'write one like "swa*2 (csa hca)*20 csa"'


def refuse(key: str, value: object, rule: str, remedy: str) -> None:
    """Raise ConfigError about `model.<key>`."""
    raise ConfigError(f"model.{key}", value, rule, remedy)


def expand_mix(mix: Any, key: str = "attention_mix") -> list[str]:
    """List the word of each layer: `"swa*2 (csa hca)*2"` -> `[swa, swa, csa, hca, csa, hca]`."""
    if isinstance(mix, list | tuple):
        return [str(kind) for kind in mix]
    if not isinstance(mix, str):
        refuse(key, mix, "neither a list of kinds nor a pattern", EXAMPLE)
    tokens = re.findall(r"[\w:=.\-]+|[()*]", mix)
    if "".join(tokens) != re.sub(r"[\s,]+", "", mix):
        refuse(key, mix, "not a pattern", EXAMPLE)
    kinds, rest = _expand(tokens, mix, key)
    if rest:
        refuse(key, mix, "unbalanced parenthesis", "close what you open")
    return kinds


def _expand(tokens: list[str], mix: str, key: str) -> tuple[list[str], list[str]]:
    kinds: list[str] = []
    while tokens and tokens[0] != ")":
        head, *tokens = tokens
        if head == "(":
            group, tokens = _expand(tokens, mix, key)
            if not tokens:
                refuse(key, mix, "unbalanced parenthesis", "close what you open")
            tokens = tokens[1:]
        else:
            group = [head]
        if tokens[:1] == ["*"]:
            if len(tokens) < 2 or not _is_whole(tokens[1]):
                refuse(key, mix, "* needs a whole number after it", "write e.g. swa*2")
            group, tokens = group * int(tokens[1]), tokens[2:]
        kinds += group
    return kinds, tokens


def parse_layer(word: str, key: str = "attention_mix") -> tuple[str, dict[str, int | bool | None]]:
    """Kind and options of one word: `"gqa:window=128:sink=true"` -> `("gqa", {"window": 128, "sink": True})`."""
    kind, *settings = word.split(":")
    if kind not in ATTENTION_KINDS:
        refuse(key, kind, "unknown attention kind", f"use one of {', '.join(ATTENTION_KINDS)}")
    options = [_option(setting, kind, word, key) for setting in settings]
    if len(dict(options)) < len(options):
        refuse(key, word, "an option is given twice", "give it once")
    return kind, dict(options)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _option(setting: str, kind: str, word: str, key: str) -> tuple[str, int | bool | None]:
    name, _, text = setting.partition("=")
    allowed = ATTENTION_KINDS[kind]
    if name not in allowed:
        remedy = f"use {', '.join(allowed)}" if allowed else "leave it out"
        refuse(key, word, f"{kind} has no option {name or setting!r}", remedy)
    words = {"sink": {"true": True, "false": False}, "window": {"null": None} if allowed == LOCAL_OPTIONS else {}}
    if text in words.get(name, {}):
        return name, words[name][text]
    if name == "sink":
        refuse(key, word, "sink must be true or false", f"write e.g. {kind}:sink=true")
    if not _is_whole(text) or int(text) > LARGEST:
        refuse(key, word, f"{name} must be a whole number", f"write e.g. {kind}:{name}=128")
    return name, int(text)
