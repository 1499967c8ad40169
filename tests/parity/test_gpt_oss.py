"""Our models with sinks, biases and a softmax router against transformers' `gpt_oss`."""

import math
from dataclasses import replace

import pytest
import torch

from tests.parity.peers import PLAIN, THEIR_YARN, YARN, Parity
from v4train.errors import ConfigError
from v4train.hf import to_hf

pytestmark = pytest.mark.parity

SMALL = dict(
    vocab_size=61,
    hidden_size=22,
    intermediate_size=9,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    sliding_window=7,
    num_local_experts=5,
    num_experts_per_tok=3,
)
OSS_YARN = replace(YARN, truncate=False, attention_factor=0.1 * math.log(YARN.factor) + 1)


class TestGptOss(Parity):
    name = "gpt_oss"
    base = PLAIN | {
        "attention__gqa__sink": True,
        "attention__gqa__bias": True,
        "moe__scoring": "softmax",
        "moe__num_shared_experts": 0,
        "moe__routed_scaling_factor": 1.0,
        "moe__router_bias": True,
        "moe__expert_bias": True,
        "moe__activation": "swiglu_oai",
        "moe__swiglu_limit": 1.5,
    }
    cases = {
        "windows in turn": ("(gqa:window=7 gqa)*2", 2, 37, {}),
        "yarn": ("gqa:window=33 gqa", 2, 70, {"attention__gqa__rope": OSS_YARN}),
        "no window": ("gqa gqa", 2, 23, {}),
        "no bias, mha": ("mha mha:window=4", 2, 19, {"attention__gqa__bias": False}),
        "odd widths": ("gqa:window=5 gqa", 3, 31, {"hidden_size": 27, "moe__intermediate_size": 11}),
        "top-1": ("gqa:window=5", 2, 29, {"moe__top_k": 1}),
    }
    own = {
        "windows in turn": SMALL | dict(rope_parameters=dict(rope_type="default")),
        "yarn": SMALL | dict(max_position_embeddings=160, rope_parameters=THEIR_YARN | dict(truncate=False)),
        "no bias, tied": SMALL | dict(attention_bias=False, tie_word_embeddings=True, swiglu_limit=0.5),
    }
    keeps = (
        "layers",
        *(
            f"moe.{key}"
            for key in ("num_experts", "top_k", "intermediate_size", "swiglu_limit", "activation", "scoring")
        ),
    )
    refused = {
        "no sink": ("gqa:sink=false gqa", {}, "attention_mix", "sink=true only"),
        "dense layers": ("gqa gqa", {"ffn_mix": "dense moe"}, "ffn_mix", "no dense layer"),
        "norms of queries": ("gqa", {"attention__gqa__qk_norm": True}, "attention.gqa.qk_norm", "false only"),
        "V4's router": ("gqa", {"moe__scoring": "sqrtsoftplus"}, "moe.scoring", "softmax only"),
        "shared expert": ("gqa", {"moe__num_shared_experts": 1}, "moe.num_shared_experts", "=1: .* 0 only"),
        "no clamp": ("gqa", {"moe__swiglu_limit": None}, "moe.swiglu_limit", "clamps"),
        "plain SwiGLU": ("gqa", {"moe__activation": "swiglu"}, "moe.activation", "swiglu_oai only"),
    }
    refused_own = {"another slope": ("swiglu_alpha", SMALL | dict(swiglu_alpha=1.0))}

    def prepare(self, model):
        for router in model.routers().values():
            router.bias.zero_()  # it has no selection bias

    def test_refuses_a_selection_bias(self):
        model = self.model("gqa gqa")
        with torch.no_grad():
            model.blocks[1].ffn.router.bias[2] = 0.1
        with pytest.raises(ConfigError, match="gpt_oss has no place") as caught:
            to_hf(model)
        assert caught.value.key == "blocks.1.ffn.router.bias"
