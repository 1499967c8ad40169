"""What the ranks of a layout send each other in a training step, in closed form.

Counted in bytes that all ranks together hand to the network in `precision=fp32`, with the algorithms that send least:
of n numbers, g ranks send 2 n (g - 1) to sum them everywhere, n (g - 1) to gather or scatter them (n being the whole),
and an exchange or a message what leaves a rank. Not counted: scalars, loads of experts, counts of targets.

    tensor     in forward sums of what each share gives, in backward of the gradients of what all shares read;
               index scores and the indexer's teacher in forward
    context    tokens before a shard, gathered keys or entries, documents; the gradients of all but these back
    expert     rows there and back, and their gradients; on average, as if all experts had the same load
    pipeline   streams, with token ids, documents and targets, and the gradient of the streams back
    gradients  of parameters, summed over the ranks that have them; what ZeRO gathers

`v4train.parallel.traffic` counts the same in a run.

Symbols: B rows of a micro-batch, S tokens of a row on a rank, M hidden, C streams, V vocabulary, D head width.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from v4train.analysis.work import Work
from v4train.model.config import GATHER_FROM, MEASURED_ENTRIES, GQAConfig, LayerAttention, MLAConfig, ModelConfig

BYTES = 4  # of a number that is sent: fp32
ID_BYTES = 8  # of a token id


class Sent(NamedTuple):
    """Numbers that one group of ranks sends in the forward and in the backward pass of a micro-batch."""

    forward: float = 0
    backward: float = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.forward + other.forward, self.backward + other.backward)

    def again(self, recomputed: bool) -> float:
        """In both, with the forward pass done once more where it is recomputed."""
        return self.forward * (2 if recomputed else 1) + self.backward


def activation_bytes(config: ModelConfig, work: Work) -> dict[str, float]:
    """Bytes that all ranks send in a step along `tensor`, `context`, `expert` and `pipeline`, in sparse training."""
    total: Counter[str] = Counter()
    for part in _parts(config, work):
        total.update(part)
    groups = {
        "tensor": work.data * work.context,
        "context": work.data * work.tensor,
        "expert": work.data * work.context // work.expert * work.tensor,
        "pipeline": work.data * work.context * work.tensor,
    }
    sent = {axis: work.accumulation * BYTES * groups[axis] * total[axis] for axis in groups}
    # Documents of whole rows are known to every stage, MTP's to the last
    documents = work.tokens * (work.pipeline + config.mtp.num_layers) * _others(work.context)
    sent["context"] += work.accumulation * ID_BYTES * groups["context"] * documents
    shared = config.mtp.num_layers or config.tie_embedding
    if shared and work.pipeline > 1:  # once a step the embedding's gradients are summed, and it is sent
        embedding = config.vocab_size * config.hidden_size // work.tensor
        sent["pipeline"] += BYTES * groups["pipeline"] * 3 * embedding
    return sent


def gradient_bytes(
    parameters: int, replicas: int, zero_stage: int, accumulation: int = 1, matrices: int | None = None
) -> float:
    """Bytes that `replicas` ranks send in a step for parameters that each of them trains, by DeepSpeed 0.19.8's ways.

    Stages 0 to 2 sum gradients everywhere, stage 2 those of each micro-batch, and 1 and 2 gather what each rank has
    updated. Stage 3 gathers parameters for the forward and the backward pass of each micro-batch: at most, since it
    keeps some in between. It sums gradients where they belong; with Muon everywhere, and gathers gradients and momenta
    of its `matrices` before and after their updates. matrices: elements that are Muon's; None without Muon.
    """
    times = {0: 2, 1: 3, 2: 2 * accumulation + 1, 3: (3 if matrices is None else 4) * accumulation}[zero_stage]
    gathered = 4 * (matrices or 0) if zero_stage == 3 else 0
    return (times * parameters + gathered) * (replicas - 1) * BYTES


def muon_bytes(parameters: int, shares: int, replicas: int, zero_stage: int) -> float:
    """Bytes sent in a step to orthogonalise cut matrices of so many elements whole: each of `shares` ranks gets all.

    In stage 0 each of `replicas` ranks does so, in the others one of them.
    """
    return parameters * (shares - 1) * BYTES * (1 if zero_stage else replicas)


def _parts(config: ModelConfig, work: Work) -> Iterator[dict[str, float]]:
    """Numbers that one group of each axis sends in a micro-batch, for every part of the model."""
    tokens, hidden = work.tokens, config.hidden_size
    blocks = [*zip(config.layers, config.ffn_kinds, strict=True)]
    blocks += [(config.mtp_layer, config.mtp_ffn)] * config.mtp.num_layers
    looked_up = 1 + config.mtp.num_layers
    yield {"tensor": looked_up * _summed(tokens * hidden, work.tensor)}
    # The head: what it reads, in backward; log-sum-exp and logit of the target
    yield {"tensor": looked_up * (_summed(tokens * (hidden + 1), work.tensor) + tokens * _others(work.tensor))}
    for index, (layer, ffn) in enumerate(blocks):
        hashed = index < config.moe.num_hash_layers
        attention, rest = _attention(config, layer, work), _ffn(config, ffn, hashed, work)
        whole = work.recompute == "block"
        for axis in ("tensor", "context", "expert"):
            sent = attention.get(axis, Sent()).again(whole or work.recompute == "attention")
            yield {axis: sent + rest.get(axis, Sent()).again(whole)}
    ahead = 2 * work.rows if work.context > 1 else 0  # a shard's look-ahead
    ids = (3 * tokens + ahead) * ID_BYTES / BYTES
    yield {"pipeline": (work.pipeline - 1) * (2 * tokens * config.num_streams * hidden + ids)}


def _summed(numbers: float, ranks: int) -> float:
    return 2 * numbers * (ranks - 1)


def _others(ranks: int) -> int:
    """How many ranks in all a number of each of `ranks` goes to."""
    return ranks * (ranks - 1)


def _ffn(config: ModelConfig, kind: str, hashed: bool, work: Work) -> dict[str, Sent]:
    tokens, hidden, moe = work.tokens, config.hidden_size, config.moe
    result = _summed(tokens * hidden, work.tensor)
    if kind == "dense":
        return {"tensor": Sent(result, result)}
    weights = _summed(tokens * moe.top_k, work.tensor)
    rows = tokens * moe.top_k * (work.expert - 1)  # of all ranks of a group
    there_and_back = rows * (2 * hidden + 1)  # with the expert's weight
    sent = {"tensor": Sent(result, result + weights), "expert": Sent(there_and_back, there_and_back)}
    if not hashed:  # balance of whole rows: chosen and affinity of every expert
        share = _summed(work.rows * moe.num_experts, work.context)
        sent["context"] = Sent(2 * share, share)
    return sent


def _attention(config: ModelConfig, layer: LayerAttention, work: Work) -> dict[str, Sent]:
    options, kind, tokens = layer.options, layer.kind, work.tokens
    result = _summed(tokens * config.hidden_size, work.tensor)
    if kind in ("mha", "mqa", "gqa"):
        width = 2 * layer.num_kv_heads * options.head_dim
        context = _before(work, _reach(options), 2 * max(1, layer.num_kv_heads // work.tensor) * options.head_dim)
        read = tokens * config.hidden_size
        if layer.num_kv_heads % work.tensor:  # all shares have all keys and values
            read += tokens * width
        return {"tensor": Sent(result, _summed(read, work.tensor)), "context": context}
    if kind in ("mla", "dsa"):
        width = options.kv_lora_rank + options.rope_dim
        reach = None if kind == "dsa" else _reach(options)
        seen = _with_tokens_before(work, reach)
        read = _summed(tokens * options.q_lora_rank + seen * width, work.tensor)
        sent = {"tensor": Sent(result, read), "context": _before(work, reach, width)}
        if kind == "dsa":
            indexer = config.attention.dsa
            sent["context"] += _before(work, None, indexer.head_dim)
            sent["tensor"] += _indexer(config, layer, work, 1, indexer.head_dim)
        return sent
    seen = _with_tokens_before(work, options.window - 1)
    read = tokens * options.q_lora_rank + seen * options.head_dim
    sent = {"context": _before(work, options.window - 1, options.head_dim)}
    if kind != "swa":
        overlaps = kind == "csa"
        ratio = options.csa_compression if overlaps else options.hca_compression
        entries = work.sequence_length // ratio
        before, parts = (2 * ratio - 1, 2) if overlaps else (ratio - 1, 1)
        widths = options.head_dim + (options.indexer.head_dim if overlaps else 0)
        sent["context"] += _before(work, before, 2 * parts * widths)
        sent["context"] += _gathered(work, work.rows * -(-work.length // ratio) * widths)
        read += work.rows * entries * options.head_dim
    sent["tensor"] = Sent(result, _summed(read, work.tensor))
    if kind == "csa":
        sent["tensor"] += _indexer(config, layer, work, ratio, options.indexer.head_dim)
    return sent


def _indexer(config: ModelConfig, layer: LayerAttention, work: Work, ratio: int, key_width: int) -> Sent:
    """Scores and teacher, of a document as long as the row; an entry every `ratio` tokens.

    Forward: scores of all entries that a chunk of queries reaches; where that is many times what is selected, scores of
    the selected ones once more, for the loss. The teacher for those that the loss compares, and for all in reach of
    some queries, for the recall. Backward: the gradient of the keys.
    """
    top_k = (config.attention.indexer if layer.kind == "csa" else config.attention.dsa).top_k
    entries, chunk = work.sequence_length // ratio, config.attention.query_chunk
    step = -(-entries // MEASURED_ENTRIES)
    forward = 0.0
    for begin in range(0, work.sequence_length, chunk):
        stop = min(begin + chunk, work.sequence_length)
        queries, reach = stop - begin, stop // ratio
        forward += queries * (reach + (reach / step if reach > top_k else 0))
        forward += queries * (2 * top_k if reach >= GATHER_FROM * top_k else reach)
    return Sent(
        _summed(work.rows / work.context * forward, work.tensor),
        _summed(work.rows * entries * key_width, work.tensor),
    )


def _reach(options: GQAConfig | MLAConfig) -> int | None:
    """How many tokens before itself a query may look at; None is all."""
    return None if options.window is None or options.global_tokens else (options.window - 1) * options.dilation


def _with_tokens_before(work: Work, reach: int | None) -> float:
    """Tokens of a micro-batch on a rank, on average, with those that other ranks have and that it needs."""
    before = [index * work.length for index in range(work.context)]
    before = before if reach is None else [min(tokens, reach) for tokens in before]
    return work.rows * (work.length + sum(before) / work.context)


def _before(work: Work, count: int | None, width: int) -> Sent:
    """Tokens of earlier shards: from the rank before, or gathered where that has too few of them."""
    if count == 0 or work.context == 1:
        return Sent()
    if count is None or count > work.length:
        return _gathered(work, work.tokens * width)
    sent = work.rows * count * width * (work.context - 1)
    return Sent(sent, sent)


def _gathered(work: Work, own: float) -> Sent:
    """What every rank has `own` numbers of, on all of them; its gradient, summed, on the one that has it."""
    sent = own * _others(work.context)
    return Sent(sent, sent)
