"""Our dense models with norms of queries and keys against transformers' `qwen3`."""

import pytest

from tests.parity.peers import DENSE, THEIR_YARN, YARN, Parity

pytestmark = pytest.mark.parity

SMALL = dict(
    vocab_size=61,
    rms_norm_eps=1e-5,
    hidden_size=22,
    intermediate_size=17,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


class TestQwen3(Parity):
    name = "qwen3"
    base = DENSE | {"attention__gqa__qk_norm": True}
    cases = {
        "gqa": ("gqa gqa", 2, 37, {}),
        "mha, biases": ("mha mha", 2, 23, {"attention__gqa__bias": True}),
        "windows in some layers": ("gqa gqa:window=7 gqa:window=7", 2, 31, {}),
        "yarn": ("gqa gqa", 2, 70, {"attention__gqa__rope": YARN}),
        "odd widths": ("gqa", 3, 33, {"hidden_size": 27, "ffn__intermediate_size": 15, "norm_eps": 1e-5}),
    }
    own = {
        "tied embeddings": SMALL | dict(tie_word_embeddings=True, attention_bias=True),
        "windows in the last layers": SMALL | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
        "yarn": SMALL | dict(max_position_embeddings=160, rope_parameters=THEIR_YARN),
    }
    keeps = ("layers", "ffn")
    refused = {
        "windows that differ": ("gqa:window=9 gqa:window=8", {}, "attention_mix", "windows of one size"),
        "experts": ("gqa", {"ffn_mix": "moe"}, "attention.gqa.sink", "gpt_oss has sink=true only"),
        "mHC": ("gqa", {"residual__kind": "mhc"}, "residual.kind", "plain only"),
    }
    refused_own = {"another activation": ("hidden_act", SMALL | dict(hidden_act="relu"))}
