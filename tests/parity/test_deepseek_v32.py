"""Our dsa models against transformers' `deepseek_v32`."""

import pytest
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as peer_module

from tests.parity import test_deepseek_v3 as v3
from tests.parity.peers import THEIR_YARN, YARN, Parity, lower_index_wins_ties

pytestmark = pytest.mark.parity

SMALL = v3.SMALL | dict(index_n_heads=3, index_head_dim=6, index_topk=5)
SMALL.pop("num_nextn_predict_layers")


class TestDeepseekV32(Parity):
    name = "deepseek_v32"
    base = v3.TestDeepseekV3.base
    cases = {
        "dense and experts": ("dsa dsa dsa", 2, 37, {}),
        "groups": ("dsa dsa", 2, 41, {"moe__num_groups": 4, "moe__top_k_groups": 2, "moe__top_k": 3}),
        "dense after experts": ("dsa dsa dsa", 1, 29, {"ffn_mix": "moe dense moe"}),
        "top-1": ("dsa dsa", 2, 31, {"attention__dsa__top_k": 1}),
        "more than there are": ("dsa dsa", 2, 19, {"attention__dsa__top_k": 64}),
        "whole index head rotated": ("dsa dsa", 2, 33, {"attention__dsa__head_dim": 4}),
        "yarn": (
            "dsa dsa",
            2,
            70,
            {"attention__mla__rope": YARN, "attention__mla__logit_factor": v3.MSCALE * v3.MSCALE},
        ),
        "odd widths": (
            "dsa dsa",
            3,
            33,
            {
                "hidden_size": 27,
                "moe__intermediate_size": 11,
                "attention__mla__nope_dim": 5,
                "attention__mla__value_dim": 7,
                "attention__dsa__head_dim": 9,
                "attention__dsa__num_heads": 3,
            },
        ),
    }
    own = {
        "dense and experts": SMALL,
        "yarn as released": SMALL
        | dict(
            max_position_embeddings=160,
            rope_parameters=THEIR_YARN | dict(mscale=1.0, mscale_all_dim=1.0),
            mlp_layer_types=["sparse", "dense", "sparse"],
            first_k_dense_replace=0,
        ),
    }
    keeps = (*v3.TestDeepseekV3.keeps, "attention.dsa")
    refused = {
        "sink": ("dsa dsa", {"attention__mla__sink": True}, "attention.mla.sink", "=True: .* sink=false only"),
        "eps": ("dsa dsa", {"norm_eps": 1e-5}, "norm_eps", "1e-06 only"),
        "V4's router": ("dsa dsa", {"moe__scoring": "sqrtsoftplus"}, "moe.scoring", "sigmoid only"),
        "streams": ("dsa dsa", {"residual__kind": "mhc"}, "residual.kind", "=mhc: .* plain only"),
    }
    refused_own = {"biases": ("attention_bias", SMALL | dict(attention_bias=True))}

    @pytest.fixture(autouse=True)
    def _ties(self, monkeypatch):
        lower_index_wins_ties(monkeypatch, peer_module.DeepseekV32Indexer)
