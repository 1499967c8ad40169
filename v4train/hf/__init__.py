"""To and from transformers: `to_hf(model)` and `from_hf(path_or_model)`.

    llama mistral qwen3    mha, mqa or gqa layers, dense; a window in each (mistral), norms of queries and keys (qwen3)
    gpt_oss                the same with sinks and its mixture of experts
    deepseek_v3            mla layers
    deepseek_v32           dsa layers
    deepseek_v4            swa, csa and hca layers

The MTP block has no counterpart there: it stays behind. transformers is imported when used.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from v4train.errors import ConfigError
from v4train.hf.common import Architecture, convert, load_preset
from v4train.hf.deepseek_v3 import DEEPSEEK_V3, DEEPSEEK_V32
from v4train.hf.deepseek_v4 import DEEPSEEK_V4
from v4train.hf.gpt_oss import GPT_OSS
from v4train.hf.llama import LLAMA, MISTRAL, QWEN3
from v4train.model import ModelConfig, Transformer, model_config
from v4train.model.mix import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["from_hf", "to_hf"]

ALL = (LLAMA, MISTRAL, QWEN3, GPT_OSS, DEEPSEEK_V3, DEEPSEEK_V32, DEEPSEEK_V4)
ARCHITECTURES = {architecture.name: architecture for architecture in ALL}


def architecture_for(config: ModelConfig) -> Architecture:
    """The architecture nearest to one of our models; its `settings` say whether it fits.

    Raises:
        ConfigError: layers of several families.
    """
    kinds, layers = set(config.layer_kinds), config.layers
    if kinds <= {"mha", "mqa", "gqa"}:
        if "moe" in config.ffn_kinds or any(layer.options.sink for layer in layers):
            return GPT_OSS
        if config.attention.gqa.qk_norm:
            return QWEN3
        return MISTRAL if any(layer.options.window for layer in layers) else LLAMA
    for family, architecture in (({"mla"}, DEEPSEEK_V3), ({"dsa"}, DEEPSEEK_V32), ({"swa", "csa", "hca"}, DEEPSEEK_V4)):
        if kinds <= family:
            return architecture
    rule = "no architecture of transformers mixes these kinds"
    remedy = "use one family: mha, mqa, gqa; or mla; or dsa; or swa, csa, hca"
    refuse("attention_mix", config.attention_mix, rule, remedy)


def to_hf(model: Transformer) -> PreTrainedModel:
    """A transformers model with the same weights (without the MTP block), on the CPU in fp32, in eval mode.

    Raises:
        ConfigError: the first key of the model's description that no architecture holds.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = architecture_for(model.config)
    settings = AutoConfig.for_model(architecture.name, **architecture.settings(model.config))
    with torch.device("cpu"):
        peer = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state, left = convert(architecture.all_links(model.config), ours, _shapes(peer.state_dict()))
    for name in left:
        if not name.startswith("mtp.") and (not name.endswith(architecture.lacks) or ours[name].any()):
            rule = f"transformers' {architecture.name} has no place for this tensor"
            raise ConfigError(name, "not zero", rule, "set it to zero; a router's is moved by moe.bias_update_speed")
    peer.load_state_dict(state, strict=True)
    return peer.eval()


def from_hf(source: str | Path | PreTrainedModel) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our description and state dict of a transformers model, or of a directory (or name on the hub) that holds one.

    `build_model(config).load_state_dict(state)` is the same model, without MTP. What transformers does not record
    (loss weights, initialisation, kinds of layer that the model lacks) comes from the nearest preset of `conf/model`.

    Raises:
        ConfigError: no model there, an unknown architecture, or a setting that has no equivalent here.
    """
    peer = _load(source) if isinstance(source, str | Path) else source
    architecture = _known(peer.config.model_type)
    preset = copy.deepcopy(load_preset(*architecture.preset))
    config = model_config(architecture.describe(peer.config, preset))
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    theirs = {name: tensor.detach() for name, tensor in peer.state_dict().items()}
    state, left = convert(architecture.all_links(config), theirs, _shapes(expected), back=True)
    lacking = [name for name in expected if name not in state]
    state |= {name: torch.zeros(expected[name].shape) for name in lacking if name.endswith(architecture.lacks)}
    for name in [*left, *(name for name in lacking if name not in state)]:
        where = "one of ours" if name in expected else "one of transformers'"
        raise ConfigError(name, where, "the other side has no such tensor", "give a whole ...ForCausalLM")
    return config, {name: state[name].to(tensor.dtype).clone() for name, tensor in expected.items()}


def _load(source: str | Path) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        model_type = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        rule = str(error).splitlines()[0].rstrip(".")
        raise ConfigError("checkpoint", source, rule, "give a directory with a config.json") from error
    _known(model_type)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def _known(model_type: str) -> Architecture:
    if model_type not in ARCHITECTURES:
        rule = f"known architectures: {', '.join(ARCHITECTURES)}"
        raise ConfigError("model_type", model_type, rule, "convert one of those")
    return ARCHITECTURES[model_type]


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
