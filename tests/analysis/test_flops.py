"""Closed forms of parameters and FLOPs against counts over shapes, tokens and what PyTorch really multiplies."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.models import random_model, random_tokens, tiny_config
from v4train.analysis.flops import active_matrix_parameters, decode_flops, training_flops_per_token, visible_pairs
from v4train.analysis.parameters import parameter_counts
from v4train.config import load
from v4train.model import build_model, model_config

MODELS = {
    "v4": ("swa csa hca csa", {}),
    "window only": ("swa swa", {}),
    "no mtp": ("csa hca", {"mtp__num_layers": 0}),
    "plain residual": ("csa swa hca", {"residual__kind": "plain"}),
    "two streams, two shared experts": ("hca csa", {"residual__num_streams": 2, "moe__num_shared_experts": 2}),
    "no shared expert": ("csa", {"moe__num_shared_experts": 0, "moe__top_k": 3}),
    "heads": ("mha mqa gqa", {"residual__kind": "plain", "attention__gqa__head_dim": 12, "mtp__attention": "mqa"}),
    "norms, biases, sinks": (
        "gqa mla dsa",
        {"attention__gqa__bias": True, "attention__gqa__qk_norm": True, "attention__mla__sink": True}
        | {
            "moe__expert_bias": True,
            "moe__router_bias": True,
            "moe__activation": "swiglu_oai",
            "moe__num_hash_layers": 0,
        },
    ),
    "local options": (
        "mha:window=9 gqa:window=3:dilation=4 mla:window=5:dilation=2:global_tokens=7 mqa:window=6:global_tokens=4",
        {"mtp__attention": "mla:window=4:global_tokens=2"},
    ),
    "windows of V4": ("swa:window=3 csa:window=5 hca:window=70", {}),
    "latent": ("mla dsa mla", {"residual__num_streams": 3, "mtp__attention": "dsa"}),
    "hc": ("mla csa gqa", {"residual__kind": "hc", "mtp__attention": "gqa"}),
    "hc, two streams, no mtp": ("dsa", {"residual__kind": "hc", "residual__num_streams": 2, "mtp__num_layers": 0}),
    "dense": ("gqa hca", {"ffn_mix": "dense", "moe__num_hash_layers": 0, "ffn__intermediate_size": 20}),
    "dense, then experts": (
        "gqa mla dsa swa",
        {"ffn_mix": "dense*2 moe", "moe__num_hash_layers": 0, "mtp__attention": "csa"},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def config_of(name):
    mix, changes = MODELS[name]
    return model_config(tiny_config(mix, **changes))


def all_layers(config):
    return config.layers + [config.mtp_layer] * config.mtp.num_layers


def uses(name, config):
    """How often one token is multiplied with a matrix of this parameter, as a share of its elements."""
    if name.startswith("embedding.") or name.endswith("bias"):
        return 0.0  # looked up; added
    if ".experts." in name:
        return config.moe.top_k / config.moe.num_experts
    if name == "mtp.hidden_projection.weight" or config.residual.kind == "hc" and "residual.projection" in name:
        return config.num_streams  # once a stream
    if name == "head.lm_head.weight":
        return 1 + config.mtp.num_layers
    return 1.0


@every_model
def test_active_parameters_by_shape(name):
    config = config_of(name)
    model = build_model(config)
    expected = sum(p.numel() * uses(n, config) for n, p in model.named_parameters() if p.dim() > 1)
    assert active_matrix_parameters(config) == expected


def seen(config, layer, token):
    """(tokens and entries that 0-based `token` of one long document attends to, entries it scores)."""
    attention, options, kind = config.attention, layer.options, layer.kind
    if kind == "dsa":
        return min(token + 1, attention.dsa.top_k), token + 1
    if kind in ("mha", "mqa", "gqa", "mla"):
        if options.window is None:
            return token + 1, 0
        window = {token - step * options.dilation for step in range(options.window)}
        return len({key for key in window if key >= 0} | set(range(min(options.global_tokens, token + 1)))), 0
    window = min(token + 1, options.window)
    if kind == "swa":
        return window, 0
    if kind == "hca":
        return window + (token + 1) // attention.hca_compression, 0
    visible = (token + 1) // attention.csa_compression
    return window + min(visible, attention.indexer.top_k), visible


def pair_flops(config, layer, absorbed):
    """Multiply-adds of all heads with one key and one value, counted by hand; those of one index score."""
    attention, options = config.attention, layer.options
    if layer.kind in ("mla", "dsa"):
        latent, rope = options.kv_lora_rank, options.rope_dim
        absorbed = absorbed or layer.kind == "dsa"
        per_head = latent + rope + latent if absorbed else options.nope_dim + rope + options.value_dim
    else:
        per_head = options.head_dim + options.head_dim
    indexer = attention.dsa if layer.kind == "dsa" else attention.indexer
    return options.num_heads * per_head, indexer.num_heads * indexer.head_dim


@every_model
@pytest.mark.parametrize("length", [1, 3, 7, 64, 75, 1000])
def test_attention_token_by_token(name, length):
    config = config_of(name)
    total = 0
    for layer in all_layers(config):
        per_attended, per_scored = pair_flops(config, layer, absorbed=False)
        for token in range(length):
            attended, scored = seen(config, layer, token)
            total += 2 * per_attended * attended + 2 * per_scored * scored
    ours = training_flops_per_token(config, length) - 6 * active_matrix_parameters(config)
    assert ours == pytest.approx(3 * total / length, rel=1e-12)


@pytest.mark.parametrize("ratio", [1, 5])
def test_attention_at_odd_ratios(ratio):
    config = tiny_config("csa", mtp__num_layers=0, attention__csa_compression=ratio, attention__indexer__top_k=4)
    ours = training_flops_per_token(config, 33) - 6 * active_matrix_parameters(config)
    sums = [sum(part) for part in zip(*[seen(config, config.layers[0], token) for token in range(33)], strict=True)]
    assert ours == pytest.approx(3 * (4 * 4 * 16 * sums[0] + 2 * 2 * 8 * sums[1]) / 33, rel=1e-12)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["mha", "mqa", "gqa", "mla"]),
    window=st.integers(1, 30),
    dilation=st.integers(1, 8),
    global_tokens=st.integers(0, 40),
    length=st.integers(0, 90),
)
def test_local_options_token_by_token(kind, window, dilation, global_tokens, length):
    config = tiny_config([f"{kind}:window={window}:dilation={dilation}:global_tokens={global_tokens}"])
    layer = config.layers[0]
    expected = sum(seen(config, layer, token)[0] for token in range(length))
    assert visible_pairs(config, layer, length) == (expected, 0)


@every_model
@pytest.mark.parametrize("context", [1, 4, 16, 31, 100])
def test_one_decoded_token(name, context):
    config = config_of(name)
    for layer, block in zip(config.layers, build_model(config).blocks, strict=True):
        attended, scored = seen(config, layer, context - 1)
        per_attended, per_scored = pair_flops(config, layer, absorbed=True)
        named = block.attention.named_parameters()
        matrices = sum(p.numel() for n, p in named if p.dim() > 1 and not n.endswith("bias"))
        expected = {"matrices": matrices, "attention": per_attended * attended, "index": per_scored * scored}
        if layer.kind not in ("csa", "dsa"):
            expected["index"] = 0
        assert decode_flops(config, layer, context) == {part: 2 * count for part, count in expected.items()}


def unparametrised(config, tokens):
    """FLOPs of `tokens` that the formulas leave out: streams by their coefficients."""
    layers, heads = config.num_layers + config.mtp.num_layers, 1 + config.mtp.num_layers
    hidden, streams = config.hidden_size, config.num_streams
    mixed = 0
    if config.residual.kind != "plain":  # collapse, then streams into streams, at two sites a layer
        mixed += 2 * layers * hidden * (streams + streams * streams)
    if config.residual.kind == "mhc":
        mixed += heads * hidden * streams
    return 2 * tokens * mixed


def scoring(config, layers, tokens):
    """FLOPs of 0-based `tokens` that are saved where there is nothing to select from: the formulas count all scores."""
    pairs = [(pair_flops(config, layer, False)[1], layer) for layer in layers if layer.kind in ("csa", "dsa")]
    return sum(2 * per_scored * seen(config, layer, token)[1] for per_scored, layer in pairs for token in tokens)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def countable(config):
    """Its model; fp64 experts are products that PyTorch's counter knows."""
    return random_model(config).double().eval().requires_grad_(False)


