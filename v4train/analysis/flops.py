"""FLOPs of training and of decoding, in closed form (a multiply-add is 2 FLOPs; backward costs twice the forward).

Counted: every matrix product that a token passes, and the attention over what it sees. Not counted: elementwise work,
softmax, Sinkhorn, and what an implementation computes only to mask it.

The words of `mode` are those of `train.attention_mode`. `dense` attends to all that is visible and runs no indexer;
`indexer_warmup` does so too, forward only, while the indexers run forward and backward.
"""

from v4train.model.config import AttentionConfig, IndexerConfig, LayerAttention, MLAConfig, ModelConfig

# Forward, and twice that backward: of all but the lightning indexers, and of these
MODE_PASSES = {"sparse": (3, 3), "dense": (3, 0), "indexer_warmup": (1, 3)}
# Forward passes that backward makes again where activations are recomputed
MODE_RECOMPUTES = {"sparse": (1, 1), "dense": (1, 0), "indexer_warmup": (0, 0)}


def active_matrix_parameters(config: ModelConfig) -> int:
    """Matrix elements that one token is multiplied with, MTP block and both uses of the output matrix included."""
    return sum(_part_matrices(config))


def training_flops_per_token(config: ModelConfig, sequence_length: int, mode: str = "sparse") -> float:
    """FLOPs of forward and backward per trained token, at the mean visibility of one document a sequence."""
    return sum(part_flops(config, sequence_length, mode))


def part_flops(config: ModelConfig, sequence_length: int, mode: str = "sparse") -> list[float]:
    """`training_flops_per_token` of each of `Transformer.parts`: embedding, blocks, head, MTP."""
    return _times(MODE_PASSES[mode], _part_matrices(config), config, sequence_length, mode)


def recomputed_flops(config: ModelConfig, sequence_length: int, mode: str, level: str) -> list[float]:
    """FLOPs per token that backward makes again with `train.recompute` at `level`, of each of `Transformer.parts`:
    attention with its projections, or whole blocks, of MTP without the projections that it begins with."""
    if level == "none":
        return [0.0] * (config.num_layers + 2 + config.mtp.num_layers)
    layers = [*zip(config.layers, config.ffn_kinds, strict=True)]
    of_mtp = [(config.mtp_layer, config.mtp_ffn)] * config.mtp.num_layers

    def matrices(layer: LayerAttention, ffn: str) -> int:
        return _block(config, layer, ffn) if level == "block" else attention_matrices(config, layer)

    again = [0, *(matrices(*of) for of in layers), 0, *(matrices(*of) for of in of_mtp)]
    return _times(MODE_RECOMPUTES[mode], again, config, sequence_length, mode)


def _times(
    passes: tuple[int, int], matrices: list[int], config: ModelConfig, sequence_length: int, mode: str
) -> list[float]:
    """FLOPs of so many forward passes, of all but the indexers and of these, through parts with so many elements."""
    of_trunk, of_indexers = passes
    cores, indexers = _part_cores(config, sequence_length, mode), _part_indexers(config, sequence_length)
    parts = zip(matrices, cores, indexers, strict=True)
    return [of_trunk * (2 * size + core - index) + of_indexers * index for size, core, index in parts]


def _part_matrices(config: ModelConfig) -> list[int]:
    hidden = config.hidden_size
    blocks = [_block(config, layer, ffn) for layer, ffn in zip(config.layers, config.ffn_kinds, strict=True)]
    head = config.vocab_size * hidden + _collapse(config)
    # The token projection of MTP runs once, its hidden projection once a stream.
    mtp = (1 + config.num_streams) * hidden * hidden + _block(config, config.mtp_layer, config.mtp_ffn) + head
    return [0, *blocks, head, *[mtp] * config.mtp.num_layers]


