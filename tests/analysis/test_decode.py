"""A decoded token of whole models: sums by kind of product, published ratios, deployed caches."""

from dataclasses import replace

import pytest

from tests.analysis.test_flops import MODELS, config_of
from tests.models import tiny_config
from v4train.analysis.decode import (
    PRODUCTS,
    Precisions,
    Rates,
    check_precisions,
    decode_by_product,
    decode_matrices,
    fp8_equivalents,
)
from v4train.analysis.flops import active_matrix_parameters, decode_flops
from v4train.analysis.kv_cache import cache_bytes, deployed_bytes_per_token, deployed_cache_bytes
from v4train.errors import ConfigError
from v4train.model.config import model_config
from v4train.overrides import composed
from v4train.structured import structured

every_model = pytest.mark.parametrize("name", MODELS)


def shipped(name):
    return model_config(composed("pretrain", [f"model={name}"]).model)


def assumptions():
    estimate = composed("estimate", []).estimate
    return structured(Precisions, estimate.precisions, ""), structured(Rates, estimate.rates, "")


@every_model
def test_products_are_all_there_are(name):
    """The matrices are those that training multiplies, but MTP's; the rest is what each layer's attention computes."""
    config = config_of(name)
    trunk = replace(config, mtp=replace(config.mtp, num_layers=0))
    assert sum(decode_matrices(config).values()) == active_matrix_parameters(trunk)
    products = decode_by_product(config, 77)
    assert list(products) == [kind for kind in PRODUCTS if kind in products]
    steps = [decode_flops(config, layer, 77) for layer in config.layers]
    assert products["attention"] == sum(step["attention"] for step in steps)
    assert products.get("index_csa", 0) + products.get("index_dsa", 0) == sum(step["index"] for step in steps)
    assert sum(products.values()) == 2 * active_matrix_parameters(trunk) + sum(
        step["attention"] + step["index"] for step in steps
    )


def test_products_by_hand():
    """One csa layer, H M = 4 x 32: what is deployed in bf16 stands apart from what is in fp8."""
    config = tiny_config("csa", mtp__num_layers=0, residual__kind="plain", moe__num_hash_layers=0)
    assert decode_matrices(config) == {
        "projections": 32 * 12 + 12 * 64 + 32 * 16 + 64 * 8 + 16 * 32 + 12 * 2 * 8,
        "compressors": 2 * 2 * 32 * 16 + 2 * 2 * 32 * 8 + 32 * 2,
        "ffn": 3 * 16 * 32 * (2 + 1),
        "routers": 8 * 32,
        "head": 64 * 32,
    }


def test_a_tied_head_is_multiplied_all_the_same():
    tied, apart = (decode_matrices(tiny_config(tie_embedding=tie)) for tie in (True, False))
    assert tied == apart


@pytest.mark.parametrize(
    ("context", "gigaflops", "gib"),
    # V4.md 4.3: v32, pro, flash at each context
    [
        (2**12, (150.8, 122.6, 33.0), (0.183, 0.023, 0.016)),
        (2**16, (212.2, 134.2, 38.1), (2.93, 0.311, 0.217)),
        (2**18, (408.7, 171.2, 54.6), (11.7, 1.233, 0.861)),
        (2**20, (1194.6, 319.4, 120.7), (46.9, 4.918, 3.435)),
    ],
)
def test_the_published_curve(context, gigaflops, gib):
    for name, flops, size in zip(("v32", "pro", "flash"), gigaflops, gib, strict=True):
        config = shipped(name)
        ours = sum(fp8_equivalents(decode_by_product(config, context), *assumptions()).values())
        assert ours == pytest.approx(flops * 1e9, abs=6e7)
        tail = 0.009 if name != "v32" else 0.05  # GiB: tokens that wait to be compressed, which the table leaves out
        assert deployed_cache_bytes(config, context) / 2**30 == pytest.approx(size, abs=tail)


def test_the_four_headline_ratios():
    """The abstract's 27 and 10 % of the FLOPs, 10 and 7 % of the cache, to a tenth of a point of V4.md 4."""
    flops, cache, growth = {}, {}, {}
    for name in ("v32", "pro", "flash"):
        config = shipped(name)
        flops[name] = sum(fp8_equivalents(decode_by_product(config, 2**20), *assumptions()).values())
        cache[name], growth[name] = deployed_cache_bytes(config, 2**20), deployed_bytes_per_token(config)
    for name, of_flops, of_cache in (("pro", 26.74, 10.48), ("flash", 10.10, 7.32)):
        assert 100 * flops[name] / flops["v32"] == pytest.approx(of_flops, abs=0.1)
        assert 100 * cache[name] / cache["v32"] == pytest.approx(of_cache, abs=0.1)
        assert 100 * growth[name] / growth["v32"] == pytest.approx(of_cache, abs=0.1)


def test_published_bytes_per_token():
    """V4.md 4.1."""
    assert deployed_bytes_per_token(shipped("v32")) == 61 * (656 + 132)
    assert deployed_bytes_per_token(shipped("pro")) == 30 * (584 + 68) / 4 + 31 * 584 / 128
    assert deployed_bytes_per_token(shipped("flash")) == 3514.25
    assert deployed_bytes_per_token(shipped("gpt_oss")) == 18 * 2 * 8 * 64 * 2  # no layout of its own: bf16


@pytest.mark.parametrize("length", [1, 3, 130, 1000])
def test_deployed_cache_by_hand(length):
    """Flash's kinds one by one: a window, entries, index keys, and tokens that wait, in bf16."""
    config = shipped("flash")
    window = min(length, 128) * 584
    csa = window + length // 4 * (584 + 68) + 2 * (2 * 2 * 3 + 2 * 4) * (512 + 128)
    hca = window + length // 128 * 584 + 2 * 2 * 127 * 512
    assert deployed_cache_bytes(config, length) == 2 * window + 21 * csa + 20 * hca


def test_other_kinds_are_bf16():
    config = tiny_config("mha gqa:window=5 mqa:window=6:global_tokens=4")
    assert deployed_cache_bytes(config, 50) == cache_bytes(config, 1, 50, 2)


def test_an_unknown_precision_is_refused():
    precisions, _ = assumptions()
    with pytest.raises(ConfigError, match=r"estimate.precisions.ffn=int3: unknown precision; use one of fp4, fp8"):
        check_precisions(replace(precisions, ffn="int3"), "estimate.precisions")
