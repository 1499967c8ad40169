"""Training FLOPs per token, in closed form (a multiply-add is 2 FLOPs; backward costs twice the forward).

Counted: every matrix product that a token passes, and the attention over what it sees on average in a full sequence.
Not counted: elementwise work, softmax, Sinkhorn.
"""

from v4train.model.config import ModelConfig


def active_matrix_parameters(config: ModelConfig) -> int:
    """Matrix elements that one token is multiplied with, MTP block and both uses of the output matrix included."""
    hidden = config.hidden_size
    blocks = sum(_block(config, kind) for kind in config.layer_kinds)
    head = config.vocab_size * hidden + _collapse(config)
    mtp = config.mtp.num_layers * (2 * hidden * hidden + _block(config, "swa") + head)
    # The hidden projection of MTP runs once a stream.
    mtp += config.mtp.num_layers * (config.num_streams - 1) * hidden * hidden
    return blocks + head + mtp


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per trained token, at the mean visibility of one document a sequence."""
    kinds = [*config.layer_kinds, *["swa"] * config.mtp.num_layers]
    core = sum(_attention_core(config, kind, sequence_length) for kind in kinds)
    return 3 * (2 * active_matrix_parameters(config) + core)


def _block(config: ModelConfig, kind: str) -> int:
    attention, moe, hidden = config.attention, config.moe, config.hidden_size
    width = attention.num_heads * attention.head_dim
    size = hidden * attention.q_lora_rank + attention.q_lora_rank * width + hidden * attention.head_dim
    size += width * attention.o_lora_rank + attention.o_groups * attention.o_lora_rank * hidden
    if kind == "hca":
        size += 2 * hidden * attention.head_dim
    if kind == "csa":
        indexer = attention.indexer
        size += 4 * hidden * (attention.head_dim + indexer.head_dim)
        size += attention.q_lora_rank * indexer.num_heads * indexer.head_dim + hidden * indexer.num_heads
    size += hidden * moe.num_experts  # router
    size += 3 * hidden * moe.intermediate_size * (moe.top_k + moe.num_shared_experts)
    if config.residual.kind == "mhc":
        streams = config.residual.num_streams
        size += 2 * (2 + streams) * streams * streams * hidden
    return size


def _collapse(config: ModelConfig) -> int:
    streams = config.residual.num_streams
    return streams * streams * config.hidden_size if config.residual.kind == "mhc" else 0


def _attention_core(config: ModelConfig, kind: str, length: int) -> float:
    """Forward FLOPs of one query: scores and weighted sum over what it sees, and the indexer's scores."""
    attention, indexer = config.attention, config.attention.indexer
    seen = _mean_visible(length, 1, attention.window)
    scored = 0.0
    if kind == "hca":
        seen += _mean_visible(length, attention.hca_compression)
    if kind == "csa":
        seen += _mean_visible(length, attention.csa_compression, indexer.top_k)
        scored = _mean_visible(length, attention.csa_compression)
    return 4 * attention.num_heads * attention.head_dim * seen + 2 * indexer.num_heads * indexer.head_dim * scored


def _mean_visible(length: int, ratio: int, limit: int | None = None) -> float:
    """Mean over t of min(floor((t + 1) / ratio), limit)."""
    full = length // ratio
    limit = full if limit is None else min(limit, full)
    # floor((t + 1) / ratio) takes each value v = 1..full for `ratio` positions, the last for length % ratio + 1.
    total = ratio * limit * (limit - 1) / 2 + limit * (length - ratio * limit + 1) if limit else 0
    return total / length
