"""`deepseek_v4`: swa, csa and hca layers, mHC, and DeepSeekMoE with hash-routed first layers.

Both sides keep the same numbers; shapes differ only in how stacks of matrices are folded.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from v4train.hf.common import (
    DEEPSEEK_MOE,
    TRUNK,
    Architecture,
    Link,
    common_settings,
    describe_common,
    describe_rope,
    hold,
    hold_layers,
    hold_theirs,
    refuse_theirs,
    rope_settings,
)
from v4train.model import ModelConfig
from v4train.model.config import AttentionConfig
from v4train.model.mix import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "deepseek_v4"
LAYER_TYPES = {
    "swa": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
ROUTER_AND_EXPERTS = dict(
    num_shared_experts=1,
    scoring="sqrtsoftplus",
    num_groups=1,
    router_bias=False,
    expert_bias=False,
    activation="swiglu",
)


def settings(config: ModelConfig) -> dict[str, Any]:
    """transformers' configuration. Raises ConfigError for what `deepseek_v4` cannot hold."""
    attention, moe, residual = config.attention, config.moe, config.residual
    hold_layers(config, NAME, "attention.", window=attention.window)
    if attention.compressed_rope.factor > 1:  # transformers 5.23 reads `truncate` where V4 never has it
        hold(config, NAME, attention__compressed_rope__truncate=True)
    if "dense" in config.ffn_kinds:
        refuse("ffn_mix", config.ffn_mix, f"transformers' {NAME} has no dense layer", "set model.ffn_mix=moe")
    hold(config, NAME, **{f"moe__{key}": value for key, value in ROUTER_AND_EXPERTS.items()}, residual__kind="mhc")
    if moe.swiglu_limit is None:
        refuse("moe.swiglu_limit", None, f"transformers' {NAME} clamps always", "set it to 10 as released")
    partial = {"partial_rotary_factor": _share(attention.rope_dim, attention.head_dim)}
    return common_settings(config, attention.compressed_rope) | dict(
        layer_types=[LAYER_TYPES[kind] for kind in config.layer_kinds],
        compress_rates={LAYER_TYPES["csa"]: attention.csa_compression, LAYER_TYPES["hca"]: attention.hca_compression},
        num_attention_heads=attention.num_heads,
        head_dim=attention.head_dim,
        q_lora_rank=attention.q_lora_rank,
        o_groups=attention.o_groups,
        o_lora_rank=attention.o_lora_rank,
        sliding_window=attention.window,
        index_n_heads=attention.indexer.num_heads,
        index_head_dim=attention.indexer.head_dim,
        index_topk=attention.indexer.top_k,
        rope_theta=attention.rope.theta,
        compress_rope_theta=attention.compressed_rope.theta,
        rope_parameters={
            "main": rope_settings(attention.rope, "attention.rope") | partial,
            "compress": rope_settings(attention.compressed_rope, "attention.compressed_rope") | partial,
        },
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.intermediate_size,
        routed_scaling_factor=moe.routed_scaling_factor,
        swiglu_limit=moe.swiglu_limit,
        mlp_layer_types=["hash_moe"] * moe.num_hash_layers + ["moe"] * (config.num_layers - moe.num_hash_layers),
        hc_mult=residual.num_streams,
        hc_sinkhorn_iters=residual.sinkhorn_iterations,
        hc_eps=residual.eps,
        num_nextn_predict_layers=0,
        **partial,
    )


def _share(rope_dim: int, head_dim: int) -> float:
    """Share of a head that is rotated. transformers cuts the product off: 44 * (30 / 44) would be 29 channels."""
    share = rope_dim / head_dim
    return share if int(head_dim * share) == rope_dim else math.nextafter(share, 1)