def _part_cores(config: ModelConfig, sequence_length: int, mode: str = "sparse") -> list[float]:
    """Forward FLOPs per token of the attention over what is seen, and of the indexers' scores."""

    def core(layer: LayerAttention) -> float:
        attended, scored = visible_pairs(config, layer, sequence_length, mode)
        per_attended, per_scored = _pair_flops(config, layer, absorbed=layer.kind == "dsa" and mode == "sparse")
        return per_attended * (attended / sequence_length) + per_scored * (scored / sequence_length)

    return [0.0, *map(core, config.layers), 0.0, *[core(config.mtp_layer)] * config.mtp.num_layers]


def _part_indexers(config: ModelConfig, sequence_length: int) -> list[float]:
    """What the lightning indexers have of `_part_matrices`, in FLOPs, and of `_part_cores`."""

    def index(layer: LayerAttention) -> float:
        scored, per_scored = visible_pairs(config, layer, sequence_length)[1], _pair_flops(config, layer)[1]
        return 2 * indexer_matrices(config, layer) + per_scored * (scored / sequence_length)

    return [0.0, *map(index, config.layers), 0.0, *[index(config.mtp_layer)] * config.mtp.num_layers]


def decode_flops(config: ModelConfig, layer: LayerAttention, context: int) -> dict[str, int]:
    """FLOPs of one layer's attention when the last of `context` >= 1 tokens of a row is decoded with a cache.

    `matrices` are projections and compressors, `attention` the scores and the weighted sum over what is seen, `index`
    the lightning indexer's scores: V4.md 4.2 without its factors for precision. mla and dsa in absorbed form.
    """
    attended, scored = visible_pairs(config, layer, context)
    attended_before, scored_before = visible_pairs(config, layer, context - 1)
    per_attended, per_scored = _pair_flops(config, layer, absorbed=True)
    return {
        "matrices": 2 * attention_matrices(config, layer),
        "attention": per_attended * (attended - attended_before),
        "index": per_scored * (scored - scored_before),
    }


def attention_matrices(config: ModelConfig, layer: LayerAttention) -> int:
    """Matrix elements of one layer's attention that a token is multiplied with (mla: as many in either form)."""
    hidden, options = config.hidden_size, layer.options
    if layer.kind in ("mha", "mqa", "gqa"):
        return 2 * hidden * options.head_dim * (options.num_heads + layer.num_kv_heads)
    if layer.kind in ("mla", "dsa"):
        return _mla(hidden, options) + indexer_matrices(config, layer)
    size = _shared_kv(hidden, options) + indexer_matrices(config, layer)
    # Kv and gate, in csa for the block and the next one
    return size + {"csa": 4, "hca": 2}.get(layer.kind, 0) * hidden * options.head_dim


def indexer_matrices(config: ModelConfig, layer: LayerAttention) -> int:
    """Those of `attention_matrices` that are its lightning indexer's."""
    hidden, options = config.hidden_size, layer.options
    if layer.kind == "dsa":
        indexer = config.attention.dsa
        return _index_queries(hidden, options.q_lora_rank, indexer) + hidden * indexer.head_dim
    if layer.kind == "csa":  # index keys have kv and gate as the entries have
        indexer = options.indexer
        return _index_queries(hidden, options.q_lora_rank, indexer) + 4 * hidden * indexer.head_dim
    return 0


