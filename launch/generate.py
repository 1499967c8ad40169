"""Text from a trained model: `python launch/generate.py run=runs/flash_small prompt="import os\\n"`.

Arguments are key=value, taken as they stand after the first `=`; keys, meaning and defaults: conf/generate.yaml. The
text streams to stdout, prompt first; a last line on stderr says how fast it was. The run's folder is only read.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from v4train.config import PRECISIONS, checked_device
from v4train.data import Tokenizer
from v4train.errors import ConfigError, refusing_bad_input
from v4train.generation import GenerationConfig, generate, stream_text
from v4train.model import Transformer
from v4train.model.attention.cache import Cache
from v4train.overrides import config_dir
from v4train.structured import key_values, structured, wants_help
from v4train.train.checkpoint import load_model
from v4train.train.run_directory import find_checkpoint

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


@dataclass
class GenerateConfig(GenerationConfig):
    """Values and their meaning: conf/generate.yaml. The prompt is free text, and not among them."""

    run: str | None
    prompt_file: str | None
    use_cache: bool
    device: str
    precision: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is None:
            raise ConfigError("run", "missing", "nothing says which model to use", "give run=runs/NAME")
        if self.precision not in PRECISIONS:
            raise ConfigError("precision", self.precision, "unknown precision", f"use one of {', '.join(PRECISIONS)}")
        self.device = checked_device(self.device)


def main(arguments: list[str]) -> None:
    if wants_help(arguments):
        return print(__doc__)
    config, prompt = read_arguments(arguments)
    directory, path = find_checkpoint(config.run)
    tokenizer = Tokenizer.load(directory.tokenizer)
    model = load_model(path).to(config.device)
    try:
        with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            figures = write_text(model, tokenizer, prompt, config)
    except FloatingPointError as error:
        raise ConfigError("run", config.run, f"the model has diverged ({error})", "use another checkpoint") from error
    print(f"{path.name}: {figures}", file=sys.stderr)


def write_text(model: Transformer, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> str:
    """Prompt and continuation to stdout, as it comes; returns speed and size in words."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    cache = _new_cache(model, len(ids) + config.max_new_tokens, config) if config.use_cache else None
    tokenizer_ids = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    times = [time.perf_counter()]  # of the start and of each new token

    def tokens() -> Iterator[int]:
        for (token,) in generate(model, [ids], config, **tokenizer_ids, cache=cache):
            times.append(time.perf_counter())
            yield token

    print(prompt, end="", flush=True)
    try:
        for piece in stream_text(tokens(), tokenizer.decode):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    return _figures(len(ids), times, cache)


def read_arguments(arguments: list[str]) -> tuple[GenerateConfig, str]:
    """Configuration and prompt from key=value arguments over conf/generate.yaml.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a rule broken.
    """
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(config_dir() / "generate.yaml"))
    given = key_values(arguments, values, "quote what holds spaces, e.g. prompt='a b'")
    values |= given
    prompt = values.pop("prompt")  # never to OmegaConf, which would read ${...} in it
    config = structured(GenerateConfig, values, "")
    if config.prompt_file is None:
        return config, _text(re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], prompt), "prompt")
    if "prompt" in given:
        raise ConfigError("prompt_file", config.prompt_file, "prompt= gives another one", "give one of the two")
    return config, _read_prompt(config.prompt_file)


def _read_prompt(name: str) -> str:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError("prompt_file", name, f"it can't be read ({error.strerror})", "name a text file") from error
    return _text(content.decode("utf-8", "surrogateescape"), "prompt_file")


def _text(text: str, key: str) -> str:
    """`text`, unless bytes of it are no UTF-8: Python hands those on as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(key, ascii(text[:40]), "it is not UTF-8", "convert it, for instance with iconv") from error
    return text


def _new_cache(model: Transformer, max_length: int, config: GenerateConfig) -> Cache:
    try:
        return model.new_cache(1, max_length, torch.bfloat16 if config.precision == "bf16" else None)
    except (RuntimeError, TypeError) as error:  # torch's own for a CPU without room, and for a size beyond int64
        rule = f"a cache of {max_length} tokens does not fit into memory"
        raise ConfigError("max_new_tokens", config.max_new_tokens, rule, "ask for fewer, or use_cache=false") from error


def _figures(prompt_tokens: int, times: list[float], cache: Cache | None) -> str:
    """Speed of prefill (the prompt, up to the first new token) and of decoding (the others), and size of the cache."""
    start, first, end, others = times[0], times[1], times[-1], len(times) - 2
    prefill = f"prefill {prompt_tokens} tokens, {prompt_tokens / (first - start):.1f} tokens/s"
    decode = f"decode {others} tokens" + (f", {others / (end - first):.1f} tokens/s" if others else "")
    size = "no cache" if cache is None else f"cache {cache.nbytes()} bytes for {cache.max_length} tokens"
    return f"{prefill}; {decode}; {size}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    try:
        with refusing_bad_input():
            main(sys.argv[1:])
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