@every_model
def test_matrix_products_that_pytorch_counts(name):
    """Forward of sequences of one token: each layer attends to one key, and nothing can be compressed."""
    config = config_of(name)
    model, tokens = countable(config), random_tokens(3, 1)
    layers = all_layers(config)
    expected = training_flops_per_token(config, 1) + unparametrised(config, 3)
    expected -= 3 * scoring(config, layers, range(1))
    # A global token that lies in the window is computed a second time and masked.
    twice = [layer for layer in layers if layer.kind != "dsa" and getattr(layer.options, "global_tokens", 0)]
    expected += 3 * sum(2 * pair_flops(config, layer, absorbed=False)[0] for layer in twice)
    assert counted(lambda: model(tokens, None, tokens)) == expected


# What the softmax core computes is what is seen: no dilation, no global tokens, chunks of one query, nothing deselected
EXACT = {
    "attention__query_chunk": 1,
    "attention__indexer__top_k": 99,
    "attention__dsa__top_k": 99,
    "mtp__num_layers": 0,
    "mtp__attention": "swa",
}
EXACT_MIXES = ["mha mqa gqa", "gqa:window=5 mla:window=7 mha", "mla", "dsa", "swa csa hca", "mla csa gqa dsa hca mqa"]


@pytest.mark.parametrize("mix", EXACT_MIXES)
@pytest.mark.parametrize("length", [2, 37])
def test_forward_that_pytorch_counts(mix, length):
    config = model_config(tiny_config(mix, **EXACT))
    model, tokens = countable(config), random_tokens(2, length)
    expected = 2 * length * training_flops_per_token(config, length) / 3 + unparametrised(config, 2 * length)
    expected -= 2 * scoring(config, config.layers, range(length))
    assert counted(lambda: model(tokens)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["flash_small", "v32_small", "dense_small", "gpt_oss_small", "v3_small"])
