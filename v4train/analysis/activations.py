"""What a training step keeps for its backward pass, in closed form: bytes on one rank, of one micro-batch.

Counted tensor by tensor as the modules save them, each storage once. `Kept.narrow` are numbers in the dtype of matrix
products (2 bytes under bf16 autocast, else 4), `Kept.full` those that stay fp32, `Kept.wide` int64 indices.

Symbols: S tokens of a row here, M hidden, C streams, H heads here, D head width, N entries, K experts or entries a
token, I inner width.
"""

from typing import NamedTuple

from v4train.analysis.work import Work
from v4train.model.config import (
    BLOCK_ROWS,
    ENTRIES_AT_ONCE,
    FORGET_FROM,
    GATHER_FROM,
    GATHERED,
    HELD,
    LEAST_BLOCK,
    LOGITS_BYTES,
    IndexerConfig,
    LayerAttention,
    MLAConfig,
    ModelConfig,
)
from v4train.model.mix import expand_mix


class Kept(NamedTuple):
    """Numbers by how wide they are."""

    narrow: float = 0
    full: float = 0
    wide: float = 0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "Kept":
        return Kept(*(count * numbers for numbers in self))

    def nbytes(self, precision: str) -> float:
        return self.narrow * (2 if precision == "bf16" else 4) + 4 * self.full + 8 * self.wide


def unit_bytes(config: ModelConfig, work: Work) -> list[float]:
    """Bytes that each unit of `stage_bounds` keeps of a micro-batch: embedding, blocks, head with MTP."""
    words, ffns = expand_mix(config.attention_mix), config.ffn_kinds
    hashed = [index < config.moe.num_hash_layers for index in range(config.num_layers)]
    layers = list(zip(words, ffns, hashed, strict=True))
    blocks = {of: block(config, config.layer(of[0]), of[1], of[2], work) for of in set(layers)}
    units = [Kept(), *(blocks[of] for of in layers)]
    last = head(config, work)
    if config.mtp.num_layers:
        hidden, streams = config.hidden_size, config.num_streams
        # The embedded token, normalised; the streams, normalised. What the block begins with comes of products
        projections = Kept(narrow=(1 + streams) * hidden, full=hidden + 1 + streams).times(work.tokens)
        mtp = block(config, config.mtp_layer, config.mtp_ffn, False, work, narrow=True)
        last = last + projections + mtp + head(config, work, narrow=True)
    return [unit.nbytes(work.precision) for unit in [*units, last]]


def recomputed_bytes(config: ModelConfig, work: Work) -> float:
    """Bytes of what backward makes again at a time: the largest block's, or the largest attention's."""
    if work.recompute == "none":
        return 0.0
    kinds = set(zip(expand_mix(config.attention_mix), config.ffn_kinds, strict=True))
    layers = [(config.layer(word), ffn) for word, ffn in sorted(kinds)]
    layers += [(config.mtp_layer, config.mtp_ffn)] * config.mtp.num_layers
    inside = [attention(config, layer, work) for layer, _ in layers]
    if work.recompute == "block":
        inside = [of + _rest(config, ffn, False, work, False) for of, (_, ffn) in zip(inside, layers, strict=True)]
    return max(of.nbytes(work.precision) for of in inside)


def block(config: ModelConfig, layer: LayerAttention, ffn: str, hashed: bool, work: Work, narrow: bool = False) -> Kept:
    """What one block keeps, the streams that it begins with included. narrow: these are in the dtype of products."""
    streams = _hidden(config.num_streams * config.hidden_size, narrow).times(work.tokens)
    if work.recompute == "block":
        return streams
    # Recomputed attention keeps its input; its output belongs to the residual connection
    inside = _hidden(config.hidden_size * work.tokens, narrow)
    if work.recompute == "none":
        inside = attention(config, layer, work)
    return streams + inside + _rest(config, ffn, hashed, work, narrow)


