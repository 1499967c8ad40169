"""Our mla models against transformers' `deepseek_v3`."""

import math

import pytest

from tests.parity.peers import PLAIN, THEIR_YARN, YARN, Parity

pytestmark = pytest.mark.parity

SMALL = dict(
    vocab_size=61,
    hidden_size=22,
    intermediate_size=17,
    moe_intermediate_size=9,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    n_shared_experts=2,
    n_routed_experts=6,
    n_group=3,
    topk_group=2,
    num_experts_per_tok=3,
    q_lora_rank=7,
    kv_lora_rank=5,
    qk_nope_head_dim=3,
    qk_rope_head_dim=4,
    v_head_dim=6,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
)
MSCALE = 0.1 * math.log(YARN.factor) + 1


class TestDeepseekV3(Parity):
    name = "deepseek_v3"
    base = PLAIN | {"moe__scoring": "sigmoid", "moe__swiglu_limit": None, "ffn_mix": "dense moe"}
    cases = {
        "dense and experts": ("mla mla mla", 2, 37, {}),
        "groups": ("mla mla", 2, 41, {"moe__num_groups": 4, "moe__top_k_groups": 2, "moe__top_k": 3}),
        "all experts, three shared": ("mla mla", 2, 23, {"ffn_mix": "moe", "moe__num_shared_experts": 3}),
        "all dense": ("mla mla", 3, 19, {"ffn_mix": "dense"}),
        "yarn": (
            "mla mla",
            2,
            70,
            {"attention__mla__rope": YARN, "attention__mla__logit_factor": MSCALE * MSCALE},
        ),
        "yarn, logits as they are": ("mla mla", 2, 50, {"attention__mla__rope": YARN}),
        "odd widths": (
            "mla mla",
            2,
            33,
            {
                "hidden_size": 27,
                "moe__intermediate_size": 11,
                "ffn__intermediate_size": 13,
                "attention__mla__nope_dim": 5,
                "attention__mla__value_dim": 7,
                "attention__mla__kv_lora_rank": 9,
            },
        ),
    }
    own = {
        "dense and experts": SMALL,
        "yarn as released": SMALL
        | dict(
            max_position_embeddings=160,
            rope_parameters=THEIR_YARN | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
        "yarn of transformers": SMALL
        | dict(
            max_position_embeddings=160,
            rope_parameters=THEIR_YARN | dict(mscale_all_dim=0.707),
            n_group=1,
            topk_group=1,
        ),
    }
    keeps = (
        "layers",
        "ffn",
        *(f"moe.{key}" for key in ("num_experts", "top_k", "intermediate_size", "num_shared_experts", "scoring")),
        *(f"moe.{key}" for key in ("num_groups", "top_k_groups", "routed_scaling_factor", "swiglu_limit")),
    )
    refused = {
        "mixed with dsa": ("mla dsa", {}, "attention_mix", "no architecture"),
        "window": ("mla mla:window=8", {}, "attention_mix", "=mla:window=8: .* window=null only"),
        "sink": ("mla mla", {"attention__mla__sink": True}, "attention.mla.sink", "sink=false only"),
        "eps": ("mla mla", {"norm_eps": 1e-5}, "norm_eps", "1e-06 only"),
        "dense last": ("mla mla", {"ffn_mix": "moe dense"}, "ffn_mix", "dense layers first"),
        "clamp": ("mla mla", {"moe__swiglu_limit": 10.0}, "moe.swiglu_limit", "null only"),
        "logits": ("mla mla", {"attention__mla__logit_factor": 1.5}, "attention.mla.logit_factor", "only with YaRN"),
        "no shared expert": ("mla mla", {"moe__num_shared_experts": 0}, "moe.num_shared_experts", "1 at least"),
        "hash layer": ("mla", {"ffn_mix": "moe", "moe__num_hash_layers": 1}, "moe.num_hash_layers", "0 only"),
    }
    refused_own = {
        "eps": ("rms_norm_eps", SMALL | dict(rms_norm_eps=1e-5)),
        "full queries": ("q_lora_rank", SMALL | dict(q_lora_rank=None)),
        "biases": ("attention_bias", SMALL | dict(attention_bias=True)),
        "half-split RoPE": ("rope_interleave", SMALL | dict(rope_interleave=False)),
    }
