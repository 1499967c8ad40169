"""Size of the KV cache, in closed form; equal to `Cache.nbytes()` of a real one to the byte.

Symbols: T max_length, G KV heads, D head width, L latent (kv_lora_rank), R rope_dim, J index head width, W window,
d dilation, g global tokens, m compression ratio. Values that a layer stores for each row of a batch:

    mha mqa gqa   2 G D T, with a window 2 G D (min((W - 1) d + 1, T) + min(g, T))
    mla           (L + R) T, with a window (L + R) (min((W - 1) d + 1, T) + min(g, T))
    dsa           (L + R + J) T
    swa           D min(W, T)
    csa           D min(W, T) + (D + J) (T // m + 6 m - 4)         kv and gate, twice each, of m - 1 tokens that wait;
                                                                   those of m tokens before, for the overlap
    hca           D min(W, T) + D (T // m + 2 m - 2)               kv and gate of m - 1 tokens that wait

As DeepSeek deploys its models (V4.md 4.1; R of a vector's channels are rotated) one vector takes

    V4's window and entries   (D - R) fp8, R bf16, a byte of scale for 64 of the fp8, in eights    584 bytes
    V3's latent               L fp8, R bf16, an fp32 scale for 128 of the fp8                      656 bytes
    index key of csa          J fp4, a byte of scale for 32 of them                                 68 bytes
    index key of dsa          J fp8, an fp32 scale for 128 of them                                 132 bytes
    all others                2 bytes a value: bf16
"""

from dataclasses import dataclass

from v4train.model.config import GQAConfig, LayerAttention, MLAConfig, ModelConfig


@dataclass(frozen=True)
class Part:
    """One buffer of a layer: `width` values for every `ratio` tokens, `limit` times at most."""

    width: int
    ratio: int = 1
    limit: int | None = None

    def values(self, max_length: int) -> int:
        """Values stored for each row of a batch."""
        count = max_length // self.ratio
        return self.width * (count if self.limit is None else min(count, self.limit))


def layer_cache_bytes(
    config: ModelConfig, layer: LayerAttention, batch: int, max_length: int, bytes_per_value: int
) -> dict[str, int]:
    """Bytes of one layer's cache for `batch` rows of at most `max_length` >= 1 tokens, by the buffers' names in it."""
    parts = cache_parts(config, layer)
    return {name: batch * part.values(max_length) * bytes_per_value for name, part in parts.items()}


def cache_bytes(config: ModelConfig, batch: int, max_length: int, bytes_per_value: int) -> int:
    """Bytes of the whole model's cache: `model.new_cache(batch, max_length).nbytes()` without making one."""
    sizes = (layer_cache_bytes(config, layer, batch, max_length, bytes_per_value) for layer in config.layers)
    return sum(sum(parts.values()) for parts in sizes)


def cache_bytes_per_token(config: ModelConfig, layer: LayerAttention, bytes_per_value: int) -> float:
    """Bytes that one more token of one row adds to a layer's cache, on average as max_length grows; 0 with a window."""
    growing = (part for part in cache_parts(config, layer).values() if part.limit is None)
    return bytes_per_value * sum(part.width / part.ratio for part in growing)


def cache_parts(config: ModelConfig, layer: LayerAttention) -> dict[str, Part]:
    """Buffers of one layer by the names that the cache has for them."""
    kind, options = layer.kind, layer.options
    if kind in ("mha", "mqa", "gqa"):
        width = layer.num_kv_heads * options.head_dim
        return _local(options, keys=width, values=width)
    if kind == "mla":
        return _local(options, keys=options.kv_lora_rank + options.rope_dim)
    if kind == "dsa":  # has no window
        latent = Part(options.kv_lora_rank + options.rope_dim)
        return {"keys": latent, "index": Part(config.attention.dsa.head_dim)}
    window = {"window": Part(options.head_dim, limit=options.window)}
    if kind == "csa":
        overlapped = {"ratio": options.csa_compression, "overlap": True}
        index = _compressed("index", options.indexer.head_dim, **overlapped)
        return window | _compressed("entries", options.head_dim, **overlapped) | index
    if kind == "hca":
        return window | _compressed("entries", options.head_dim, options.hca_compression, overlap=False)
    return window


def deployed_cache_bytes(config: ModelConfig, max_length: int) -> int:
    """Bytes of the whole model's cache for one row of `max_length` >= 1 tokens in DeepSeek's own layouts."""
    layers = [(layer, cache_parts(config, layer)) for layer in config.layers]
    return sum(
        part.values(max_length) // part.width * _vector_bytes(config, layer, name, part.width)
        for layer, parts in layers
        for name, part in parts.items()
    )


def deployed_bytes_per_token(config: ModelConfig) -> float:
    """Bytes that one more token adds to that, on average as max_length grows."""
    layers = [(layer, cache_parts(config, layer)) for layer in config.layers]
    return sum(
        _vector_bytes(config, layer, name, part.width) / part.ratio
        for layer, parts in layers
        for name, part in parts.items()
        if part.limit is None
    )


def _vector_bytes(config: ModelConfig, layer: LayerAttention, name: str, width: int) -> int:
    """Of `width` values that are cached together, by the buffer's name in the cache."""
    if layer.kind in ("swa", "csa", "hca") and name in ("window", "entries"):
        fp8 = width - layer.options.rope_dim
        return fp8 + 2 * layer.options.rope_dim + 8 * -(-fp8 // (8 * 64))
    if layer.kind in ("mla", "dsa") and name.removeprefix("first_") == "keys":
        fp8 = layer.options.kv_lora_rank
        return fp8 + 4 * -(-fp8 // 128) + 2 * layer.options.rope_dim
    if name == "index":
        return -(-width // 2) + -(-width // 32) if layer.kind == "csa" else width + 4 * -(-width // 128)
    return 2 * width


def _local(options: GQAConfig | MLAConfig, **widths: int) -> dict[str, Part]:
    """All tokens, or the reach of the window and the document's first tokens."""
    reach = None if options.window is None else (options.window - 1) * options.dilation + 1
    parts = {name: Part(width, limit=reach) for name, width in widths.items()}
    if options.global_tokens:
        parts |= {f"first_{name}": Part(width, limit=options.global_tokens) for name, width in widths.items()}
    return parts


def _compressed(name: str, width: int, ratio: int, overlap: bool) -> dict[str, Part]:
    """Entries, and kv and gate of tokens that wait for a complete block or, with overlap, that the next one needs."""
    waiting = 2 * (ratio - 1) * width * (2 if overlap else 1)
    previous = 2 * ratio * width if overlap else 0
    return {name: Part(width, ratio), f"{name}_tail": Part(waiting + previous, limit=1)}
