"""Typed description of a model. `conf/model/` holds the values; nothing here has a default.

`model_config` turns a Hydra node into these dataclasses and checks every rule that a model must keep, so that a bad
value ends in one `ConfigError` before anything is allocated.
"""

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from v4train.errors import ConfigError
from v4train.structured import structured

ATTENTION_KINDS = ("swa", "csa", "hca")
RESIDUAL_KINDS = ("plain", "mhc")
ATTENTION_MODES = ("dense", "indexer_warmup", "sparse")


@dataclass
class RopeConfig:
    """Rotary embedding of one layer kind; with YaRN when `factor` > 1."""

    theta: float
    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float


@dataclass
class IndexerConfig:
    """Lightning indexer (V4 report eqs. 13-17)."""

    num_heads: int
    head_dim: int
    top_k: int
    loss_weight: float


@dataclass
class AttentionConfig:
    """Shared-KV attention of V4 (report section 2.3): `swa`, `csa` and `hca` layers."""

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
    query_chunk: int


@dataclass
class MoEConfig:
    """DeepSeekMoE with V4's router (report section 2.1)."""

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared_experts: int
    routed_scaling_factor: float
    num_hash_layers: int
    swiglu_limit: float
    balance_loss_weight: float
    bias_update_speed: float


@dataclass
class ResidualConfig:
    """Residual connection: `plain`, or `mhc` (arXiv 2512.24880)."""

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


@dataclass
class InitConfig:
    """Initial weights: each tensor is a function of `seed` and its canonical name."""

    seed: int
    std: float


