"""`deepseek_v3` (mla) and `deepseek_v32` (dsa), with dense layers and DeepSeekMoE.

transformers stacks the latent's and the rotated key's projection, and keeps each head's key and value projections
together. Its main attention rotates as ours does; V3.2's indexer rotates its first channels, in pairs (i, i + R/2).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from v4train.hf.common import (
    DEEPSEEK_MOE,
    Architecture,
    Link,
    common_settings,
    describe_common,
    describe_rope,
    half_split,
    hold,
    hold_layers,
    hold_theirs,
    packed,
    refuse_theirs,
    rope_settings,
    swiglu,
)
from v4train.model import ModelConfig
from v4train.model.config import AttentionConfig, MLAConfig
from v4train.model.mix import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LATENT_NORM_EPS = 1e-6  # transformers 5.23 gives the norms of the latents this eps whatever rms_norm_eps is
ROUTER_AND_EXPERTS = dict(
    scoring="sigmoid",
    router_bias=False,
    expert_bias=False,
    activation="swiglu",
    num_hash_layers=0,
    swiglu_limit=None,
)


def settings(config: ModelConfig, name: str) -> dict[str, Any]:
    """transformers' configuration. Raises ConfigError for what `name` cannot hold."""
    mla, dsa = config.attention.mla, config.attention.dsa
    hold_layers(config, name, "attention.mla.", sink=False)
    if name == "deepseek_v3":
        hold_layers(config, name, "attention.mla.", window=None)
    hold(config, name, residual__kind="plain", norm_eps=LATENT_NORM_EPS)
    made = common_settings(config, mla.rope) | dict(
        num_attention_heads=mla.num_heads,
        num_key_value_heads=mla.num_heads,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.nope_dim,
        qk_rope_head_dim=mla.rope_dim,
        v_head_dim=mla.value_dim,
        rope_parameters=_rope_settings(mla),
    )
    if name == "deepseek_v32":
        made |= dict(index_n_heads=dsa.num_heads, index_head_dim=dsa.head_dim, index_topk=dsa.top_k)
        made["mlp_layer_types"] = ["dense" if kind == "dense" else "sparse" for kind in config.ffn_kinds]
    else:
        made["num_nextn_predict_layers"] = 0
    return made | _ffn_settings(config, name)


def _rope_settings(mla: MLAConfig) -> dict[str, Any]:
    """With YaRN the logits are multiplied by (0.1 mscale ln factor + 1)^2, our `logit_factor`."""
    made = rope_settings(mla.rope, "attention.mla.rope")
    if mla.logit_factor == 1:
        return made
    if mla.rope.factor <= 1:
        rule = "transformers scales logits only with YaRN"
        refuse("attention.mla.logit_factor", mla.logit_factor, rule, "set model.attention.mla.logit_factor=1")
    mscale = round((math.sqrt(mla.logit_factor) - 1) / (0.1 * math.log(mla.rope.factor)), 12)
    return made | {"mscale": mscale, "mscale_all_dim": mscale}


def _ffn_settings(config: ModelConfig, name: str) -> dict[str, Any]:
    kinds, moe = config.ffn_kinds, config.moe
    dense = kinds.index("moe") if "moe" in kinds else len(kinds)
    if dense:
        hold(config, name, ffn__swiglu_limit=None)
    if name == "deepseek_v3" and "dense" in kinds[dense:]:
        refuse("ffn_mix", config.ffn_mix, f"transformers' {name} has its dense layers first", 'write "dense*3 moe"')
    if "moe" in kinds:
        hold(config, name, **{f"moe__{key}": value for key, value in ROUTER_AND_EXPERTS.items()})
        for key, least in (("num_shared_experts", 1), ("num_experts", 2)):
            if getattr(moe, key) < least:
                refuse(f"moe.{key}", getattr(moe, key), f"transformers' {name} has {least} at least", "raise it")
    return dict(
        intermediate_size=config.ffn.intermediate_size,
        first_k_dense_replace=dense,
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.intermediate_size,
        n_shared_experts=moe.num_shared_experts,
        n_group=moe.num_groups,
        topk_group=min(moe.top_k_groups, moe.num_groups),
        routed_scaling_factor=moe.routed_scaling_factor,
    )


