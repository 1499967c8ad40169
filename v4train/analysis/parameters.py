"""Every parameter of a model by its canonical name and shape, without making one; counts and shares follow from these.

Symbols: V vocabulary, M hidden, C streams, H heads, D head width, E experts, I inner width.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

from v4train.analysis.stages import stage_bounds
from v4train.analysis.work import Work
from v4train.model.config import AttentionConfig, GQAConfig, LayerAttention, MLAConfig, ModelConfig

PARTS = ("embedding", "attention", "compressors", "indexers", "dense", "routers", "experts", "shared", "residual")
PARTS += ("norms", "head", "mtp")


@dataclass(frozen=True)
class Parameter:
    """One tensor.

    cut: dimension along which tensor parallelism cuts it, None where every rank has all of it; `pieces`: where these
    are fewer than the ranks, or don't divide among them, it stays whole.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None = None
    pieces: int | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name

    @property
    def is_matrix(self) -> bool:
        """Whether it is Muon's with `optimizer=muon`: a stack of matrices, but no embedding, head or bias."""
        excluded = "embed" in self.name or "lm_head" in self.name or self.name.endswith("bias")
        return len(self.shape) > 1 and not excluded

    def size_on_rank(self, work: Work) -> int:
        """Elements that one rank holds of it, before ZeRO."""
        cut = self.cut is not None and (self.pieces or work.tensor) % work.tensor == 0
        return self.size // (work.tensor if cut else 1) // (work.expert if self.is_expert else 1)

    @property
    def part(self) -> str:
        """Which of PARTS it counts to."""
        name = self.name
        if name.startswith("mtp."):
            return "mtp"
        for word, part in _WORDS:
            if word in name:
                return part
        raise ValueError(f"{name} belongs to no part")


