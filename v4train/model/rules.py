"""Every rule that a model's description must keep."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from v4train.errors import ConfigError
from v4train.model.mix import expand_mix, parse_layer, refuse

if TYPE_CHECKING:
    from v4train.model.config import ModelConfig, MoEConfig

FFN_KINDS = ("dense", "moe")
RESIDUAL_KINDS = ("plain", "hc", "mhc")
ROUTER_SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
ACTIVATIONS = ("swiglu", "swiglu_oai")
ATTENTION_MODES = ("dense", "indexer_warmup", "sparse")
RECOMPUTE_LEVELS = ("none", "block", "attention")  # what they mean: recompute.py

# Whole numbers that may be 0, numbers that may be 0, and seeds; all others are sizes or factors, above 0.
MAY_BE_ZERO = (
    "attention.gqa.global_tokens",
    "attention.mla.global_tokens",
    "attention.indexer.loss_weight",
    "attention.dsa.loss_weight",
    "moe.num_shared_experts",
    "moe.balance_loss_weight",
    "moe.bias_update_speed",
    "residual.gate_init",
    "mtp.loss_weight",
)
ANY_NUMBER = (
    "moe.num_hash_layers",  # these two have a rule of their own
    "mtp.num_layers",
    "residual.pre_bias_init",
    "residual.post_bias_init",
    "residual.mixing_diagonal_init",
    "init.seed",
)


def validate(config: ModelConfig) -> None:
    """Raise `ConfigError` on the first rule that the model breaks."""
    _numbers(config)
    _words(config)
    _mixes(config)
    _v4_attention(config)
    _other_attention(config)
    _experts(config)
    if config.mtp.num_layers not in (0, 1):
        refuse("mtp.num_layers", config.mtp.num_layers, "there is at most one MTP block", "use 0 or 1")


def check_attention_mode(config: ModelConfig, mode: str, key: str) -> None:
    """Raise `ConfigError`, by `key`, for a mode that doesn't exist or that this model has nothing to train in."""
    if mode not in ATTENTION_MODES:
        raise ConfigError(key, mode, "unknown mode", f"use one of {', '.join(ATTENTION_MODES)}")
    if mode == "indexer_warmup" and not config.indexed_kinds:
        rule = f"no layer of {' '.join(config.layer_kinds)} has a lightning indexer, so nothing would learn"
        raise ConfigError(key, mode, rule, "use dense, or a csa or dsa layer in model.attention_mix")


def _numbers(section: object, path: str = "") -> None:
    """Signs, written as `not ...`, so that NaN is refused too."""
    for field in fields(section):
        key, value = path + field.name, getattr(section, field.name)
        if is_dataclass(value):
            _numbers(value, f"{key}.")
        elif isinstance(value, bool) or not isinstance(value, int | float) or key in ANY_NUMBER:
            continue
        elif field.name == "theta":
            if not value > 1:
                refuse(key, value, "it must exceed 1", "V4 has 10000 and 160000")
        elif key in MAY_BE_ZERO:
            if not value >= 0:
                refuse(key, value, "it can't be negative", "use 0 for none")
        elif isinstance(value, int) and value < 1:
            refuse(key, value, "it must be at least 1", "choose a positive number")
        elif not value > 0:
            refuse(key, value, "it must be above 0", "choose a positive number")


def _words(config: ModelConfig) -> None:
    words = {
        "residual.kind": (config.residual.kind, RESIDUAL_KINDS, "residual"),
        "moe.scoring": (config.moe.scoring, ROUTER_SCORES, "scoring"),
        "moe.activation": (config.moe.activation, ACTIVATIONS, "activation"),
    }
    for key, (value, known, what) in words.items():
        if value not in known:
            refuse(key, value, f"unknown {what}", f"use one of {', '.join(known)}")


def _mixes(config: ModelConfig) -> None:
    words = expand_mix(config.attention_mix)
    for word in words:
        _local(config.layer(word).options, word, "attention_mix")
    if len(words) != config.num_layers:
        rule = f"it lists {len(words)} layers but model.num_layers is {config.num_layers}"
        refuse("attention_mix", config.attention_mix, rule, "make the two agree")
    _local(config.mtp_layer.options, config.mtp.attention, "mtp.attention")
    used = {layer.kind for layer in config.layers}
    for section, kinds in (("gqa", {"mha", "mqa", "gqa"}), ("mla", {"mla"})):
        if not used & kinds:  # or an option that contradicts itself would pass in silence
            _local(getattr(config.attention, section), section, "attention_mix")
    kinds = expand_mix(config.ffn_mix, "ffn_mix")
    for kind in kinds:
        if kind not in FFN_KINDS:
            refuse("ffn_mix", kind, "unknown FFN kind", f"use one of {', '.join(FFN_KINDS)}")
    if not 1 <= len(kinds) <= config.num_layers:
        rule = f"it lists {len(kinds)} layers but model.num_layers is {config.num_layers}"
        refuse(
            "ffn_mix", config.ffn_mix, rule, 'list at most as many, e.g. "dense*3 moe": the last kind fills the rest'
        )


