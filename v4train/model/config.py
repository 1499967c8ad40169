"""Typed description of a model. `conf/model/` holds the values; nothing here has a default.

`model_config` turns a Hydra node into these dataclasses and checks every rule that a model must keep, so that a bad
value ends in one `ConfigError` before anything is allocated. The rules: `rules.py`; patterns of layers: `mix.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from v4train.model.mix import INDEXED_KINDS, expand_mix, parse_layer
from v4train.model.rules import validate
from v4train.structured import structured

# How things are computed, which says what they cost (docs/performance.md); no value changes a result
GATHER_FROM = 4  # entries in reach, as a multiple of the top-k, from which gathering is faster
GATHERED = 2**21  # elements gathered at a time, at most: what a cache holds
MEASURED_ENTRIES = 128  # for each query, on average, of the dense attention that its recall is measured with
ENTRIES_AT_ONCE = 8192  # scored before the best are kept
HELD = 2**21  # weights of one term of the softmax up to which plain products are the faster ones on a CPU
BLOCK_ROWS, LEAST_BLOCK = 64, 8  # queries x heads of a block of a window, and its fewest queries
# Elements of hidden states [B, S, M] from which memory counts for more than the 5 % of a step's time that it takes to
# compute again what `recompute.forget` frees
FORGET_FROM = 2**20
LOGITS_BYTES = 16 * 2**20  # fp32 logits held at a time: few enough for a cache, enough for the products


@dataclass
class RopeConfig:
    """Rotary embedding of one layer kind; with YaRN (arXiv 2309.00071) when `factor` > 1."""

    theta: float
    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass
class IndexerConfig:
    """Lightning indexer of `csa` (V4 report eqs. 13-17) or `dsa` (V3.2 report)."""

    num_heads: int
    head_dim: int
    top_k: int
    loss_weight: float


@dataclass
class GQAConfig:
    """`mha`, `mqa` and `gqa` layers: one module that differs in its KV heads (arXiv 2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int
    qk_norm: bool
    bias: bool
    sink: bool
    window: int | None
    dilation: int
    global_tokens: int
    rope: RopeConfig


@dataclass
class MLAConfig:
    """`mla` layers, and `dsa` layers but for window, dilation and global tokens (V2 report, arXiv 2405.04434)."""

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    logit_factor: float
    sink: bool
    window: int | None
    dilation: int
    global_tokens: int
    rope: RopeConfig


@dataclass
class AttentionConfig:
    """Shared-KV attention of V4 (report section 2.3), `swa`, `csa` and `hca` layers; the other kinds in sections."""

    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    window: int
    csa_compression: int
    hca_compression: int
    rope: RopeConfig
    compressed_rope: RopeConfig
    indexer: IndexerConfig
    gqa: GQAConfig
    mla: MLAConfig
    dsa: IndexerConfig
    query_chunk: int


@dataclass
class LayerAttention:
    """One layer of the attention mix: its kind, and the section of the configuration that holds for it."""

    kind: str
    options: AttentionConfig | GQAConfig | MLAConfig

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of an `mha`, `mqa` or `gqa` layer."""
        return {"mha": self.options.num_heads, "mqa": 1, "gqa": self.options.num_kv_heads}[self.kind]


@dataclass
class FFNConfig:
    """SwiGLU of `dense` layers."""

    intermediate_size: int
    swiglu_limit: float | None


@dataclass
class MoEConfig:
    """DeepSeekMoE with the router of V4 (report section 2.1), of V3 (group-limited) or of gpt-oss (softmax)."""

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared_experts: int
    scoring: str
    num_groups: int
    top_k_groups: int
    routed_scaling_factor: float
    router_bias: bool
    expert_bias: bool
    activation: str
    num_hash_layers: int
    swiglu_limit: float | None
    balance_loss_weight: float
    bias_update_speed: float


@dataclass
class ResidualConfig:
    """Residual connection: `plain`, `hc` (arXiv 2409.19606) or `mhc` (arXiv 2512.24880)."""

    kind: str
    num_streams: int
    sinkhorn_iterations: int
    eps: float
    gate_init: float
    pre_bias_init: float
    post_bias_init: float
    mixing_diagonal_init: float


@dataclass
class MTPConfig:
    """Multi-token prediction (V4 report section 2.1, as in V3): 0 or 1 extra block."""

    num_layers: int
    loss_weight: float
    attention: str


@dataclass
class InitConfig:
    """Initial weights: each tensor is a function of `seed` and its canonical name."""

    seed: int
    std: float


@dataclass
class ModelConfig:
    """A whole model.

    `attention_mix` is a list of kinds or a pattern such as `"swa*2 (csa hca)*20 csa"`; a kind may carry options of its
    layer: `"(gqa:window=128 gqa)*18"`. `ffn_mix` is the same for `dense` and `moe`; its last kind fills what is left.
    `tie_embedding`: the output matrix is the embedding (arXiv 1608.05859).
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    attention_mix: Any
    ffn_mix: Any
    norm_eps: float
    attention: AttentionConfig
    ffn: FFNConfig
    moe: MoEConfig
    residual: ResidualConfig
    mtp: MTPConfig
    init: InitConfig
    tie_embedding: bool = False

    @property
    def layers(self) -> list[LayerAttention]:
        """Attention of each of the `num_layers` layers."""
        words = expand_mix(self.attention_mix)
        made = {word: self.layer(word) for word in set(words)}  # few: plan.py asks tens of thousands of times
        return [made[word] for word in words]

    @property
    def layer_kinds(self) -> list[str]:
        """Attention kind of each of the `num_layers` layers."""
        return [word.split(":")[0] for word in expand_mix(self.attention_mix)]

    @property
    def mtp_layer(self) -> LayerAttention:
        """Attention of the MTP block."""
        return self.layer(self.mtp.attention, "mtp.attention")

    @property
    def ffn_kinds(self) -> list[str]:
        """`dense` or `moe` of each layer."""
        kinds = expand_mix(self.ffn_mix, "ffn_mix")
        return kinds + kinds[-1:] * (self.num_layers - len(kinds))

    @property
    def mtp_ffn(self) -> str:
        """The MTP block has the FFN of the last layer."""
        return self.ffn_kinds[-1]

    @property
    def indexed_kinds(self) -> list[str]:
        """Kind of each layer with a lightning indexer, MTP block included."""
        kinds = self.layer_kinds + [self.mtp_layer.kind] * self.mtp.num_layers
        return [kind for kind in kinds if kind in INDEXED_KINDS]

    @property
    def num_streams(self) -> int:
        """Residual streams C carried between blocks (1 for a plain residual)."""
        return 1 if self.residual.kind == "plain" else self.residual.num_streams

    def layer(self, word: str, key: str = "attention_mix") -> LayerAttention:
        """A layer from its word in the mix, `kind` or `kind:option=value:...`."""
        kind, options = parse_layer(word, key)
        sections = {"mla": self.attention.mla, "dsa": self.attention.mla}
        sections |= {"mha": self.attention.gqa, "mqa": self.attention.gqa, "gqa": self.attention.gqa}
        return LayerAttention(kind, replace(sections.get(kind, self.attention), **options))


def model_config(config: "DictConfig | ModelConfig") -> ModelConfig:
    """Typed and validated model description from a Hydra node.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a rule of `validate` broken.
    """
    if not isinstance(config, ModelConfig):
        config = structured(ModelConfig, config, "model")
    validate(config)
    return config
