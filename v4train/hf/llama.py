"""`llama`, `mistral` (a window in every layer), `qwen3` (norms of queries and keys): gqa with a dense SwiGLU.

Their rotary pairs are channels (i, i + D/2) of a head, ours (2i, 2i + 1): rows of queries and keys change places.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from v4train.hf.common import (
    Architecture,
    Link,
    common_settings,
    describe_common,
    describe_rope,
    half_split,
    hold,
    hold_layers,
    hold_theirs,
    rope_settings,
    swiglu,
)
from v4train.model import ModelConfig
from v4train.model.config import AttentionConfig
from v4train.model.mix import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PRESET = ("dense_small", "model/attention=v4_flash")


def settings(config: ModelConfig, name: str) -> dict[str, Any]:
    """transformers' configuration. Raises ConfigError for what `name` cannot hold."""
    made = attention_settings(config, name) | {"intermediate_size": config.ffn.intermediate_size}
    hold(config, name, ffn__swiglu_limit=None)
    windows = window_settings(config, name)
    if name == "qwen3":
        return made | windows | {"use_sliding_window": "sliding_window" in windows}
    if name == "mistral":
        hold(config, name, attention__gqa__bias=False)
        del made["attention_bias"]
        hold_layers(config, name, "attention.gqa.", window=windows["sliding_window"])
        return made | {"sliding_window": windows["sliding_window"]}
    if config.hidden_size % config.attention.gqa.num_heads:
        rule = f"transformers' llama has multiples of model.attention.gqa.num_heads={config.attention.gqa.num_heads}"
        refuse("hidden_size", config.hidden_size, rule, "change one of the two")
    return made


def attention_settings(config: ModelConfig, name: str) -> dict[str, Any]:
    """Settings of grouped-query attention and of the whole model, windows apart; for gpt-oss too."""
    gqa = config.attention.gqa
    hold(config, name, residual__kind="plain", attention__gqa__rope_dim=gqa.head_dim)
    hold_layers(config, name, "attention.gqa.", dilation=1, global_tokens=0)
    kv_heads = {layer.num_kv_heads for layer in config.layers}
    if len(kv_heads) > 1:
        rule = f"transformers' {name} has as many KV heads in each layer"
        refuse("attention_mix", config.attention_mix, rule, "use one of mha, mqa and gqa")
    return common_settings(config, gqa.rope) | dict(
        num_attention_heads=gqa.num_heads,
        num_key_value_heads=kv_heads.pop(),
        head_dim=gqa.head_dim,
        attention_bias=gqa.bias,
        rope_parameters=rope_settings(gqa.rope, "attention.gqa.rope"),
    )


def window_settings(config: ModelConfig, name: str) -> dict[str, Any]:
    """Which layers have a window, and its size where there is one."""
    windows = [layer.options.window for layer in config.layers]
    sizes = set(windows) - {None}
    if len(sizes) > 1:
        rule = f"transformers' {name} has windows of one size"
        refuse("attention_mix", config.attention_mix, rule, "use the same window in each layer that has one")
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"layer_types": types, **({"sliding_window": sizes.pop()} if sizes else {})}


def describe(config: PreTrainedConfig, preset: ModelConfig) -> ModelConfig:
    """Our description of a peer."""
    hold_theirs(config, hidden_act="silu", mlp_bias=False)
    window = getattr(config, "sliding_window", None)
    everywhere = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    attention = describe_attention(config, preset.attention, qk_norm=config.model_type == "qwen3", sink=False)
    return describe_common(
        config,
        preset,
        attention=attention,
        attention_mix=describe_windows(getattr(config, "layer_types", None) or everywhere, window),
        ffn_mix=["dense"] * config.num_hidden_layers,
        ffn=replace(preset.ffn, intermediate_size=config.intermediate_size, swiglu_limit=None),
    )


def describe_attention(config: PreTrainedConfig, preset: AttentionConfig, **more: Any) -> AttentionConfig:
    """The attention section of a peer with grouped-query attention; `more` fields of `gqa`."""
    gqa = replace(
        preset.gqa,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_dim=config.head_dim,
        bias=getattr(config, "attention_bias", False),
        window=None,
        dilation=1,
        global_tokens=0,
        rope=describe_rope(config, preset.rope),
        **more,
    )
    return replace(preset, gqa=gqa)


def describe_windows(layer_types: list[str], window: int | None) -> list[str]:
    """The attention mix."""
    words = {"full_attention": "gqa", "sliding_attention": f"gqa:window={window}"}
    return [words[kind] for kind in layer_types]


def attention_links(config: ModelConfig) -> list[Link]:
    """Tensors of grouped-query attention."""
    gqa = config.attention.gqa
    rotated = partial(half_split, head_dim=gqa.head_dim, rope_dim=gqa.rope_dim)
    projections = [
        link
        for part in ("weight", "bias")
        for link in (
            Link(f"attention.query.{part}", f"self_attn.q_proj.{part}", rotated),
            Link(f"attention.key.{part}", f"self_attn.k_proj.{part}", rotated),
            Link(f"attention.value.{part}", f"self_attn.v_proj.{part}"),
            Link(f"attention.output.{part}", f"self_attn.o_proj.{part}"),
        )
    ]
    return [
        *projections,
        Link("attention.query_norm.weight", "self_attn.q_norm.weight", rotated),
        Link("attention.key_norm.weight", "self_attn.k_norm.weight", rotated),
        Link("attention.sink", "self_attn.sinks"),
    ]


def links(config: ModelConfig) -> list[Link]:
    """Tensors of a block."""
    return [*attention_links(config), *swiglu("ffn", "mlp")]


LLAMA, MISTRAL, QWEN3 = (
    Architecture(name, PRESET, partial(settings, name=name), describe, links) for name in ("llama", "mistral", "qwen3")
)
