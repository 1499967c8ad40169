"""The same weights in transformers' `deepseek_v4`. transformers has no MTP block: it stays behind on the way out.

Both keep the same numbers; shapes differ only in how stacks of matrices are folded (a reshape each way).
transformers is imported when used: the library itself does not need it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from v4train.errors import ConfigError
from v4train.model import ModelConfig, Transformer
from v4train.model.config import (
    AttentionConfig,
    IndexerConfig,
    InitConfig,
    MoEConfig,
    MTPConfig,
    ResidualConfig,
    RopeConfig,
)

if TYPE_CHECKING:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

LAYER_TYPES = {
    "swa": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}

# Our name -> theirs. Order matters: the first pattern that matches a part of the name replaces it.
RENAMES = [
    (r"^embedding\.lookup\.", "model.embed_tokens."),
    (r"^head\.lm_head\.", "lm_head."),
    (r"^head\.output_norm\.norm\.", "model.norm."),
    (r"^head\.output_norm\.collapse\.projection$", "model.hc_head.hc_fn"),
    (r"^head\.output_norm\.collapse\.static_bias$", "model.hc_head.hc_base"),
    (r"^head\.output_norm\.collapse\.gates$", "model.hc_head.hc_scale"),
    (r"^blocks\.", "model.layers."),
    (r"\.attention_residual\.", ".attn_hc."),
    (r"\.ffn_residual\.", ".ffn_hc."),
    (r"_hc\.projection$", "_hc.fn"),
    (r"_hc\.static_bias$", "_hc.base"),
    (r"_hc\.gates$", "_hc.scale"),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.query_down\.", ".self_attn.q_a_proj."),
    (r"\.attention\.query_norm\.", ".self_attn.q_a_norm."),
    (r"\.attention\.query_up\.", ".self_attn.q_b_proj."),
    (r"\.attention\.kv\.", ".self_attn.kv_proj."),
    (r"\.attention\.kv_norm\.", ".self_attn.kv_norm."),
    (r"\.attention\.sink$", ".self_attn.sinks"),
    (r"\.attention\.output_down\.", ".self_attn.o_a_proj."),
    (r"\.attention\.output_up\.", ".self_attn.o_b_proj."),
    (r"\.attention\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.attention\.indexer\.query\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.attention\.indexer\.head_weight\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attention\.compressor\.", ".self_attn.compressor."),
    (r"(compressor(?:\.indexer)?)\.kv\.", r"\1.kv_proj."),
    (r"(compressor(?:\.indexer)?)\.gate\.", r"\1.gate_proj."),
    (r"(compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.ffn\.router\.bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.router\.table$", ".mlp.gate.tid2eid"),
    (r"\.ffn\.router\.", ".mlp.gate."),
    (r"\.ffn\.experts\.gate_up$", ".mlp.experts.gate_up_proj"),
    (r"\.ffn\.experts\.down$", ".mlp.experts.down_proj"),
    (r"\.ffn\.shared\.down\.", ".mlp.shared_experts.down_proj."),
]
SHARED_GATE_UP = re.compile(r"\.ffn\.shared\.gate_up\.weight$")


def hf_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """transformers' tensors for one of ours: same numbers, their names and shapes. Empty for the MTP block."""
    if name.startswith("mtp."):
        return {}
    if SHARED_GATE_UP.search(name):  # [2, I, M]: two matrices there
        prefix = SHARED_GATE_UP.sub(".mlp.shared_experts.", hf_name(name))
        return {f"{prefix}{part}_proj.weight": half for part, half in zip(("gate", "up"), tensor, strict=True)}
    return {hf_name(name): tensor.flatten(*_fold(name)) if _fold(name) else tensor}


