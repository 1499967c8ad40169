"""Closed forms of the cache against the bytes that a real one allocates, and against published sizes."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.models import tiny_config
from v4train.analysis.kv_cache import cache_bytes, cache_bytes_per_token, layer_cache_bytes
from v4train.config import load
from v4train.model import Transformer, model_config

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}

window = st.integers(1, 40).map("window={}".format)
options = st.tuples(
    window, st.integers(1, 5).map("dilation={}".format), st.integers(0, 12).map("global_tokens={}".format)
)
local_words = st.tuples(st.sampled_from(["mha", "mqa", "gqa", "mla"]), st.one_of(st.just(()), options))
v4_words = st.tuples(st.sampled_from(["swa", "csa", "hca"]), st.one_of(st.just(()), st.tuples(window)))
words = st.one_of(local_words, v4_words).map(lambda parts: ":".join([parts[0], *parts[1]])) | st.just("dsa")


def real_cache(config, batch, max_length, dtype=None, device="meta"):
    with torch.device(device):
        return Transformer(config).new_cache(batch, max_length, dtype)


def real_bytes(buffer):
    return sum(tensor.numel() * tensor.element_size() for tensor in buffer.tensors)


@settings(max_examples=120)
@given(
    mix=st.lists(words, min_size=1, max_size=4),
    batch=st.integers(1, 3),
    max_length=st.integers(1, 150),
    size=st.sampled_from(list(DTYPES)),
    csa_compression=st.integers(1, 9),
    hca_compression=st.integers(1, 33),
    widths=st.tuples(*[st.integers(1, 4)] * 4),
    residual=st.sampled_from(["plain", "hc", "mhc"]),
)
@example(["csa", "hca"], 1, 1, 4, 1, 1, (1, 1, 1, 1), "plain")  # nothing ever waits for a block
@example(["csa", "hca"], 2, 3, 4, 4, 16, (1, 1, 1, 1), "plain")  # shorter than a block
@example(["mla:window=40:dilation=5:global_tokens=12"], 2, 7, 4, 4, 16, (1, 1, 1, 1), "plain")  # than all of them
def test_any_mix_to_the_byte(mix, batch, max_length, size, csa_compression, hca_compression, widths, residual):
    config = model_config(
        tiny_config(
            mix,
            attention__csa_compression=csa_compression,
            attention__hca_compression=hca_compression,
            attention__head_dim=4 * widths[0] + 4,
            attention__gqa__head_dim=8 * widths[1],
            attention__mla__kv_lora_rank=5 * widths[2],
            attention__indexer__head_dim=8 * widths[3],
            attention__dsa__head_dim=4 * widths[3],
            residual__kind=residual,
        )
    )
    cache = real_cache(config, batch, max_length, DTYPES[size])
    for layer, buffers in zip(config.layers, cache.layers, strict=True):
        expected = {name: real_bytes(buffer) for name, buffer in buffers.buffers.items()}
        assert layer_cache_bytes(config, layer, batch, max_length, size) == expected
    assert cache_bytes(config, batch, max_length, size) == cache.nbytes()


def test_on_the_cpu_and_in_the_parameters_type():
    config = tiny_config("mha mqa gqa:window=5:dilation=3:global_tokens=2 mla mla:window=6 dsa swa csa hca")
    cache = real_cache(config, 2, 77, device="cpu")
    assert cache_bytes(config, 2, 77, 4) == cache.nbytes()


WORDS = ["mha", "mqa", "gqa", "gqa:window=9", "gqa:window=9:dilation=4", "mla", "mla:window=9:global_tokens=3"]
WORDS += ["dsa", "swa", "csa", "hca"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("csa", "hca"), [(4, 16), (3, 7), (1, 1)])
def test_growth_of_a_real_cache(word, csa, hca):
    config = tiny_config([word], attention__csa_compression=csa, attention__hca_compression=hca)
    short, long = 64 * csa * hca, 192 * csa * hca  # beyond every window, whole blocks
    grown = real_cache(config, 3, long).nbytes() - real_cache(config, 3, short).nbytes()
    assert 3 * cache_bytes_per_token(config, config.layers[0], 4) == pytest.approx(grown / (long - short), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # Values a token, bytes of V4.md 4.1 counted as values: 576 latent and rope key, 128 index key; 512 and 128
        ("v3", 61 * 576),
        ("v32", 61 * (576 + 128)),
        ("pro", 30 * (512 + 128) / 4 + 31 * 512 / 128),
        ("flash", 21 * (512 + 128) / 4 + 20 * 512 / 128),
        ("gpt_oss", 18 * 2 * 8 * 64),  # the windowed half of the layers adds nothing
    ],
)
def test_published_models(name, values):
    config = model_config(load([f"model={name}"]).model)
    assert sum(cache_bytes_per_token(config, layer, 1) for layer in config.layers) == values
