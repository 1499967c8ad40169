"""Closed forms of parameters and FLOPs against counts over shapes, tokens and what PyTorch really multiplies."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.models import random_model, random_tokens, tiny_config
from v4train.analysis.flops import active_matrix_parameters, training_flops_per_token
from v4train.config import load
from v4train.model import build_model, model_config
from v4train.model.counts import parameter_counts

MODELS = {
    "v4": ("swa csa hca csa", {}),
    "window only": ("swa swa", {}),
    "no mtp": ("csa hca", {"mtp__num_layers": 0}),
    "plain residual": ("csa swa hca", {"residual__kind": "plain"}),
    "two streams, two shared experts": ("hca csa", {"residual__num_streams": 2, "moe__num_shared_experts": 2}),
    "no shared expert": ("csa", {"moe__num_shared_experts": 0, "moe__top_k": 3}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def config_of(name):
    mix, changes = MODELS[name]
    return tiny_config(mix, **changes)


def uses(name, config):
    """How often one token is multiplied with a matrix of this parameter, as a share of its elements."""
    if name.startswith("embedding.") or name.endswith("position_bias"):
        return 0.0  # looked up; added
    if ".experts." in name:
        return config.moe.top_k / config.moe.num_experts
    if name == "mtp.hidden_projection.weight":
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


def seen(config, kind, token):
    """(tokens and entries that 0-based `token` of one long document attends to, entries it scores)."""
    attention = config.attention
    window = min(token + 1, attention.window)
    if kind == "swa":
        return window, 0
    if kind == "hca":
        return window + (token + 1) // attention.hca_compression, 0
    visible = (token + 1) // attention.csa_compression
    return window + min(visible, attention.indexer.top_k), visible


@every_model
@pytest.mark.parametrize("length", [1, 3, 7, 64, 75, 1000])
def test_attention_token_by_token(name, length):
    config = config_of(name)
    attention, indexer = config.attention, config.attention.indexer
    total = 0
    for kind in [*config.layer_kinds, *["swa"] * config.mtp.num_layers]:
        for token in range(length):
            attended, scored = seen(config, kind, token)
            total += 2 * 2 * attention.num_heads * attention.head_dim * attended  # scores; weighted sum
            total += 2 * indexer.num_heads * indexer.head_dim * scored
    ours = training_flops_per_token(config, length) - 6 * active_matrix_parameters(config)
    assert ours == pytest.approx(3 * total / length, rel=1e-12)


@pytest.mark.parametrize("ratio", [1, 5])
def test_attention_at_odd_ratios(ratio):
    config = tiny_config("csa", mtp__num_layers=0, attention__csa_compression=ratio, attention__indexer__top_k=4)
    ours = training_flops_per_token(config, 33) - 6 * active_matrix_parameters(config)
    sums = [sum(part) for part in zip(*[seen(config, "csa", token) for token in range(33)], strict=True)]
    assert ours == pytest.approx(3 * (4 * 4 * 16 * sums[0] + 2 * 2 * 8 * sums[1]) / 33, rel=1e-12)


@every_model
def test_matrix_products_that_pytorch_counts(name):
    """Forward of sequences of one token: each layer attends to one key, and nothing can be compressed or scored."""
    config = config_of(name)
    model = random_model(config).double().eval().requires_grad_(False)  # fp64 experts are products that it can count
    tokens = random_tokens(3, 1)
    with FlopCounterMode(display=False) as counter:
        model(tokens, None, tokens)
    layers, heads = config.num_layers + config.mtp.num_layers, 1 + config.mtp.num_layers
    hidden, streams = config.hidden_size, config.num_streams
    core = layers * 2 * config.attention.num_heads * config.attention.head_dim
    mixed = layers * config.moe.top_k * hidden  # expert outputs by their gates: no parameters, hence not in the formula
    if config.residual.kind == "mhc":  # collapse, then streams and output into streams, at two sites a layer
        mixed += 2 * layers * hidden * (streams + streams * (streams + 1)) + heads * hidden * streams
    assert counter.get_total_flops() == 3 * 2 * (active_matrix_parameters(config) + core + mixed)


@pytest.mark.parametrize(("name", "total", "active"), [("flash", 284.332e9, 13.270e9), ("pro", 1572.997e9, 48.852e9)])
def test_published_counts(name, total, active):
    """V4.md 1.3: total without MTP; active with the output matrix, without the input embedding."""
    ours = parameter_counts(model_config(load([f"model={name}"]).model))
    assert ours == (pytest.approx(total, abs=5e5), pytest.approx(active, abs=5e5))


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
