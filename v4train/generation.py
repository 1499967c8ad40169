"""Text from a model: sampling, token by token, with its KV cache or without.

Shapes: B rows (prompts), T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from v4train.errors import ConfigError
from v4train.model import Transformer
from v4train.model.attention.cache import Cache

TORN = "\ufffd"  # what `decode` makes of bytes that are no character (yet)


@dataclass
class GenerationConfig:
    """Values and their meaning: conf/generate.yaml."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    prefill_chunk: int

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "prefill_chunk"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "it must be at least 1", "choose a positive number")
        if not 0 <= self.temperature < float("inf"):  # NaN neither
            rule = "it must be a finite number, not negative"
            raise ConfigError("temperature", self.temperature, rule, "use 0 for the likeliest token, 1 for the model's")
        if not 0 < self.top_p <= 1:
            rule = "it is a share of the probability, above 0 and at most 1"
            raise ConfigError("top_p", self.top_p, rule, "use 1 for all tokens, temperature=0 for the likeliest")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "it must be a whole number from 0 to 2^63 - 1", "use seed=1")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    vocab_size: int,
    eos_id: int,
    cache: Cache | None,
) -> Iterator[list[int | None]]:
    """Tokens as they come: each step yields the new token of each row, or None where a row has none.

    A row has none while the model still reads its prompt, and once it has ended: with `eos_id`, which is yielded, or
    with `max_new_tokens`. Row b is sampled with `config.seed + b`, so it is what its prompt alone gives with that seed.

    Args:
        model: in eval mode.
        prompts: token ids of each row, at least one; lengths may differ.
        vocab_size: ids that have text; the model may embed more, which are never sampled.
        cache: `model.new_cache(len(prompts), longest prompt + max_new_tokens)`; None computes the whole context anew
            for each token.

    Raises:
        ConfigError: the cache is too small, or not empty.
        FloatingPointError: the logits are not finite.
    """
    if cache is not None and cache.length:
        raise ConfigError("cache", f"{cache.length} tokens", "it has seen a text already", "make a new one")
    generators = [torch.Generator().manual_seed(config.seed + row) for row in range(len(prompts))]
    left = [config.max_new_tokens] * len(prompts)  # tokens that each row may still add
    length = min(map(len, prompts))  # every row is this long; a longer prompt goes on with its own tokens
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt[:length]) for prompt in prompts], device=device)
    while any(left):
        logits = _next_logits(model, ids, cache, config.prefill_chunk)[:, :vocab_size].cpu()
        column, new = [], []
        for row, prompt in enumerate(prompts):
            reads = length < len(prompt)
            token = None
            if left[row] and not reads:
                token = sample(logits[row], config.temperature, config.top_p, generators[row])
                left[row] = 0 if token == eos_id else left[row] - 1
            new.append(token)
            column.append(prompt[length] if reads else eos_id if token is None else token)
        if any(token is not None for token in new):
            yield new
        ids = torch.cat([ids, torch.tensor(column, device=device)[:, None]], dim=1)
        length += 1


def _next_logits(model: Transformer, ids: Tensor, cache: Cache | None, chunk: int) -> Tensor:
    """Logits [B, V] after `ids` [B, T]; with a cache only what it has not seen is computed, `chunk` tokens a time."""
    if cache is None:
        return model(ids).logits[:, -1]
    logits = None
    for start in range(cache.length, ids.shape[1], chunk):
        logits = model(ids[:, start : start + chunk], cache=cache).logits[:, -1]
    return logits


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Token drawn from logits [V]: the likeliest at temperature 0, else from `probabilities`.

    Raises:
        FloatingPointError: a logit is infinite or NaN.
    """
    if not torch.isfinite(logits).all():
        raise FloatingPointError("logits are not finite")
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, temperature, top_p), 1, generator=generator))


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """What tokens are drawn with, fp64 [V], from logits [V]: the softmax at `temperature` > 0, cut to the nucleus.

    The nucleus (arXiv 1904.09751, section 3.1) is the fewest of the likeliest tokens that together have `top_p`; of
    equally likely ones the lower id counts first.
    """
    shifted = logits.double() - logits.max()  # exact at any temperature: the largest is 0
    likelihood = (shifted / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = likelihood.sort(descending=True, stable=True)
        before = F.pad(ordered.cumsum(-1)[:-1], (1, 0))
        likelihood[order[before >= top_p]] = 0
    return likelihood / likelihood.sum()


def stream_text(ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Text of tokens as they come: the pieces together are `decode` of all ids.

    A token may end inside a character; its bytes are held back until the character is complete or can't become one.
    """
    waiting: list[int] = []
    shown = 0  # characters of the waiting tokens that are out already
    for token in ids:
        waiting.append(token)
        text = decode(waiting)
        settled = len(text) - text.endswith(TORN)  # only the last character can still change
        if settled > shown:
            yield text[shown:settled]
        waiting, shown = ([], 0) if settled == len(text) else (waiting, settled)
    if rest := decode(waiting)[shown:]:
        yield rest
