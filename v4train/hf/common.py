"""What every architecture shares: names and layouts of tensors, RoPE, refusals, and what transformers doesn't record.

transformers is imported when used: the library itself does not need it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Size, Tensor

from v4train.errors import ConfigError
from v4train.model import ModelConfig, model_config
from v4train.model.config import RopeConfig
from v4train.model.mix import expand_mix, parse_layer, refuse
from v4train.overrides import config_dir

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Layout = Callable[[list[Tensor], list[Size], bool], list[Tensor]]


def packed(tensors: list[Tensor], shapes: list[Size], back: bool, groups: int = 1) -> list[Tensor]:
    """The numbers of all tensors in a row, cut into tensors of `shapes`: stacks, splits and folds, either way.

    groups: leading parts of every tensor, such as heads; the tensors alternate part by part.
    """
    row = torch.cat([tensor.reshape(groups, -1) for tensor in tensors], dim=1)
    parts = row.split([math.prod(shape) // groups for shape in shapes], dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def half_split(tensors: list[Tensor], shapes: list[Size], back: bool, head_dim: int, rope_dim: int) -> list[Tensor]:
    """Channels of each head [H * D, ...]: ours rotate in pairs (2i, 2i + 1) and come last, theirs in pairs
    (i, i + R/2) and come first."""
    plain = head_dim - rope_dim
    order = [*range(plain, head_dim, 2), *range(plain + 1, head_dim, 2), *range(plain)]
    index = torch.tensor(order).argsort() if back else torch.tensor(order)
    return [tensor.unflatten(0, (-1, head_dim))[:, index.to(tensor.device)].flatten(0, 1) for tensor in tensors]


@dataclass(frozen=True)
class Link:
    """The same numbers on both sides: names, several with spaces between them, and the change of layout."""

    ours: str
    theirs: str
    layout: Layout = packed

    def within(self, ours: str, theirs: str) -> Link:
        """The link of one block, whose names have these prefixes."""
        return Link(_prefix(self.ours, ours), _prefix(self.theirs, theirs), self.layout)


def _prefix(names: str, prefix: str) -> str:
    return " ".join(prefix + name for name in names.split())


TRUNK = [
    Link("embedding.lookup.weight", "model.embed_tokens.weight"),
    Link("head.output_norm.norm.weight", "model.norm.weight"),
    Link("head.lm_head.weight", "lm_head.weight"),
]
NORMS = [
    Link("attention_norm.weight", "input_layernorm.weight"),
    Link("ffn_norm.weight", "post_attention_layernorm.weight"),
]


def swiglu(ours: str, theirs: str) -> list[Link]:
    """A dense SwiGLU, as a layer's FFN or as shared expert."""
    return [
        Link(f"{ours}.gate_up.weight", f"{theirs}.gate_proj.weight {theirs}.up_proj.weight"),
        Link(f"{ours}.down.weight", f"{theirs}.down_proj.weight"),
    ]


# Mixture of experts as in DeepSeek's models
DEEPSEEK_MOE = [
    *swiglu("ffn.shared", "mlp.shared_experts"),
    Link("ffn.router.weight", "mlp.gate.weight"),
    Link("ffn.router.bias", "mlp.gate.e_score_correction_bias"),
    Link("ffn.experts.gate_up", "mlp.experts.gate_up_proj"),
    Link("ffn.experts.down", "mlp.experts.down_proj"),
]


@dataclass(frozen=True)
class Architecture:
    """How one architecture of transformers holds our models.

    name: its `model_type`.
    preset: model of `conf/model` and overrides, for all that transformers doesn't record or the architecture lacks.
    settings: its configuration of one of our models; raises ConfigError where it can't hold it.
    describe: the way back: the preset, with the peer's configuration in place; raises ConfigError likewise.
    links: tensors of a block; those of an option that a model does not have are passed over.
    trunk: tensors outside the blocks.
    lacks: ends of the names of our tensors that it has no place for: they must be zero, and are on the way back.
    """

    name: str
    preset: tuple[str, ...]
    settings: Callable[[ModelConfig], dict[str, Any]]
    describe: Callable[[PreTrainedConfig, ModelConfig], ModelConfig]
    links: Callable[[ModelConfig], list[Link]]
    trunk: tuple[Link, ...] = tuple(TRUNK)
    lacks: tuple[str, ...] = ()

    def all_links(self, config: ModelConfig) -> list[Link]:
        """Of the whole model."""
        block = [*NORMS, *self.links(config)]
        layers = range(config.num_layers)
        return [*self.trunk] + [
            link.within(f"blocks.{layer}.", f"model.layers.{layer}.") for layer in layers for link in block
        ]