# In this order: an indexer's compressor is the indexer's, a compressor's norm is the compressor's
_WORDS = (
    ("embedding.", "embedding"),
    ("lm_head", "head"),
    ("residual.", "residual"),
    ("output_norm.collapse", "residual"),
    (".indexer.", "indexers"),
    (".compressor.", "compressors"),
    (".attention.", "attention"),
    ("norm.", "norms"),
    (".router.", "routers"),
    (".experts.", "experts"),
    (".shared.", "shared"),
    (".ffn.", "dense"),
)


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """All of them, MTP's last. A tied output matrix is the embedding, and no parameter of its own."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Parameter("embedding.lookup.weight", vocabulary, 0)
    for index, (layer, ffn) in enumerate(zip(config.layers, config.ffn_kinds, strict=True)):
        yield from _block(f"blocks.{index}.", config, layer, ffn, index < config.moe.num_hash_layers)
    yield from _output_norm("head.", config)
    if not config.tie_embedding:
        yield Parameter("head.lm_head.weight", vocabulary, 0)
    if config.mtp.num_layers:
        hidden = config.hidden_size
        yield from (Parameter(f"mtp.{of}_norm.weight", (hidden,)) for of in ("token", "hidden"))
        yield from (Parameter(f"mtp.{of}_projection.weight", (hidden, hidden)) for of in ("token", "hidden"))
        yield from _block("mtp.block.", config, config.mtp_layer, config.mtp_ffn, hashed=False)
        yield from _output_norm("mtp.", config)


def counts_by_part(config: ModelConfig) -> dict[str, int]:
    """Elements of each of PARTS, those that it has."""
    total = Counter()
    for parameter in parameters(config):
        total[parameter.part] += parameter.size
    return {part: total[part] for part in PARTS if total[part]}


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """(total, active for a token) without the MTP block.

    Active leaves out the input embedding and the experts that a token is not sent to, and keeps the output matrix:
    the V4 report's convention (V4.md 1.3: 284 B / 13 B, 1.6 T / 49 B).
    """
    parts = counts_by_part(config)
    total = sum(parts.values()) - parts.get("mtp", 0)
    experts = parts.get("experts", 0)
    active = total - experts + experts // config.moe.num_experts * config.moe.top_k
    return total, active - (0 if config.tie_embedding else parts["embedding"])


@dataclass
class MuonGroup:
    """Matrices whose updates Muon makes together (optim/param_groups.py), in elements that a rank holds before ZeRO."""

    expert: bool
    size: int = 0
    whole: int = 0  # the same where tensor parallelism cuts no matrix: Muon gathers those
    matrix: int = 0  # the largest
    shapes: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (short, long): whole ones, of one tensor

    def add(self, parameter: Parameter, size: int, whole: int) -> None:
        short, long = sorted(parameter.shape[-2:])
        self.size += size
        self.whole += whole
        self.matrix = max(self.matrix, short * long)
        of_shape = self.shapes.setdefault((short, long), [0, 0])
        of_shape[0] += whole
        of_shape[1] = max(of_shape[1], whole)


@dataclass
class Share:
    """Elements that a rank holds, before ZeRO; `experts` of them are experts', which fewer ranks have copies of."""

    units: slice  # its stage's, of those that `stage_bounds` cuts
    size: int = 0
    largest: int = 0  # tensor
    experts: int = 0
    matrices: int = 0  # Muon's with `optimizer=muon`
    expert_matrices: int = 0
    cut_matrices: int = 0  # Muon's that tensor parallelism cuts, other than between matrices of a stack
    cut_expert_matrices: int = 0
    cast: int = 0  # multiplied in bf16 under autocast, by way of a copy
    newton_schulz: float = 0.0  # FLOPs of one iteration on all of its matrices, whole ones where they are cut
    groups: dict[tuple, MuonGroup] = field(default_factory=dict)
    by_unit: Counter[int] = field(default_factory=Counter)

    def add(self, parameter: Parameter, unit: int, work: Work) -> None:
        size, expert, matrix = parameter.size_on_rank(work), parameter.is_expert, parameter.is_matrix
        self.size += size
        self.largest = max(self.largest, size)
        self.by_unit[unit] += size
        self.experts += size * expert
        if not matrix:
            return
        cut = work.tensor > 1 and parameter.cut is not None and parameter.cut >= len(parameter.shape) - 2
        whole = size * (work.tensor if cut else 1)
        self.matrices += size
        self.expert_matrices += size * expert
        self.cut_matrices += size * cut
        self.cut_expert_matrices += size * cut * expert
        # Experts are cast block by block, routers and coefficients of the streams stay fp32
        self.cast += 0 if expert or parameter.part in ("routers", "residual") else size
        short, long = sorted(parameter.shape[-2:])
        self.newton_schulz += whole / (short * long) * (4 * short * short * long + 2 * short**3)
        shared_out = expert and work.expert > 1
        along = parameter.cut - len(parameter.shape) if work.tensor > 1 and parameter.cut is not None else None
        key = (parameter.shape[-2:] if "residual." in parameter.name else None, "indexer" in parameter.name)
        self.groups.setdefault((*key, shared_out, along), MuonGroup(shared_out)).add(parameter, size, whole)


def stage_shares(config: ModelConfig, work: Work) -> list[Share]:
    """What a rank of each pipeline stage trains. See `copied_embedding` for what the last one holds beside that."""
    bounds = stage_bounds(config, work.stage_length or work.sequence_length, work.pipeline)
    stages = [Share(slice(begin, end)) for begin, end in pairwise(bounds)]
    for parameter in parameters(config):
        unit = _unit(parameter.name, config)
        stages[bisect(bounds, unit) - 1].add(parameter, unit, work)
    return stages


def copied_embedding(config: ModelConfig, work: Work) -> int:
    """Elements of the embedding that a rank of the last stage has too, where MTP or a tied head reads it there."""
    shared = work.pipeline > 1 and (config.mtp.num_layers or config.tie_embedding)
    return config.vocab_size * config.hidden_size // work.tensor if shared else 0


def _unit(name: str, config: ModelConfig) -> int:
    """Its place in the list that stages are cut from: embedding, blocks, head with MTP."""
    section, _, rest = name.partition(".")
    if section == "blocks":
        return 1 + int(rest.partition(".")[0])
    return 0 if section == "embedding" else config.num_layers + 1


