"""Our dense models against transformers' `llama`."""

from dataclasses import replace

import pytest

from tests.parity.peers import DENSE, THEIR_YARN, YARN, Parity

pytestmark = pytest.mark.parity

SMALL = dict(
    vocab_size=61,
    rms_norm_eps=1e-5,
    hidden_size=24,
    intermediate_size=17,
    num_hidden_layers=2,
    num_attention_heads=4,
)
YARN_WITHOUT_FACTOR = replace(YARN, factor=1.0)


class TestLlama(Parity):
    name = "llama"
    base = DENSE
    cases = {
        "gqa": ("gqa gqa", 2, 37, {}),
        "mha": ("mha mha", 2, 23, {}),
        "mqa": ("mqa", 3, 41, {}),
        "biases": ("gqa gqa", 2, 30, {"attention__gqa__bias": True}),
        "yarn": ("gqa gqa", 2, 70, {"attention__gqa__rope": YARN}),
        "odd widths": ("gqa", 2, 33, {"hidden_size": 28, "ffn__intermediate_size": 15, "vocab_size": 67}),
        "wide heads": ("gqa", 1, 29, {"attention__gqa__head_dim": 14, "attention__gqa__rope_dim": 14}),
        "one token": ("gqa", 2, 1, {}),
    }
    own = {
        "as many KV heads": SMALL,
        "tied embeddings": SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True),
        "yarn": SMALL | dict(head_dim=10, max_position_embeddings=160, rope_parameters=THEIR_YARN),
    }
    keeps = ("layers", "ffn")
    refused = {
        "kinds of several families": ("gqa mla", {}, "attention_mix", "no architecture of transformers mixes"),
        "KV heads that differ": ("gqa mha", {}, "attention_mix", "as many KV heads"),
        "hyper-connections": ("gqa", {"residual__kind": "hc"}, "residual.kind", "=hc: .* plain only; set"),
        "partial RoPE": ("gqa", {"attention__gqa__rope_dim": 4}, "attention.gqa.rope_dim", "=4: .* 8 only"),
        "clamp": ("gqa", {"ffn__swiglu_limit": 7.0}, "ffn.swiglu_limit", "=7.0: .* null only"),
        "width": ("gqa", {"hidden_size": 30}, "hidden_size", "has multiples of model.attention.gqa.num_heads=4"),
        "scaled": ("gqa", {"attention__gqa__rope": YARN_WITHOUT_FACTOR}, "attention.gqa.rope.attention_factor", "YaRN"),
    }
    refused_own = {
        "another scaling": (
            "rope_parameters.rope_type",
            SMALL | dict(rope_parameters=dict(rope_type="linear", factor=2.0)),
        ),
        "biases of the FFN": ("mlp_bias", SMALL | dict(mlp_bias=True)),
        "another activation": ("hidden_act", SMALL | dict(hidden_act="gelu")),
    }