def convert(
    links: list[Link], source: dict[str, Tensor], shapes: dict[str, Size], back: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors as theirs, or `back`, in the shapes that the other side has; and the names no link takes."""
    made, left = {}, dict.fromkeys(source)
    for link in links:
        taken, names = (side.split() for side in ((link.theirs, link.ours) if back else (link.ours, link.theirs)))
        if taken[0] in source:
            tensors = link.layout([source[name] for name in taken], [shapes[name] for name in names], back)
            made.update(zip(names, tensors, strict=True))
            for name in taken:
                del left[name]
    return made, list(left)


def common_settings(config: ModelConfig, rope: RopeConfig) -> dict[str, Any]:
    """Settings that all architectures have. Special tokens are the tokenizer's matter: none."""
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init.std,
        max_position_embeddings=int(rope.factor * rope.original_length),
        tie_word_embeddings=config.tie_embedding,
        bos_token_id=None,
        eos_token_id=None,
    )


def describe_common(config: PreTrainedConfig, preset: ModelConfig, **more: Any) -> ModelConfig:
    """`preset` with what all architectures record, `more` fields, and without MTP, which stays behind."""
    return replace(
        preset,
        name=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        norm_eps=config.rms_norm_eps,
        tie_embedding=config.tie_word_embeddings,
        mtp=replace(preset.mtp, num_layers=0),
        init=replace(preset.init, std=config.initializer_range),
        **more,
    )


def rope_settings(rope: RopeConfig, key: str) -> dict[str, Any]:
    """transformers' `rope_parameters`; `key` names ours below `model` in messages."""
    if rope.factor > 1:
        return {
            "rope_type": "yarn",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_length,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
            "attention_factor": rope.attention_factor,
        }
    if rope.attention_factor != 1:
        rule = "transformers scales cosines and sines only with YaRN"
        refuse(f"{key}.attention_factor", rope.attention_factor, rule, f"set model.{key}.attention_factor=1")
    return {"rope_type": "default", "rope_theta": rope.theta}


def describe_rope(config: PreTrainedConfig, plain: RopeConfig, label: str | None = None) -> RopeConfig:
    """The way back. plain: rotary embedding of the preset without YaRN; label: of a nested `rope_parameters`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters if label is None else config.rope_parameters[label]
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    if label is None and (parameters.get("partial_rotary_factor") or 1.0) != 1:
        refuse_theirs(config, "partial_rotary_factor", parameters["partial_rotary_factor"], "whole heads are rotated")
    if kind == "default":
        return replace(plain, theta=theta, original_length=config.max_position_embeddings)
    if kind != "yarn":
        refuse_theirs(config, "rope_parameters.rope_type", kind, "default and yarn are known here")
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, layer_type=label)
    return RopeConfig(
        theta=theta,
        factor=float(parameters["factor"]),
        original_length=int(parameters["original_max_position_embeddings"]),
        beta_fast=float(parameters.get("beta_fast") or plain.beta_fast),
        beta_slow=float(parameters.get("beta_slow") or plain.beta_slow),
        truncate=bool(parameters.get("truncate", plain.truncate)),
        attention_factor=float(attention_factor),
    )


def hold(config: ModelConfig, name: str, **only: Any) -> None:
    """Refuse the first key whose value is not the only one that architecture `name` has; `__` stands for a dot."""
    for path, wanted in only.items():
        key = path.replace("__", ".")
        value = functools.reduce(getattr, key.split("."), config)
        if value != wanted:
            refuse(key, value, f"transformers' {name} has {_word(wanted)} only", f"set model.{key}={_word(wanted)}")


def hold_layers(config: ModelConfig, name: str, section: str, **only: Any) -> None:
    """As `hold`, for options that a layer may have from its word in the mix or from `attention.<section>`."""
    for word, layer in zip(expand_mix(config.attention_mix), config.layers, strict=True):
        for option, wanted in only.items():
            value = getattr(layer.options, option)
            if value == wanted:
                continue
            key, shown = (section + option, value) if option not in parse_layer(word)[1] else ("attention_mix", word)
            rule = f"transformers' {name} has {option}={_word(wanted)} only"
            refuse(key, shown, rule, "make it so in each layer")


def hold_theirs(config: PreTrainedConfig, **only: Any) -> None:
    """Refuse the first setting of a peer, of those it has, that is not the only one known here."""
    for key, wanted in only.items():
        if getattr(config, key, wanted) != wanted:
            refuse_theirs(config, key, getattr(config, key), f"{_word(wanted)} is known here")


def refuse_theirs(config: PreTrainedConfig, key: str, value: object, rule: str) -> NoReturn:
    """Raise ConfigError about a setting of transformers."""
    raise ConfigError(f"{config.model_type}.{key}", value, rule, "convert a model that has it so")


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@functools.cache
def load_preset(name: str, *overrides: str) -> ModelConfig:
    """A model of `conf/model`. Shared between callers: not to be changed."""
    hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()  # of the program that calls us, for the time being
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose(f"model/{name}", overrides=["+seed=0", *overrides])
    finally:
        GlobalHydra.instance().hydra = hydra
    return model_config(composed.model)