def _block(prefix: str, config: ModelConfig, layer: LayerAttention, ffn: str, hashed: bool) -> Iterator[Parameter]:
    yield from _residual(f"{prefix}attention_residual.", config)
    yield Parameter(f"{prefix}attention_norm.weight", (config.hidden_size,))
    yield from _attention(f"{prefix}attention.", config, layer)
    yield from _residual(f"{prefix}ffn_residual.", config)
    yield Parameter(f"{prefix}ffn_norm.weight", (config.hidden_size,))
    if ffn == "dense":
        yield from _swiglu(f"{prefix}ffn.", config.hidden_size, config.ffn.intermediate_size)
    else:
        yield from _moe(f"{prefix}ffn.", config, hashed)


def _residual(prefix: str, config: ModelConfig) -> Iterator[Parameter]:
    streams, hidden, kind = config.num_streams, config.hidden_size, config.residual.kind
    if kind == "plain":
        return
    rows = (2 + streams) * (streams if kind == "mhc" else 1)  # hc: those of one stream
    yield Parameter(f"{prefix}projection", (rows, streams * hidden if kind == "mhc" else hidden))
    yield Parameter(f"{prefix}static_bias", ((2 + streams) * streams,))
    yield Parameter(f"{prefix}gates", (3,))


def _output_norm(prefix: str, config: ModelConfig) -> Iterator[Parameter]:
    streams, hidden = config.num_streams, config.hidden_size
    if config.residual.kind == "mhc":
        yield Parameter(f"{prefix}output_norm.collapse.projection", (streams, streams * hidden))
        yield Parameter(f"{prefix}output_norm.collapse.static_bias", (streams,))
        yield Parameter(f"{prefix}output_norm.collapse.gates", (1,))
    yield Parameter(f"{prefix}output_norm.norm.weight", (hidden,))


def _swiglu(prefix: str, hidden: int, inner: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}gate_up.weight", (2, inner, hidden), 1)
    yield Parameter(f"{prefix}down.weight", (hidden, inner), 1)


def _moe(prefix: str, config: ModelConfig, hashed: bool) -> Iterator[Parameter]:
    moe, hidden = config.moe, config.hidden_size
    experts, inner = moe.num_experts, moe.intermediate_size
    yield Parameter(f"{prefix}router.weight", (experts, hidden))
    if moe.router_bias and not hashed:
        yield Parameter(f"{prefix}router.logit_bias", (experts,))
    yield Parameter(f"{prefix}experts.gate_up", (experts, 2, inner, hidden), 2)
    yield Parameter(f"{prefix}experts.down", (experts, hidden, inner), 2)
    if moe.expert_bias:
        yield Parameter(f"{prefix}experts.gate_up_bias", (experts, 2, inner), 2)
        yield Parameter(f"{prefix}experts.down_bias", (experts, hidden), 1)
    if moe.num_shared_experts:
        yield from _swiglu(f"{prefix}shared.", hidden, inner * moe.num_shared_experts)


def _attention(prefix: str, config: ModelConfig, layer: LayerAttention) -> Iterator[Parameter]:
    hidden, options = config.hidden_size, layer.options
    if layer.kind in ("mha", "mqa", "gqa"):
        yield from _gqa(prefix, hidden, options, layer.num_kv_heads)
    elif layer.kind in ("mla", "dsa"):
        yield from _mla(prefix, hidden, options)
        if layer.kind == "dsa":
            indexer, name = config.attention.dsa, f"{prefix}indexer."
            yield Parameter(f"{name}query.weight", (indexer.num_heads * indexer.head_dim, options.q_lora_rank), 0)
            yield Parameter(f"{name}key.weight", (indexer.head_dim, hidden))
            yield Parameter(f"{name}key_norm.weight", (indexer.head_dim,))
            yield Parameter(f"{name}key_norm.bias", (indexer.head_dim,))
            yield Parameter(f"{name}head_weight.weight", (indexer.num_heads, hidden), 0)
    else:
        yield from _shared_kv(prefix, hidden, options)
        if layer.kind == "csa":
            yield from _compressor(f"{prefix}compressor.", hidden, options.head_dim, options.csa_compression, 2)
            indexer, name = options.indexer, f"{prefix}indexer."
            yield from _compressor(f"{name}compressor.", hidden, indexer.head_dim, options.csa_compression, 2)
            yield Parameter(f"{name}query.weight", (indexer.num_heads * indexer.head_dim, options.q_lora_rank), 0)
            yield Parameter(f"{name}head_weight.weight", (indexer.num_heads, hidden), 0)
        elif layer.kind == "hca":
            yield from _compressor(f"{prefix}compressor.", hidden, options.head_dim, options.hca_compression, 1)


