"""Our model against transformers' `deepseek_v4`: same weights, same logits, same gradients, same decoding."""

import pytest
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as peer_module

from tests.parity.peers import THEIR_YARN, Parity, lower_index_wins_ties

pytestmark = pytest.mark.parity


SMALL = dict(
    vocab_size=61,
    hidden_size=20,
    num_hidden_layers=3,
    layer_types=["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"],
    compress_rates={"compressed_sparse_attention": 3, "heavily_compressed_attention": 9},
    num_attention_heads=6,
    head_dim=10,
    partial_rotary_factor=0.4,
    q_lora_rank=7,
    o_groups=3,
    o_lora_rank=5,
    sliding_window=6,
    index_n_heads=3,
    index_head_dim=6,
    index_topk=4,
    n_routed_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=9,
    mlp_layer_types=["hash_moe", "moe", "moe"],
    hc_mult=2,
    hc_sinkhorn_iters=3,
    hc_eps=1e-5,
    rms_norm_eps=1e-5,
    routed_scaling_factor=2.0,
    swiglu_limit=0.5,
    num_nextn_predict_layers=0,
)


class TestDeepseekV4(Parity):
    name = "deepseek_v4"
    base = {"mtp__num_layers": 0}
    cases = {
        "v4 order, hash layer": ("swa swa csa hca csa hca", 2, 75, {}),
        "window only": ("swa swa", 2, 37, {}),
        "csa": ("csa csa", 2, 61, {}),
        "hca": ("hca hca", 3, 77, {}),
        "two hash layers": ("hca csa csa", 1, 50, {"moe__num_hash_layers": 2}),
        "no hash layer": ("csa swa hca", 2, 43, {"moe__num_hash_layers": 0}),
        "published ratios": ("csa hca", 1, 290, {"attention__hca_compression": 128, "attention__window": 16}),
        "top-1 of many": ("csa csa", 2, 70, {"attention__indexer__top_k": 1}),
        "shorter than a block": ("csa hca", 2, 3, {}),
        "two streams": ("csa hca", 2, 41, {"residual__num_streams": 2}),
        "odd expert width": ("csa", 2, 33, {"moe__intermediate_size": 15, "hidden_size": 30}),
        "whole head rotated": ("csa hca", 2, 40, {"attention__rope_dim": 16, "attention__indexer__head_dim": 16}),
        "44 * (30 / 44) < 30": (
            "csa hca",
            2,
            40,
            {"attention__head_dim": 44, "attention__rope_dim": 30, "attention__indexer__head_dim": 32},
        ),
    }
    own = {
        "plain RoPE": SMALL | dict(rope_parameters=dict(rope_type="default")),
        "yarn": SMALL | dict(rope_parameters=THEIR_YARN, max_position_embeddings=160, compress_rope_theta=1000.0),
    }
    keeps = (
        "layer_kinds",
        *(
            f"attention.{key}"
            for key in ("num_heads", "head_dim", "rope_dim", "q_lora_rank", "o_groups", "o_lora_rank")
        ),
        *(f"attention.{key}" for key in ("window", "csa_compression", "hca_compression", "rope", "compressed_rope")),
        "attention.indexer",
        *(f"moe.{key}" for key in ("num_experts", "top_k", "intermediate_size", "routed_scaling_factor")),
        *("moe.num_hash_layers", "moe.swiglu_limit"),
        *(f"residual.{key}" for key in ("num_streams", "sinkhorn_iterations", "eps")),
    )
    refused = {
        "another family": ("swa gqa", {}, "attention_mix", "no architecture"),
        "windows that differ": ("swa csa:window=4", {}, "attention_mix", "=csa:window=4: .* window=8 only"),
        "plain residual": ("swa", {"residual__kind": "plain"}, "residual.kind", "set model.residual.kind=mhc"),
        "dense layer": ("swa csa", {"ffn_mix": "moe dense"}, "ffn_mix", "no dense layer"),
        "scores": ("swa swa", {"moe__scoring": "sigmoid"}, "moe.scoring", "=sigmoid: .* sqrtsoftplus only"),
        "shared experts": ("swa", {"moe__num_shared_experts": 2}, "moe.num_shared_experts", "=2: .* 1 only"),
        "no clamp": ("swa swa", {"moe__swiglu_limit": None}, "moe.swiglu_limit", "clamps"),
        "groups": ("swa swa", {"moe__num_groups": 2, "moe__top_k_groups": 2}, "moe.num_groups", "=2"),
        "sharp ramp": (
            "hca",
            {"attention__compressed_rope__truncate": False},
            "attention.compressed_rope.truncate",
            "=False: .* true only",
        ),
    }
    refused_own = {
        "hash layers at the end": ("mlp_layer_types", SMALL | dict(mlp_layer_types=["moe", "moe", "hash_moe"])),
        "gates as they are": ("norm_topk_prob", SMALL | dict(norm_topk_prob=False)),
    }

    @pytest.fixture(autouse=True)
    def _ties(self, monkeypatch):
        lower_index_wins_ties(monkeypatch, peer_module.DeepseekV4Indexer)
