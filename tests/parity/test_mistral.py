"""Our dense models with a window in every layer against transformers' `mistral`."""

import pytest

from tests.parity.peers import DENSE, THEIR_YARN, YARN, Parity

pytestmark = pytest.mark.parity

SMALL = dict(
    vocab_size=61,
    rms_norm_eps=1e-5,
    hidden_size=22,
    intermediate_size=17,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    sliding_window=7,
)


class TestMistral(Parity):
    name = "mistral"
    base = DENSE
    cases = {
        "window of the layers": ("gqa:window=9 gqa:window=9", 2, 37, {}),
        "window of the section": ("gqa*3", 2, 43, {"attention__gqa__window": 5}),
        "window of two": ("gqa gqa", 2, 19, {"attention__gqa__window": 2}),
        "longer than the text": ("gqa gqa", 2, 21, {"attention__gqa__window": 64}),
        "mqa": ("mqa:window=7 mqa:window=7", 3, 31, {"hidden_size": 30, "ffn__intermediate_size": 13}),
        "yarn": ("gqa gqa", 2, 70, {"attention__gqa__rope": YARN, "attention__gqa__window": 33}),
    }
    own = {
        "window": SMALL,
        "yarn, tied": SMALL | dict(max_position_embeddings=160, rope_parameters=THEIR_YARN, tie_word_embeddings=True),
    }
    keeps = ("layers", "ffn")
    refused = {
        "a layer without": ("gqa:window=9 gqa", {}, "attention.gqa.window", "=None: .* window=9 only"),
        "windows that differ": ("gqa:window=9 gqa:window=8", {}, "attention_mix", "windows of one size"),
        "biases": ("gqa:window=9", {"attention__gqa__bias": True}, "attention.gqa.bias", "=True: .* false only"),
        "dilation": ("gqa:window=9:dilation=2", {}, "attention_mix", "dilation=1 only"),
        "global tokens": (
            "gqa:window=9",
            {"attention__gqa__global_tokens": 2},
            "attention.gqa.global_tokens",
            "=2: .* global_tokens=0 only",
        ),
        "experts": ("mla gqa:window=9", {}, "attention_mix", "no architecture"),
    }
    refused_own = {
        "another scaling": (
            "rope_parameters.rope_type",
            SMALL | dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)),
        ),
    }