def test_shipped_small_models_as_pytorch_counts_them(name):
    """As they are but for what the core masks, within 2 %: with nothing that the formulas leave out added."""
    keys = ["attention.query_chunk=1", "attention.indexer.top_k=999", "attention.dsa.top_k=999", "mtp.num_layers=0"]
    config = load([f"model={name}", *(f"model.{key}" for key in keys)]).model
    config, length = model_config(config), 150
    model, tokens = countable(config), random_tokens(1, length)
    expected = length * training_flops_per_token(config, length) / 3
    assert counted(lambda: model(tokens)) == pytest.approx(expected, rel=0.02)


NARROW = EXACT | {"attention__indexer__top_k": 2, "attention__dsa__top_k": 3}
INDEXED_MIXES = ["csa swa hca", "dsa mla", "mla csa gqa dsa hca mqa"]


@pytest.mark.parametrize("mix", INDEXED_MIXES)
@pytest.mark.parametrize("length", [2, 37])
def test_dense_forward_that_pytorch_counts(mix, length):
    """Attends to more than the indexers would select, and runs none of them."""
    config = model_config(tiny_config(mix, **NARROW))
    model, tokens = countable(config), random_tokens(2, length)
    model.attention_mode = "dense"
    expected = 2 * length * training_flops_per_token(config, length, "dense") / 3 + unparametrised(config, 2 * length)
    assert counted(lambda: model(tokens)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mix", INDEXED_MIXES)
@pytest.mark.parametrize("length", [8, 37])
def test_a_step_of_the_indexers_alone_that_pytorch_counts(mix, length):
    """Forward of all, backward of the indexers."""
    config = model_config(tiny_config(mix, **NARROW))
    model, tokens = random_model(config).double().train(), random_tokens(2, length)
    model.attention_mode = "indexer_warmup"
    expected = 2 * length * training_flops_per_token(config, length, "indexer_warmup")
    expected += unparametrised(config, 2 * length)
    # No gradient goes into the detached inputs of the indexers' matrices
    own = [p for n, p in model.named_parameters() if "indexer" in n and p.dim() > 1 and not n.endswith("bias")]
    expected -= 2 * length * 2 * sum(p.numel() for p in own)
    # The teacher sums its weights over the heads, as a product
    for layer in config.layers:
        if layer.kind in ("csa", "dsa"):
            entries = sum(seen(config, layer, token)[1] for token in range(length))
            expected += 2 * 2 * layer.options.num_heads * entries
    assert counted(lambda: model(tokens, None, tokens).loss.backward()) == pytest.approx(expected, rel=1e-12)


@every_model
@pytest.mark.parametrize("length", [7, 75])
def test_modes_token_by_token(name, length):
    """Trunk and indexers apart, by shape and by token; where nothing is indexed, dense and sparse are one."""
    config = config_of(name)
    named = dict(build_model(config).named_parameters())
    trunk = index = 0
    for parameter_name, parameter in named.items():
        size = parameter.numel() * uses(parameter_name, config) if parameter.dim() > 1 else 0
        if "indexer" in parameter_name:
            index += 2 * size * length
        else:
            trunk += 2 * size * length
    for layer in all_layers(config):
        per_attended, per_scored = pair_flops(config, layer, absorbed=False)
        if layer.kind == "dsa":  # not absorbed where it doesn't select
            options = layer.options
            per_attended = options.num_heads * (options.nope_dim + options.rope_dim + options.value_dim)
        for token in range(length):
            attended, scored = seen(config, layer, token)
            if layer.kind == "csa":
                attended = min(token + 1, layer.options.window) + scored
            if layer.kind == "dsa":
                attended = scored
            trunk += 2 * per_attended * attended
            index += 2 * per_scored * scored
    assert training_flops_per_token(config, length, "dense") == pytest.approx(3 * trunk / length, rel=1e-12)
    warmup = training_flops_per_token(config, length, "indexer_warmup")
    assert warmup == pytest.approx((trunk + 3 * index) / length, rel=1e-12)


@pytest.mark.parametrize("mix", EXACT_MIXES)
@pytest.mark.parametrize("context", [1, 8, 37])
def test_decoding_that_pytorch_counts(mix, context):
    config = model_config(tiny_config(mix, **EXACT))
    model, tokens = countable(config), random_tokens(2, context)
    cache = model.new_cache(2, context)
    if context > 1:
        model(tokens[:, :-1], cache=cache)
    expected = sum(sum(decode_flops(config, layer, context).values()) for layer in config.layers)
    attention = sum(p.numel() for block in model.blocks for p in block.attention.parameters() if p.dim() > 1)
    attention -= sum(p.numel() for n, p in model.named_parameters() if n.endswith("position_bias"))
    expected += 2 * (active_matrix_parameters(config) - attention)  # FFN, residual, head
    expected = 2 * expected - 2 * scoring(config, config.layers, [context - 1]) + unparametrised(config, 2)
    assert counted(lambda: model(tokens[:, -1:], cache=cache)) == expected


@pytest.mark.parametrize(
    ("name", "core", "core_factor", "index", "index_factor"),
    [("v32", 69.6, 2, 1048.0, 1), ("pro", 153.3, 2, 64.4, 0.5), ("flash", 47.2, 2, 45.1, 0.5)],
)
def test_published_decode_at_a_million_tokens(name, core, core_factor, index, index_factor):
    """V4.md 4.2: breakdown at 2^20 tokens in GFLOPs of FP8, with the factors of its precisions."""
    config = model_config(load([f"model={name}"]).model)
    steps = [decode_flops(config, layer, 2**20) for layer in config.layers]
    assert sum(step["attention"] for step in steps) * core_factor == pytest.approx(core * 1e9, abs=5e7)
    assert sum(step["index"] for step in steps) * index_factor == pytest.approx(index * 1e9, abs=5e7)


def test_published_ratios_without_precision():
    """V4.md 4.2: all factors 1, a decode step of Pro takes 26.2 % of V3.2's, one of Flash 12.1 %."""
    totals = {}
    for name in ("v32", "pro", "flash"):
        config = model_config(load([f"model={name}"]).model)
        trunk = replace(config, mtp=replace(config.mtp, num_layers=0))
        steps = [decode_flops(config, layer, 2**20) for layer in config.layers]
        core = sum(step["attention"] + step["index"] for step in steps)
        totals[name] = 2 * active_matrix_parameters(trunk) + core
    assert totals["pro"] / totals["v32"] == pytest.approx(0.262, abs=5e-4)
    assert totals["flash"] / totals["v32"] == pytest.approx(0.121, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("flash", 284.332e9, 13.270e9), ("pro", 1572.997e9, 48.852e9), ("v3", 671.03e9, 36.6e9)],
)
def test_published_counts(name, total, active):
    """V4.md 1.3: total without MTP; active with the output matrix, without the input embedding."""
    ours = parameter_counts(model_config(load([f"model={name}"]).model))
    digits = 5e7 if name == "v3" else 5e5
    assert ours == (pytest.approx(total, abs=digits), pytest.approx(active, abs=digits))


@every_model
def test_counts_by_shape(name):
    config = config_of(name)
    total = active = 0
    for parameter_name, parameter in build_model(config).named_parameters():
        if parameter_name.startswith("mtp."):
            continue
        total += parameter.numel()
        if parameter_name == "embedding.lookup.weight":
            continue
        share = config.moe.top_k / config.moe.num_experts if ".experts." in parameter_name else 1
        active += parameter.numel() * share
    assert parameter_counts(config) == (total, active)