def _local(options: object, word: str, mix: str) -> None:
    """Window, dilation and global tokens of one layer. `word` names it in the mix `mix`."""
    kind, given = parse_layer(word, mix)
    if "window" in given and given["window"] is not None and given["window"] < 1:
        refuse(mix, word, "window must be at least 1", f"write e.g. {kind}:window=128")
    if kind not in ("mha", "mqa", "gqa", "mla"):
        return
    section = f"attention.{'mla' if kind == 'mla' else 'gqa'}"
    if options.dilation < 1:
        refuse(mix, word, "dilation must be at least 1", "leave it out for none")
    for name, off in (("dilation", 1), ("global_tokens", 0)):
        value = getattr(options, name)
        if value != off and options.window is None:
            key, shown = (mix, word) if name in given else (f"{section}.{name}", value)
            remedy = f"set model.{section}.window or write {kind}:window=128:{name}={value}"
            refuse(key, shown, f"{name} without window: a layer of kind {kind} sees everything", remedy)


def _v4_attention(config: ModelConfig) -> None:
    attention = config.attention
    if attention.num_heads % attention.o_groups:
        rule = f"model.attention.num_heads={attention.num_heads} must be a multiple of it"
        refuse("attention.o_groups", attention.o_groups, rule, "change one of the two")
    _rope_dim("attention.rope_dim", attention.rope_dim, "model.attention.head_dim", attention.head_dim)
    if attention.rope_dim > attention.indexer.head_dim:
        rule = f"the indexer rotates model.attention.rope_dim={attention.rope_dim} of its dimensions"
        refuse("attention.indexer.head_dim", attention.indexer.head_dim, rule, "make it at least as large")


def _other_attention(config: ModelConfig) -> None:
    gqa, mla, dsa = config.attention.gqa, config.attention.mla, config.attention.dsa
    if gqa.num_heads % gqa.num_kv_heads:
        rule = f"model.attention.gqa.num_heads={gqa.num_heads} must be a multiple of it"
        refuse("attention.gqa.num_kv_heads", gqa.num_kv_heads, rule, "change one of the two")
    _rope_dim("attention.gqa.rope_dim", gqa.rope_dim, "model.attention.gqa.head_dim", gqa.head_dim)
    if mla.rope_dim % 2:
        refuse("attention.mla.rope_dim", mla.rope_dim, "it must be even", "choose another number")
    if mla.rope_dim > dsa.head_dim:
        rule = f"the indexer rotates model.attention.mla.rope_dim={mla.rope_dim} of its dimensions"
        refuse("attention.dsa.head_dim", dsa.head_dim, rule, "make it at least as large")


def _rope_dim(key: str, rope_dim: int, width_key: str, width: int) -> None:
    if rope_dim % 2 or rope_dim > width:
        refuse(key, rope_dim, f"it must be even and at most {width_key}={width}", "choose a smaller even number")


def _experts(config: ModelConfig) -> None:
    moe = config.moe
    if moe.top_k > moe.num_experts:
        rule = f"it exceeds model.moe.num_experts={moe.num_experts}"
        refuse("moe.top_k", moe.top_k, rule, "choose at most the number of experts")
    if not 0 <= moe.num_hash_layers <= config.num_layers:
        rule = f"it must lie in 0..{config.num_layers} (model.num_layers)"
        refuse("moe.num_hash_layers", moe.num_hash_layers, rule, "choose fewer hash-routed layers")
    if "dense" in config.ffn_kinds[: moe.num_hash_layers] and "moe" in config.ffn_kinds:
        rule = f"the first {moe.num_hash_layers} layers are hash-routed (model.moe.num_hash_layers)"
        refuse("ffn_mix", config.ffn_mix, rule, "set model.moe.num_hash_layers=0 or start with moe")
    if moe.num_groups > 1:
        _expert_groups(moe)


def _expert_groups(moe: MoEConfig) -> None:
    if moe.num_experts % moe.num_groups or moe.num_experts // moe.num_groups < 2:
        rule = f"model.moe.num_experts={moe.num_experts} must be a multiple of it, two experts a group at least"
        refuse("moe.num_groups", moe.num_groups, rule, "use 1 for no groups")
    if moe.top_k_groups > moe.num_groups:
        rule = f"it exceeds model.moe.num_groups={moe.num_groups}"
        refuse("moe.top_k_groups", moe.top_k_groups, rule, "choose fewer")
    within = moe.num_experts // moe.num_groups * moe.top_k_groups
    if moe.top_k > within:
        refuse("moe.top_k", moe.top_k, f"the chosen groups hold {within} experts", "raise model.moe.top_k_groups")