def describe(config: PreTrainedConfig, preset: ModelConfig) -> ModelConfig:
    """Our description of a peer."""
    hold_theirs(
        config,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        norm_topk_prob=True,
        rope_interleave=True,
        rms_norm_eps=LATENT_NORM_EPS,
    )
    if config.q_lora_rank is None:
        refuse_theirs(config, "q_lora_rank", None, "queries come from a latent here")
    layers = config.num_hidden_layers
    sparse = config.model_type == "deepseek_v32"
    first = ["dense"] * min(config.first_k_dense_replace, layers)
    kinds = config.mlp_layer_types if sparse else first
    moe = replace(
        preset.moe,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        num_shared_experts=config.n_shared_experts,
        num_groups=config.n_group,
        top_k_groups=config.topk_group,
        routed_scaling_factor=config.routed_scaling_factor,
        **ROUTER_AND_EXPERTS,
    )
    return describe_common(
        config,
        preset,
        attention=_describe_attention(config, preset.attention, sparse),
        attention_mix=["dsa" if sparse else "mla"] * layers,
        ffn_mix=["dense" if kind == "dense" else "moe" for kind in kinds] + ["moe"] * (layers - len(kinds)),
        ffn=replace(preset.ffn, intermediate_size=config.intermediate_size, swiglu_limit=None),
        moe=moe,
    )


def _describe_attention(config: PreTrainedConfig, preset: AttentionConfig, sparse: bool) -> AttentionConfig:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    mla = replace(
        preset.mla,
        num_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
        logit_factor=yarn_apply_mscale(config.rope_parameters, 1.0),
        sink=False,
        window=None,
        dilation=1,
        global_tokens=0,
        rope=describe_rope(config, preset.rope),
    )
    made = replace(preset, mla=mla)
    if not sparse:
        return made
    heads, width, top_k = config.index_n_heads, config.index_head_dim, config.index_topk
    return replace(made, dsa=replace(preset.dsa, num_heads=heads, head_dim=width, top_k=top_k))


def links(config: ModelConfig) -> list[Link]:
    """Tensors of a block."""
    mla, dsa = config.attention.mla, config.attention.dsa
    by_head = partial(packed, groups=mla.num_heads)
    rotated = partial(half_split, head_dim=dsa.head_dim, rope_dim=mla.rope_dim)
    return [
        Link("attention.query_down.weight", "self_attn.q_a_proj.weight"),
        Link("attention.query_norm.weight", "self_attn.q_a_layernorm.weight"),
        Link("attention.query_up.weight", "self_attn.q_b_proj.weight"),
        Link("attention.kv_down.weight attention.rope_key.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        Link("attention.kv_norm.weight", "self_attn.kv_a_layernorm.weight"),
        Link("attention.key_up.weight attention.value_up.weight", "self_attn.kv_b_proj.weight", by_head),
        Link("attention.output.weight", "self_attn.o_proj.weight"),
        Link("attention.indexer.query.weight", "self_attn.indexer.wq_b.weight", rotated),
        Link("attention.indexer.key.weight", "self_attn.indexer.wk.weight", rotated),
        Link("attention.indexer.key_norm.weight", "self_attn.indexer.k_norm.weight", rotated),
        Link("attention.indexer.key_norm.bias", "self_attn.indexer.k_norm.bias", rotated),
        Link("attention.indexer.head_weight.weight", "self_attn.indexer.weights_proj.weight"),
        *swiglu("ffn", "mlp"),
        *DEEPSEEK_MOE,
    ]


DEEPSEEK_V3, DEEPSEEK_V32 = (
    Architecture(name, (preset,), partial(settings, name=name), describe, links)
    for name, preset in (("deepseek_v3", "v3"), ("deepseek_v32", "v32"))
)