def hf_name(name: str) -> str:
    """transformers' name of one of our tensors."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _fold(name: str) -> tuple[int, int] | None:
    """Leading dimensions that transformers folds into one."""
    if name.endswith("experts.gate_up"):
        return 1, 2
    if re.search(r"(compressor\.(kv|gate)|output_down)\.weight$", name):
        return 0, 1
    return None


def hf_config(config: ModelConfig) -> DeepseekV4Config:
    """transformers' description of the model.

    Raises:
        ConfigError: a feature that `deepseek_v4` cannot hold, by name.
    """
    from transformers import DeepseekV4Config

    attention, moe, residual = config.attention, config.moe, config.residual
    if residual.kind != "mhc":
        raise ConfigError("model.residual.kind", residual.kind, "deepseek_v4 holds mHC only", "use residual=mhc")
    if moe.num_shared_experts != 1:
        rule = "deepseek_v4 holds exactly one shared expert"
        raise ConfigError("model.moe.num_shared_experts", moe.num_shared_experts, rule, "use 1")
    hashed = moe.num_hash_layers
    return DeepseekV4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        layer_types=[LAYER_TYPES[kind] for kind in config.layer_kinds],
        compress_rates={LAYER_TYPES["csa"]: attention.csa_compression, LAYER_TYPES["hca"]: attention.hca_compression},
        rms_norm_eps=config.norm_eps,
        num_attention_heads=attention.num_heads,
        head_dim=attention.head_dim,
        q_lora_rank=attention.q_lora_rank,
        o_groups=attention.o_groups,
        o_lora_rank=attention.o_lora_rank,
        sliding_window=attention.window,
        index_n_heads=attention.indexer.num_heads,
        index_head_dim=attention.indexer.head_dim,
        index_topk=attention.indexer.top_k,
        partial_rotary_factor=attention.rope_dim / attention.head_dim,
        rope_parameters={
            "main": _hf_rope(attention.rope, attention),
            "compress": _hf_rope(attention.compressed_rope, attention),
        },
        max_position_embeddings=int(attention.compressed_rope.factor * attention.compressed_rope.original_length),
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.intermediate_size,
        routed_scaling_factor=moe.routed_scaling_factor,
        swiglu_limit=moe.swiglu_limit,
        mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (config.num_layers - hashed),
        hc_mult=residual.num_streams,
        hc_sinkhorn_iters=residual.sinkhorn_iterations,
        hc_eps=residual.eps,
        num_nextn_predict_layers=config.mtp.num_layers,
        initializer_range=config.init.std,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def _hf_rope(rope: RopeConfig, attention: AttentionConfig) -> dict:
    common = {"rope_theta": rope.theta, "partial_rotary_factor": attention.rope_dim / attention.head_dim}
    if rope.factor <= 1:
        return {"rope_type": "default", **common}
    return {
        "rope_type": "yarn",
        **common,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_length,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": 1.0,
    }


def to_hf(model: Transformer) -> DeepseekV4ForCausalLM:
    """A transformers model with the same weights (without the MTP block), on the CPU in fp32, in eval mode."""
    from transformers import DeepseekV4ForCausalLM

    peer = DeepseekV4ForCausalLM(hf_config(model.config)).to(torch.float32)
    state = {}
    for name, tensor in model.state_dict().items():
        state.update(hf_tensors(name, tensor.detach().cpu()))
    peer.load_state_dict(state, strict=True)
    return peer.eval()


def from_hf(source: str | Path | DeepseekV4ForCausalLM) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our description and state dict of a transformers model, or of a directory that holds one.

    `build_model(config).load_state_dict(state)` is the same model, without MTP. What transformers does not record
    (loss weights, initialisation) takes the published values of V4.
    """
    from transformers import DeepseekV4ForCausalLM

    if not isinstance(source, DeepseekV4ForCausalLM):
        source = DeepseekV4ForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = _from_hf_config(source.config)
    with torch.device("meta"):
        ours = Transformer(config)
    theirs = source.state_dict()
    state = {}
    for name, tensor in ours.state_dict().items():
        parts = [theirs[part] for part in hf_tensors(name, tensor)]
        whole = torch.stack(parts) if len(parts) > 1 else parts[0]
        state[name] = whole.detach().reshape(tensor.shape).clone()
    return config, state


def _from_hf_config(config: DeepseekV4Config) -> ModelConfig:
    kinds = {theirs: ours for ours, theirs in LAYER_TYPES.items()}
    rope = config.rope_parameters
    attention = AttentionConfig(
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        rope_dim=int(config.head_dim * config.partial_rotary_factor),
        q_lora_rank=config.q_lora_rank,
        o_groups=config.o_groups,
        o_lora_rank=config.o_lora_rank,
        window=config.sliding_window,
        csa_compression=config.compress_rates[LAYER_TYPES["csa"]],
        hca_compression=config.compress_rates[LAYER_TYPES["hca"]],
        rope=_from_hf_rope(rope["main"]),
        compressed_rope=_from_hf_rope(rope["compress"]),
        indexer=IndexerConfig(config.index_n_heads, config.index_head_dim, config.index_topk, loss_weight=1.0),
        query_chunk=128,
    )
    moe = MoEConfig(
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        num_shared_experts=config.n_shared_experts,
        routed_scaling_factor=config.routed_scaling_factor,
        num_hash_layers=config.mlp_layer_types.count("hash_moe"),
        swiglu_limit=config.swiglu_limit,
        balance_loss_weight=1e-4,
        bias_update_speed=1e-3,
    )
    residual = ResidualConfig(
        kind="mhc",
        num_streams=config.hc_mult,
        sinkhorn_iterations=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        gate_init=0.01,
        pre_bias_init=0.0,
        post_bias_init=0.0,
        mixing_diagonal_init=0.0,
    )
    return ModelConfig(
        name="deepseek_v4",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        attention_mix=[kinds[layer] for layer in config.layer_types],
        norm_eps=config.rms_norm_eps,
        attention=attention,
        moe=moe,
        residual=residual,
        mtp=MTPConfig(num_layers=0, loss_weight=0.3),
        init=InitConfig(seed=0, std=config.initializer_range),
    )


def _from_hf_rope(rope: dict) -> RopeConfig:
    return RopeConfig(
        theta=float(rope["rope_theta"]),
        factor=float(rope.get("factor", 1.0)),
        original_length=int(rope.get("original_max_position_embeddings", 65536)),
        beta_fast=float(rope.get("beta_fast", 32.0)),
        beta_slow=float(rope.get("beta_slow", 1.0)),
    )