def _gqa(prefix: str, hidden: int, options: GQAConfig, kv_heads: int) -> Iterator[Parameter]:
    width = options.num_heads * options.head_dim
    for name, heads in (("query", options.num_heads), ("key", kv_heads), ("value", kv_heads)):
        pieces = None if name == "query" else kv_heads
        yield Parameter(f"{prefix}{name}.weight", (heads * options.head_dim, hidden), 0, pieces)
        if options.bias:
            yield Parameter(f"{prefix}{name}.bias", (heads * options.head_dim,), 0, pieces)
    yield Parameter(f"{prefix}output.weight", (hidden, width), 1)
    if options.bias:
        yield Parameter(f"{prefix}output.bias", (hidden,))
    if options.qk_norm:
        yield from (Parameter(f"{prefix}{of}_norm.weight", (options.head_dim,)) for of in ("query", "key"))
    if options.sink:
        yield Parameter(f"{prefix}sink", (options.num_heads,), 0)


def _mla(prefix: str, hidden: int, options: MLAConfig) -> Iterator[Parameter]:
    heads, latent, width = options.num_heads, options.kv_lora_rank, options.nope_dim + options.rope_dim
    yield Parameter(f"{prefix}query_down.weight", (options.q_lora_rank, hidden))
    yield Parameter(f"{prefix}query_norm.weight", (options.q_lora_rank,))
    yield Parameter(f"{prefix}query_up.weight", (heads * width, options.q_lora_rank), 0)
    yield Parameter(f"{prefix}kv_down.weight", (latent, hidden))
    yield Parameter(f"{prefix}kv_norm.weight", (latent,))
    yield Parameter(f"{prefix}rope_key.weight", (options.rope_dim, hidden))
    yield Parameter(f"{prefix}key_up.weight", (heads * options.nope_dim, latent), 0)
    yield Parameter(f"{prefix}value_up.weight", (heads * options.value_dim, latent), 0)
    yield Parameter(f"{prefix}output.weight", (hidden, heads * options.value_dim), 1)
    if options.sink:
        yield Parameter(f"{prefix}sink", (heads,), 0)


def _shared_kv(prefix: str, hidden: int, options: AttentionConfig) -> Iterator[Parameter]:
    width, groups = options.num_heads * options.head_dim, options.o_groups
    yield Parameter(f"{prefix}sink", (options.num_heads,), 0)
    yield Parameter(f"{prefix}query_down.weight", (options.q_lora_rank, hidden))
    yield Parameter(f"{prefix}query_norm.weight", (options.q_lora_rank,))
    yield Parameter(f"{prefix}query_up.weight", (width, options.q_lora_rank), 0)
    yield Parameter(f"{prefix}kv.weight", (options.head_dim, hidden))
    yield Parameter(f"{prefix}kv_norm.weight", (options.head_dim,))
    yield Parameter(f"{prefix}output_down.weight", (groups, options.o_lora_rank, width // groups), 0)
    yield Parameter(f"{prefix}output_up.weight", (hidden, groups * options.o_lora_rank), 1)


def _compressor(prefix: str, hidden: int, width: int, ratio: int, parts: int) -> Iterator[Parameter]:
    """parts: 2 where entries overlap."""
    yield Parameter(f"{prefix}kv.weight", (parts, width, hidden))
    yield Parameter(f"{prefix}gate.weight", (parts, width, hidden))
    yield Parameter(f"{prefix}position_bias", (ratio, parts * width))
    yield Parameter(f"{prefix}norm.weight", (width,))
