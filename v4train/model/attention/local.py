"""Attention over the tokens themselves, as `mha`, `mqa`, `gqa` and `mla` layers have it: all of the document, or a
window that may be dilated and joined by the document's first tokens.

Shapes: B batch, S sequence, H heads, G KV heads, D key width, E value width.
"""

import torch
from torch import Tensor

from v4train.model.attention.cache import LayerCache, TokenBuffer, window_capacity
from v4train.model.attention.core import Entries, Local, attend
from v4train.model.config import GQAConfig, MLAConfig
from v4train.model.documents import GlobalTokens, Place, global_tokens


def attend_locally(
    options: GQAConfig | MLAConfig,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    place: Place,
    cache: LayerCache | None,
    *,
    sink: Tensor | None,
    scale: float | None = None,
    value_width: int | None = None,
    chunk: int,
) -> Tensor:
    """Output [B, S, H, E] of queries [B, S, H, D] over keys [B, G, T, D] and values [B, G, T, E].

    They are of the same tokens, with those in front that are within `reach` where other ranks have them.
    values None: the first `value_width` channels of the keys (absorbed MLA).
    """
    entries = None
    if cache is None:
        keys, values = keys.contiguous(), values.contiguous()  # or every chunk copies them
        if options.global_tokens:
            limits = (options.global_tokens, options.window, options.dilation)
            seen = global_tokens(place, *limits)
            entries = Entries(_take(keys, seen.tokens), _take(values, seen.tokens), seen)
    else:
        if options.global_tokens:
            entries = _first_tokens(options, keys, values, place, cache)
        keys, values = extend(cache, keys, values)
    starts = place.starts_among(keys.shape[2])
    local = Local(keys, values, starts, options.window, options.dilation)
    numbers = {"scale": scale, "value_width": value_width, "chunk": chunk}
    return attend(query, local=local, entries=entries, sink=sink, **numbers).output


def reach(options: GQAConfig | MLAConfig) -> int | None:
    """How many tokens before itself a query may look at; None is all."""
    return None if options.window is None or options.global_tokens else (options.window - 1) * options.dilation


def extend(cache: LayerCache, keys: Tensor, values: Tensor | None, prefix: str = "") -> tuple[Tensor, Tensor | None]:
    """Stored and new keys and values; the first tokens of a document where `prefix` is `first_`."""

    def store(name: str, new: Tensor) -> Tensor:
        buffer = cache[prefix + name]
        return buffer.keep_first(new) if prefix else buffer.extend(new)

    return store("keys", keys), None if values is None else store("values", values)


def local_buffers(
    options: GQAConfig | MLAConfig, batch: int, groups: int, max_length: int, **widths: int
) -> dict[str, TokenBuffer]:
    """Buffers of `attend_locally` for an empty cache. widths: of `keys` and, unless part of the keys, `values`."""
    capacity = window_capacity(options.window, options.dilation, max_length)
    buffers = {name: TokenBuffer(batch, groups, capacity, width) for name, width in widths.items()}
    first = min(options.global_tokens, max_length)
    return buffers | {
        f"first_{name}": TokenBuffer(batch, groups, first, width) for name, width in widths.items() if first
    }


def _first_tokens(
    options: GQAConfig | MLAConfig, keys: Tensor, values: Tensor | None, place: Place, cache: LayerCache
) -> Entries:
    keys, values = extend(cache, keys, values, "first_")
    tokens = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[0], -1)
    seen = GlobalTokens(
        tokens, torch.zeros_like(tokens), place.positions, place.starts, options.window, options.dilation
    )
    return Entries(keys, values, seen)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """[B, G, S, D] at tokens [B, N]: [B, G, N, D]."""
    return torch.take_along_dim(x, tokens[:, None, :, None], dim=2)