def describe(config: PreTrainedConfig, preset: ModelConfig) -> ModelConfig:
    """Our description of a peer."""
    hold_theirs(
        config,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        norm_topk_prob=True,
        scoring_func="sqrtsoftplus",
        n_shared_experts=1,
    )
    hashed = config.mlp_layer_types.count("hash_moe")
    if "hash_moe" in config.mlp_layer_types[hashed:]:
        refuse_theirs(config, "mlp_layer_types", config.mlp_layer_types, "hash-routed layers come first here")
    kinds = {theirs: ours for ours, theirs in LAYER_TYPES.items()}
    moe = replace(
        preset.moe,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        routed_scaling_factor=config.routed_scaling_factor,
        num_hash_layers=hashed,
        swiglu_limit=config.swiglu_limit,
        **ROUTER_AND_EXPERTS,
    )
    streams, iterations, eps = config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps
    return describe_common(
        config,
        preset,
        attention_mix=[kinds[layer] for layer in config.layer_types],
        ffn_mix=["moe"] * config.num_hidden_layers,
        attention=_describe_attention(config, preset.attention),
        moe=moe,
        residual=replace(preset.residual, kind="mhc", num_streams=streams, sinkhorn_iterations=iterations, eps=eps),
    )


def _describe_attention(config: PreTrainedConfig, preset: AttentionConfig) -> AttentionConfig:
    compressed = describe_rope(config, preset.rope, "compress")
    main = describe_rope(config, preset.rope, "main")
    if main.factor <= 1:  # the length both were trained on
        main = replace(main, original_length=compressed.original_length)
    heads, width, top_k = config.index_n_heads, config.index_head_dim, config.index_topk
    return replace(
        preset,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        rope_dim=int(config.head_dim * config.partial_rotary_factor),
        q_lora_rank=config.q_lora_rank,
        o_groups=config.o_groups,
        o_lora_rank=config.o_lora_rank,
        window=config.sliding_window,
        csa_compression=config.compress_rates[LAYER_TYPES["csa"]],
        hca_compression=config.compress_rates[LAYER_TYPES["hca"]],
        rope=main,
        compressed_rope=compressed,
        indexer=replace(preset.indexer, num_heads=heads, head_dim=width, top_k=top_k),
    )


def _hyper_connection(ours: str, theirs: str) -> list[Link]:
    parts = {"projection": "fn", "static_bias": "base", "gates": "scale"}
    return [Link(ours + part, theirs + peer) for part, peer in parts.items()]


def _compressor(ours: str, theirs: str) -> list[Link]:
    return [
        Link(f"{ours}.kv.weight", f"{theirs}.kv_proj.weight"),
        Link(f"{ours}.gate.weight", f"{theirs}.gate_proj.weight"),
        Link(f"{ours}.norm.weight", f"{theirs}.kv_norm.weight"),
        Link(f"{ours}.position_bias", f"{theirs}.position_bias"),
    ]


BLOCK = [
    *_hyper_connection("attention_residual.", "attn_hc."),
    *_hyper_connection("ffn_residual.", "ffn_hc."),
    Link("attention.query_down.weight", "self_attn.q_a_proj.weight"),
    Link("attention.query_norm.weight", "self_attn.q_a_norm.weight"),
    Link("attention.query_up.weight", "self_attn.q_b_proj.weight"),
    Link("attention.kv.weight", "self_attn.kv_proj.weight"),
    Link("attention.kv_norm.weight", "self_attn.kv_norm.weight"),
    Link("attention.sink", "self_attn.sinks"),
    Link("attention.output_down.weight", "self_attn.o_a_proj.weight"),
    Link("attention.output_up.weight", "self_attn.o_b_proj.weight"),
    *_compressor("attention.compressor", "self_attn.compressor"),
    *_compressor("attention.indexer.compressor", "self_attn.compressor.indexer"),
    Link("attention.indexer.query.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    Link("attention.indexer.head_weight.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight"),
    Link("ffn.router.table", "mlp.gate.tid2eid"),
    *DEEPSEEK_MOE,
]


DEEPSEEK_V4 = Architecture(
    NAME,
    ("flash",),
    settings,
    describe,
    links=lambda config: BLOCK,
    trunk=(*TRUNK, *_hyper_connection("head.output_norm.collapse.", "model.hc_head.hc_")),
)