def head(config: ModelConfig, work: Work, narrow: bool = False) -> Kept:
    """The collapse of the streams, the norm, and the gradients that the cross-entropy makes at once."""
    hidden, streams = config.hidden_size, config.num_streams
    per_token = _hidden(2 * hidden, narrow) + Kept(full=1)
    if config.residual.kind == "mhc":
        per_token += _hidden(streams * hidden, narrow) + Kept(full=6 * streams + 1)
    return per_token.times(work.tokens) + Kept(full=config.vocab_size * hidden // work.tensor)


def _hidden(numbers: float, narrow: bool) -> Kept:
    return Kept(narrow=numbers) if narrow else Kept(full=numbers)


def working_bytes(config: ModelConfig, work: Work) -> float:
    """Bytes at work at a time, at most: the streams' gradients, a sub-layer's own, one chunk's logits or scores."""
    wide, hidden, moe = 2 if work.precision == "bf16" else 4, config.hidden_size, config.moe
    streams = 3 * 4 * config.num_streams * hidden * work.tokens
    sublayers, chunks = [2 * 4 * hidden * work.tokens], [max(LOGITS_BYTES, 4 * config.vocab_size // work.tensor)]
    words = {*expand_mix(config.attention_mix), *[config.mtp.attention] * config.mtp.num_layers}
    for layer in map(config.layer, sorted(words)):
        sublayers.append(wide * 3 * _query_width(layer) // work.tensor * work.tokens)
        chunks.append(_chunk_bytes(config, layer, work))
    if "moe" in config.ffn_kinds:  # rows of a token's experts, their gradients, and what comes of both
        sublayers.append(wide * 3 * moe.top_k * hidden * work.tokens)
    return streams + max(sublayers) + max(chunks)


def attention(config: ModelConfig, layer: LayerAttention, work: Work) -> Kept:
    """What the attention of one layer keeps, its normalised input included."""
    kind, options, hidden = layer.kind, layer.options, config.hidden_size
    if kind in ("mha", "mqa", "gqa"):
        heads, groups, width = options.num_heads / work.tensor, layer.num_kv_heads / work.tensor, options.head_dim
        groups = max(1, groups)
        norms = heads + groups if options.qk_norm else 0  # their inputs, and a number a head
        inputs = 3 * hidden if work.precision == "bf16" else hidden  # each projection casts its own
        own = inputs + 2 * heads * width + 2 * groups * width + norms * width
        kept = Kept(narrow=own, full=heads + norms + options.rope_dim)
        keys = _local_keys(work, options.window, options.dilation, options.num_heads / layer.num_kv_heads)
        return kept.times(work.tokens) + _weights(config, work, heads, [keys])
    if kind in ("mla", "dsa"):
        return _latent_attention(config, layer, work)
    heads, width = options.num_heads / work.tensor, options.head_dim
    turned = 0 if _forgets(config, work) else heads * width
    own = hidden + 2 * options.q_lora_rank + 2 * heads * width + turned + 2 * width
    own += options.o_groups * options.o_lora_rank / work.tensor
    kept = Kept(narrow=own, full=2 * heads + 2 + options.rope_dim)
    terms, gathered = [_local_keys(work, options.window, 1, heads)], 0
    if kind != "swa":
        ratio = options.csa_compression if kind == "csa" else options.hca_compression
        entries = work.sequence_length // ratio
        kept += _compressor(width, ratio, 2 if kind == "csa" else 1, work)
        terms.append(entries)
        if kind == "csa":
            indexer = options.indexer
            kept += _compressor(indexer.head_dim, ratio, 2, work) + _index(indexer, entries, ratio, work)
            gathered = _gathered(indexer, entries, width)
    return kept.times(work.tokens) + _weights(config, work, heads, terms, gathered)


def _rest(config: ModelConfig, ffn: str, hashed: bool, work: Work, narrow: bool) -> Kept:
    """A block without its attention: both sites of the residual connection, norms, FFN."""
    hidden, streams, kind = config.hidden_size, config.num_streams, config.residual.kind
    sites = Kept(full=2)  # of the norms
    if kind == "plain":
        sites += _hidden(hidden, narrow)  # streams between the sub-layers
    else:
        iterations = config.residual.sinkhorn_iterations
        coefficients = (4 + 3 * streams) * streams + 1 + (2 * iterations - 1) * streams
        if kind == "hc":
            coefficients = 5 * (2 + streams) * streams + streams * hidden
        forgets = _forgets(config, work)
        between = 0 if forgets else streams * hidden
        inputs = 0 if forgets else 2 * hidden
        sites += Kept(full=2 * coefficients) + _hidden(between + inputs + 2 * hidden, narrow)  # and both outputs
        if forgets:  # the normalised inputs too, which the sub-layers count; what was cast of them stays
            casts = work.precision == "bf16"
            sites += Kept(full=-hidden if ffn == "moe" else 0)
            sites += Kept(narrow=0 if casts else -hidden * (1 if ffn == "moe" else 2))
    return (sites + _ffn(config, ffn, hashed, work, narrow)).times(work.tokens)


def _ffn(config: ModelConfig, ffn: str, hashed: bool, work: Work, narrow: bool) -> Kept:
    """A token's."""
    hidden, moe = config.hidden_size, config.moe
    if ffn == "dense":
        return Kept(narrow=3 * config.ffn.intermediate_size / work.tensor + hidden)
    inner, choices = moe.intermediate_size / work.tensor, moe.top_k
    router = (1 if hashed else 3) + (moe.scoring == "sqrtsoftplus")
    kept = Kept(full=hidden + router * moe.num_experts + 5 * choices, wide=6 * choices)
    if work.precision == "bf16":  # beside the router's input in fp32
        kept += Kept(narrow=hidden)
    if moe.num_shared_experts:
        kept += Kept(narrow=3 * inner * moe.num_shared_experts)
    if keeps_expert_products(config, work):
        kept += Kept(narrow=2 * inner * choices)
    if work.expert > 1:  # rows that came from other ranks
        kept += Kept(narrow=choices * hidden, wide=3 * choices)
    return kept


def keeps_expert_products(config: ModelConfig, work: Work) -> bool:
    """Whether backward finds the experts' first product kept (model/moe/experts.py): but in large fp32 micro-batches.

    That is on a CPU; on a GPU it is kept always, where large runs are in bf16.
    """
    return work.precision == "bf16" or config.hidden_size * work.tokens < FORGET_FROM


def _forgets(config: ModelConfig, work: Work) -> bool:
    """Whether what `recompute.forget` frees is computed again (model/recompute.py)."""
    large = config.hidden_size * work.tokens >= FORGET_FROM
    return large and config.residual.kind != "plain" and work.recompute == "none" and work.zero_stage < 3


def _latent_attention(config: ModelConfig, layer: LayerAttention, work: Work) -> Kept:
    options: MLAConfig = layer.options
    heads, latent, rope = options.num_heads / work.tensor, options.kv_lora_rank, options.rope_dim
    query = heads * (options.nope_dim + rope)
    own = config.hidden_size + 2 * options.q_lora_rank + 2 * latent + heads * options.value_dim
    keys, full = _local_keys(work, options.window, options.dilation, 1), heads + 2 + rope
    if layer.kind == "mla":  # keys and values of every head
        kept = Kept(narrow=own + 2 * query + heads * options.value_dim, full=full)
        return kept.times(work.tokens) + _weights(config, work, heads, [keys])
    indexer = config.attention.dsa
    # Absorbed: queries before and in the latent's space, and what comes of it
    absorbed = heads * options.nope_dim + heads * (latent + rope) + heads * latent + latent + rope
    kept = Kept(narrow=own + absorbed, full=full)
    kept += _index(indexer, work.sequence_length, 1, work) + Kept(narrow=2 * indexer.head_dim)
    gathered = _gathered(indexer, work.sequence_length, latent + rope)
    return kept.times(work.tokens) + _weights(config, work, heads, [work.sequence_length], gathered)


def _compressor(width: int, ratio: int, parts: int, work: Work) -> Kept:
    """A token's: values and softmax of the blocks, laid out twice with overlap; the entries and their norm's input."""
    cast = parts * width if work.precision == "bf16" else 0
    return Kept(narrow=parts * width + cast + 2 * width / ratio, full=parts * width)


def _index(indexer: IndexerConfig, entries: int, ratio: int, work: Work) -> Kept:
    """A token's: gradients of queries, keys and head weights, made in forward; int32 entries that were selected."""
    heads = indexer.num_heads / work.tensor
    chosen = min(indexer.top_k, entries)
    return Kept(narrow=heads * (indexer.head_dim + 1) + indexer.head_dim / ratio, full=chosen)


def _local_keys(work: Work, window: int | None, dilation: int, heads_per_key: float) -> int:
    """Keys that a query is multiplied with: all in reach, or block by block those of a window."""
    if window is None:
        return work.sequence_length
    block = max(LEAST_BLOCK, int(BLOCK_ROWS // heads_per_key))
    if dilation > 1 or work.length < 2 * block:
        return work.sequence_length
    return block * (1 - (-(window - 1) // block))


def _gathered(indexer: IndexerConfig, entries: int, width: int) -> int:
    """Numbers that are gathered for a query, 0 where all entries are multiplied and masked."""
    return indexer.top_k * width if entries >= GATHER_FROM * indexer.top_k else 0


def _weights(config: ModelConfig, work: Work, heads: float, terms: list[int], gathered: int = 0) -> Kept:
    """Weights of the attention that are kept where one chunk of queries is the whole row, term by term unless large."""
    chunk = config.attention.query_chunk
    if gathered:
        chunk = min(chunk, GATHERED // (work.rows * gathered))
    if work.sequence_length > chunk or work.context > 1:
        return Kept()
    sizes = (work.tokens * heads * keys for keys in terms)
    return Kept(full=sum(size + work.tokens * heads for size in sizes if size <= HELD))


def _chunk_bytes(config: ModelConfig, layer: LayerAttention, work: Work) -> float:
    """Bytes of the logits of one chunk of queries, and of the indexer's products, which come to three times as much."""
    queries, options, kind = min(config.attention.query_chunk, work.length), layer.options, layer.kind
    heads, length = options.num_heads / work.tensor, work.sequence_length
    indexer, ratio = None, 1
    if kind in ("swa", "csa", "hca"):
        keys = _local_keys(work, options.window, 1, heads)
        if kind != "swa":
            ratio = options.csa_compression if kind == "csa" else options.hca_compression
            indexer = options.indexer if kind == "csa" else None
            keys = max(keys, length // ratio)
    else:
        keys = length if kind == "dsa" else _local_keys(work, options.window, options.dilation, 1)
        indexer = config.attention.dsa if kind == "dsa" else None
    if indexer is None:
        return 4 * 2 * min(work.rows * queries * heads * keys, HELD)
    scored = min(length // ratio, ENTRIES_AT_ONCE)
    products = work.rows * queries * indexer.num_heads / work.tensor * scored
    return 4 * (3 * products + 2 * HELD)


def _query_width(layer: LayerAttention) -> int:
    """Numbers of all heads' queries and outputs of one token, at most."""
    options = layer.options
    if layer.kind == "dsa":
        return options.num_heads * (options.kv_lora_rank + options.rope_dim)
    if layer.kind == "mla":
        return options.num_heads * (options.nope_dim + options.rope_dim)
    return options.num_heads * options.head_dim