@dataclass
class ModelConfig:
    """A whole model. `attention_mix` is a list of kinds, or a pattern such as `"swa*2 (csa hca)*20 csa"`."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    attention_mix: Any
    norm_eps: float
    attention: AttentionConfig
    moe: MoEConfig
    residual: ResidualConfig
    mtp: MTPConfig
    init: InitConfig

    @property
    def layer_kinds(self) -> list[str]:
        """Attention kind of each of the `num_layers` layers."""
        return expand_mix(self.attention_mix)

    @property
    def num_streams(self) -> int:
        """Residual streams C carried between blocks (1 for a plain residual)."""
        return self.residual.num_streams if self.residual.kind == "mhc" else 1


def expand_mix(mix: Any) -> list[str]:
    """List the attention kind of each layer: `"swa*2 (csa hca)*2"` -> `[swa, swa, csa, hca, csa, hca]`."""
    if isinstance(mix, list | tuple):
        return [str(kind) for kind in mix]
    if not isinstance(mix, str):
        rule = "neither a list of kinds nor a pattern"
        raise ConfigError("model.attention_mix", mix, rule, 'write one like "swa*2 (csa hca)*20 csa"')
    tokens = re.findall(r"\w+|[()*]", mix)
    if "".join(tokens) != re.sub(r"[\s,]+", "", mix):
        raise ConfigError("model.attention_mix", mix, "not a pattern", 'write one like "swa*2 (csa hca)*20 csa"')
    kinds, rest = _expand(tokens, mix)
    if rest:
        raise ConfigError("model.attention_mix", mix, "unbalanced parenthesis", "close what you open")
    return kinds


def _expand(tokens: list[str], mix: str) -> tuple[list[str], list[str]]:
    kinds: list[str] = []
    while tokens and tokens[0] != ")":
        head, *tokens = tokens
        if head == "(":
            group, tokens = _expand(tokens, mix)
            if not tokens:
                raise ConfigError("model.attention_mix", mix, "unbalanced parenthesis", "close what you open")
            tokens = tokens[1:]
        else:
            group = [head]
        if tokens[:1] == ["*"]:
            if len(tokens) < 2 or not tokens[1].isdigit():
                raise ConfigError("model.attention_mix", mix, "* needs a whole number after it", "write e.g. swa*2")
            group, tokens = group * int(tokens[1]), tokens[2:]
        kinds += group
    return kinds, tokens


def model_config(config: "DictConfig | ModelConfig") -> ModelConfig:
    """Typed and validated model description from a Hydra node.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a rule of `validate` broken.
    """
    if not isinstance(config, ModelConfig):
        config = structured(ModelConfig, config, "model")
    validate(config)
    return config


def validate(config: ModelConfig) -> None:
    """Raise `ConfigError` on the first rule that the model breaks."""
    attention, moe, residual = config.attention, config.moe, config.residual
    kinds = config.layer_kinds
    _positive(config)
    for kind in kinds:
        if kind not in ATTENTION_KINDS:
            _refuse("attention_mix", kind, "unknown attention kind", f"use one of {', '.join(ATTENTION_KINDS)}")
    if len(kinds) != config.num_layers:
        rule = f"it lists {len(kinds)} layers but model.num_layers is {config.num_layers}"
        _refuse("attention_mix", config.attention_mix, rule, "make the two agree")
    if attention.num_heads % attention.o_groups:
        rule = f"model.attention.num_heads={attention.num_heads} must be a multiple of it"
        _refuse("attention.o_groups", attention.o_groups, rule, "change one of the two")
    if attention.rope_dim % 2 or attention.rope_dim > attention.head_dim:
        rule = f"it must be even and at most model.attention.head_dim={attention.head_dim}"
        _refuse("attention.rope_dim", attention.rope_dim, rule, "choose a smaller even number")
    if attention.rope_dim > attention.indexer.head_dim:
        rule = f"the indexer rotates model.attention.rope_dim={attention.rope_dim} of its dimensions"
        _refuse("attention.indexer.head_dim", attention.indexer.head_dim, rule, "make it at least as large")
    if moe.top_k > moe.num_experts:
        rule = f"it exceeds model.moe.num_experts={moe.num_experts}"
        _refuse("moe.top_k", moe.top_k, rule, "choose at most the number of experts")
    if not 0 <= moe.num_hash_layers <= config.num_layers:
        rule = f"it must lie in 0..{config.num_layers} (model.num_layers)"
        _refuse("moe.num_hash_layers", moe.num_hash_layers, rule, "choose fewer hash-routed layers")
    if residual.kind not in RESIDUAL_KINDS:
        _refuse("residual.kind", residual.kind, "unknown residual", f"use one of {', '.join(RESIDUAL_KINDS)}")
    _ranges(config)
    if config.mtp.num_layers not in (0, 1):
        _refuse("mtp.num_layers", config.mtp.num_layers, "V4 has at most one MTP block", "use 0 or 1")


def _positive(config: ModelConfig) -> None:
    attention, indexer, moe = config.attention, config.attention.indexer, config.moe
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        **{f"attention.{key}": value for key, value in vars(attention).items() if isinstance(value, int)},
        **{f"attention.indexer.{key}": value for key, value in vars(indexer).items() if isinstance(value, int)},
        "moe.num_experts": moe.num_experts,
        "moe.top_k": moe.top_k,
        "moe.intermediate_size": moe.intermediate_size,
        "residual.num_streams": config.residual.num_streams,
        "residual.sinkhorn_iterations": config.residual.sinkhorn_iterations,
    }
    for key, value in sizes.items():
        if value < 1:
            _refuse(key, value, "it must be at least 1", "choose a positive number")
    if moe.num_shared_experts < 0:
        _refuse("moe.num_shared_experts", moe.num_shared_experts, "it can't be negative", "use 0 for none")


def _ranges(config: ModelConfig) -> None:
    """Written as `not ...`, so that NaN is refused too."""
    attention, moe, residual = config.attention, config.moe, config.residual
    above_zero = {
        "norm_eps": config.norm_eps,
        "init.std": config.init.std,
        "moe.routed_scaling_factor": moe.routed_scaling_factor,
        "moe.swiglu_limit": moe.swiglu_limit,
        "residual.eps": residual.eps,
    }
    for section in ("rope", "compressed_rope"):
        rope = getattr(attention, section)
        above_zero |= {f"attention.{section}.{key}": value for key, value in vars(rope).items() if key != "theta"}
        if not rope.theta > 1:
            _refuse(f"attention.{section}.theta", rope.theta, "it must exceed 1", "V4 has 10000 and 160000")
    for key, value in above_zero.items():
        if not value > 0:
            _refuse(key, value, "it must be above 0", "choose a positive number")
    not_negative = {
        "attention.indexer.loss_weight": attention.indexer.loss_weight,
        "moe.balance_loss_weight": moe.balance_loss_weight,
        "moe.bias_update_speed": moe.bias_update_speed,
        "mtp.loss_weight": config.mtp.loss_weight,
    }
    for key, value in not_negative.items():
        if not value >= 0:
            _refuse(key, value, "it can't be negative", "use 0 to switch it off")


def _refuse(key: str, value: object, rule: str, remedy: str) -> None:
    raise ConfigError(f"model.{key}", value, rule, remedy)
