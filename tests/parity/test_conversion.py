"""Conversion to and from transformers: what holds for all architectures. Whole shipped models are compared on meta."""

import json

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from tests.parity.peers import UNCOMPARED
from v4train.errors import ConfigError
from v4train.hf import ARCHITECTURES, architecture_for, from_hf
from v4train.hf.common import convert, load_preset
from v4train.model import Transformer
from v4train.overrides import config_dir

pytestmark = pytest.mark.parity

SHIPPED = {
    "dense_small": "llama",
    "gpt_oss_small": "gpt_oss",
    "gpt_oss": "gpt_oss",
    "v3_small": "deepseek_v3",
    "v3": "deepseek_v3",
    "v32_small": "deepseek_v32",
    "v32": "deepseek_v32",
    "flash_small": "deepseek_v4",
    "flash": "deepseek_v4",
    "pro": "deepseek_v4",
}
TINY = dict(vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("preset", SHIPPED)
def test_every_tensor_of_a_shipped_model_has_its_place(preset):
    config = load_preset(preset)
    architecture = architecture_for(config)
    assert architecture.name == SHIPPED[preset]
    with torch.device("meta"):
        ours = Transformer(config).state_dict()
        peer = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture.name, **architecture.settings(config))
        )
    shapes = {name: tensor.shape for name, tensor in peer.state_dict().items()}
    made, left = convert(architecture.all_links(config), ours, shapes)
    assert {name: tensor.shape for name, tensor in made.items()} == shapes
    assert all(name.startswith("mtp.") or name.endswith(architecture.lacks) for name in left)
    again, state = from_hf(peer)
    assert architecture.settings(again) == architecture.settings(config)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in ours.items() if not name.startswith("mtp.")
    }


@pytest.mark.parametrize(
    ("preset", "differs"),
    [
        ("gpt_oss", set()),
        ("v32", {"initializer_range"}),  # ours is the V3 report's
        ("flash", {"layer_types", "num_nextn_predict_layers"}),  # theirs is V4-Pro's, and MTP stays behind
    ],
)
def test_a_preset_is_what_transformers_has_for_the_released_model(preset, differs):
    config = load_preset(preset)
    architecture = architecture_for(config)
    ours = AutoConfig.for_model(architecture.name, **architecture.settings(config)).to_dict()
    theirs = AutoConfig.for_model(architecture.name).to_dict()
    assert {key for key in theirs.keys() - UNCOMPARED if ours[key] != theirs[key]} == differs


@pytest.mark.parametrize(
    ("settings", "key"),
    [(None, "checkpoint"), ({}, "checkpoint"), ({"model_type": "gpt2"}, "model_type")],
    ids=["no directory", "no model_type", "another architecture"],
)
def test_refuses_a_directory_without_a_known_model(settings, key, tmp_path):
    if settings is not None:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        from_hf(tmp_path / "nothing" if settings is None else tmp_path)
    assert caught.value.key == key and "\n" not in str(caught.value)


def test_refuses_a_model_without_a_head():
    with pytest.raises(ConfigError, match="ForCausalLM"):
        from_hf(LlamaModel(LlamaConfig(**TINY)))


def test_weights_of_half_precision_come_as_fp32():
    peer = LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16)
    state = from_hf(peer)[1]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["head.lm_head.weight"], peer.lm_head.weight.float())


def test_tied_embeddings_stay_tied_and_come_as_two_tensors():
    config, state = from_hf(LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)))
    assert config.tie_embedding
    assert torch.equal(state["head.lm_head.weight"], state["embedding.lookup.weight"])
    assert state["head.lm_head.weight"].data_ptr() != state["embedding.lookup.weight"].data_ptr()


def test_presets_load_within_a_running_hydra_program():
    load_preset.cache_clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert load_preset("v3").name == "v3"
        assert GlobalHydra.instance().hydra is outer


def test_presets_of_all_architectures_are_of_their_own():
    for name, architecture in ARCHITECTURES.items():
        expected = {"mistral": "llama", "qwen3": "llama"}.get(name, name)
        assert architecture_for(load_preset(*architecture.preset)).name == expected
