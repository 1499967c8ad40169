"""`gpt_oss`: gqa with sinks, biases and windows, and a mixture of experts whose matrices are transposed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Size, Tensor

from v4train.hf.common import Architecture, Link, describe_common, hold, hold_layers, hold_theirs
from v4train.hf.llama import (
    attention_links,
    attention_settings,
    describe_attention,
    describe_windows,
    window_settings,
)
from v4train.model import ModelConfig
from v4train.model.ffn import OAI_SLOPE
from v4train.model.mix import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "gpt_oss"
ROUTER_AND_EXPERTS = dict(
    num_shared_experts=0,
    scoring="softmax",
    num_groups=1,
    routed_scaling_factor=1.0,
    router_bias=True,
    expert_bias=True,
    activation="swiglu_oai",
    num_hash_layers=0,
)


def settings(config: ModelConfig) -> dict[str, Any]:
    """transformers' configuration. Raises ConfigError for what `gpt_oss` cannot hold."""
    moe = config.moe
    hold_layers(config, NAME, "attention.gqa.", sink=True)
    hold(config, NAME, attention__gqa__qk_norm=False)
    if "dense" in config.ffn_kinds:
        refuse("ffn_mix", config.ffn_mix, f"transformers' {NAME} has no dense layer", "set model.ffn_mix=moe")
    hold(config, NAME, **{f"moe__{key}": value for key, value in ROUTER_AND_EXPERTS.items()})
    if moe.swiglu_limit is None:
        refuse("moe.swiglu_limit", None, f"transformers' {NAME} clamps always", "set it to 7 as released")
    return (
        attention_settings(config, NAME)
        | window_settings(config, NAME)
        | dict(
            num_local_experts=moe.num_experts,
            num_experts_per_tok=moe.top_k,
            intermediate_size=moe.intermediate_size,
            swiglu_limit=moe.swiglu_limit,
            swiglu_alpha=OAI_SLOPE,
        )
    )


def describe(config: PreTrainedConfig, preset: ModelConfig) -> ModelConfig:
    """Our description of a peer."""
    hold_theirs(config, swiglu_alpha=OAI_SLOPE)
    moe = replace(
        preset.moe,
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        swiglu_limit=config.swiglu_limit,
        **ROUTER_AND_EXPERTS,
    )
    return describe_common(
        config,
        preset,
        attention=describe_attention(config, preset.attention, qk_norm=False, sink=True),
        attention_mix=describe_windows(config.layer_types, config.sliding_window),
        ffn_mix=["moe"] * config.num_hidden_layers,
        moe=moe,
    )


def transposed(tensors: list[Tensor], shapes: list[Size], back: bool) -> list[Tensor]:
    """[E, out, in] to [E, in, out], [E, 2, I, M] to [E, M, 2 I] with gate and up alternating, [E, 2, I] likewise."""
    (tensor,), (shape,) = tensors, shapes
    if back:
        turned = (shape[0], shape[-1], *shape[2:-1], shape[1])
        return [tensor.reshape(turned).transpose(1, -1).contiguous()]
    return [tensor.transpose(1, -1).reshape(shape)]


def links(config: ModelConfig) -> list[Link]:
    """Tensors of a block."""
    return [
        *attention_links(config),
        Link("ffn.router.weight", "mlp.router.weight"),
        Link("ffn.router.logit_bias", "mlp.router.bias"),
        Link("ffn.experts.gate_up", "mlp.experts.gate_up_proj", transposed),
        Link("ffn.experts.gate_up_bias", "mlp.experts.gate_up_proj_bias", transposed),
        Link("ffn.experts.down", "mlp.experts.down_proj", transposed),
        Link("ffn.experts.down_bias", "mlp.experts.down_proj_bias"),
    ]


GPT_OSS = Architecture(NAME, (NAME,), settings, describe, links, lacks=("ffn.router.bias",))