def visible_pairs(config: ModelConfig, layer: LayerAttention, length: int, mode: str = "sparse") -> tuple[int, int]:
    """What the tokens of one document of `length` tokens see, summed over them.

    Returns:
        (tokens and entries attended to, those that the lightning indexer scores where it runs).
    """
    kind, options = layer.kind, layer.options
    if kind == "dsa":
        return _pairs(length, limit=config.attention.dsa.top_k if mode == "sparse" else None), _pairs(length)
    if kind in ("mha", "mqa", "gqa", "mla"):
        if options.window is None:
            return _pairs(length), 0
        beside = sum(  # for each global token, those that see it less those that have it in their window
            length - token - min(options.window, -(-(length - token) // options.dilation))
            for token in range(min(options.global_tokens, length))
        )
        return _pairs(length, step=options.dilation, limit=options.window) + beside, 0
    window = _pairs(length, limit=options.window)
    if kind == "csa":
        ratio = options.csa_compression
        selected = _pairs(length, ratio - 1, ratio, options.indexer.top_k if mode == "sparse" else None)
        return window + selected, _pairs(length, ratio - 1, ratio)
    if kind == "hca":
        ratio = options.hca_compression
        return window + _pairs(length, ratio - 1, ratio), 0
    return window, 0


def _pairs(length: int, first: int = 0, step: int = 1, limit: int | None = None) -> int:
    """Sum over tokens of how many keys each sees: one from token `first` on, one more every `step`, up to `limit`.

    The i-th of them is there for length - first - i * step tokens.
    """
    count = max(-(-(length - first) // step), 0)
    count = count if limit is None else min(limit, count)
    return count * (length - first) - step * count * (count - 1) // 2


def _pair_flops(config: ModelConfig, layer: LayerAttention, absorbed: bool = False) -> tuple[int, int]:
    """Forward FLOPs of one attended pair (score and weighted sum, all heads) and of one that the indexer scores.

    absorbed: mla and dsa attend to latents, as in decoding, and as dsa does in training where it selects.
    """
    options = layer.options
    if layer.kind not in ("mla", "dsa"):
        widths = 2 * options.head_dim
    elif absorbed:
        widths = 2 * options.kv_lora_rank + options.rope_dim
    else:
        widths = options.nope_dim + options.rope_dim + options.value_dim
    indexer = {"csa": config.attention.indexer, "dsa": config.attention.dsa}.get(layer.kind)
    return 2 * options.num_heads * widths, 2 * indexer.num_heads * indexer.head_dim if indexer else 0


def _mla(hidden: int, options: MLAConfig) -> int:
    heads, latent = options.num_heads, options.kv_lora_rank
    queries = hidden * options.q_lora_rank + options.q_lora_rank * heads * (options.nope_dim + options.rope_dim)
    keys = hidden * (latent + options.rope_dim) + heads * latent * (options.nope_dim + options.value_dim)
    return queries + keys + heads * options.value_dim * hidden


def _shared_kv(hidden: int, options: AttentionConfig) -> int:
    width = options.num_heads * options.head_dim
    inputs = hidden * options.q_lora_rank + options.q_lora_rank * width + hidden * options.head_dim
    return inputs + width * options.o_lora_rank + options.o_groups * options.o_lora_rank * hidden


def _index_queries(hidden: int, latent: int, indexer: IndexerConfig) -> int:
    """Queries and head weights of a lightning indexer."""
    return latent * indexer.num_heads * indexer.head_dim + hidden * indexer.num_heads


def _block(config: ModelConfig, layer: LayerAttention, ffn: str) -> int:
    """Matrix elements of one block that a token is multiplied with."""
    moe, hidden = config.moe, config.hidden_size
    if ffn == "dense":
        size = 3 * hidden * config.ffn.intermediate_size
    else:
        experts = moe.top_k + moe.num_shared_experts
        size = hidden * moe.num_experts + 3 * hidden * moe.intermediate_size * experts  # router, experts
    return attention_matrices(config, layer) + size + 2 * _residual_site(config)


def _residual_site(config: ModelConfig) -> int:
    streams, hidden = config.num_streams, config.hidden_size
    if config.residual.kind == "mhc":  # all streams together give pre, post and mixing
        return (2 + streams) * streams * streams * hidden
    return (2 + streams) * streams * hidden if config.residual.kind == "hc" else 0  # each stream gives its own


def _collapse(config: ModelConfig) -> int:
    streams = config.num_streams
    return streams * streams * config.hidden_size if config.residual.kind == "mhc" else 0
