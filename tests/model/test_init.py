"""Initial values: published sizes, and each tensor a function of seed and name alone."""

import hashlib

import pytest
import torch

from tests.models import random_tokens, tiny_config
from v4train.config import load
from v4train.model import Transformer, build_model, model_config
from v4train.model.init import initial_value


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("flash", 284_332_230_231),
        ("pro", 1_572_997_179_491),
        ("v3", 671_026_404_352),  # 671 B
        ("v32", 671_026_404_352 + 61 * 13_959_424),  # and its indexers
        ("gpt_oss", 116_829_156_672),  # 116.8 B
    ],
)
def test_published_sizes(name, total):
    """V4.md 1.3: the released shapes, without MTP; gpt-oss: its model card."""
    config = model_config(load([f"model={name}", "model.mtp.num_layers=0"]).model)
    with torch.device("meta"):
        model = build_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_flash_small_divides_and_is_small():
    config = load(["model=flash_small"])
    model, attention = model_config(config.model), config.model.attention
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in Transformer(model).parameters())
    assert 5e6 <= size <= 20e6
    for count in (attention.num_heads, attention.o_groups, attention.indexer.num_heads, model.vocab_size):
        assert count % 2 == 0
    assert model.moe.num_experts % 4 == 0
    assert attention.window <= 64
    assert set(model.layer_kinds) == {"swa", "csa", "hca"} and model.mtp.num_layers == 1
    visible = config.train.sequence_length // attention.csa_compression
    assert attention.indexer.top_k < visible / 2  # or sparse attention would be dense
    assert config.train.sequence_length >= 2 * attention.hca_compression


@pytest.mark.parametrize("name", ["v3_small", "v32_small", "gpt_oss_small", "dense_small"])
def test_small_siblings_have_the_size_and_the_shape(name):
    """As many layers and channels as flash_small; kinds, FFNs and routing of the large one."""
    small, flash = (model_config(load([f"model={each}"]).model) for each in (name, "flash_small"))
    for key in ("vocab_size", "hidden_size", "num_layers"):
        assert getattr(small, key) == getattr(flash, key)
    if name == "dense_small":
        assert set(small.layer_kinds) == {"gqa"} and set(small.ffn_kinds) == {"dense"}
        return
    large = model_config(load([f"model={name.removesuffix('_small')}"]).model)
    assert set(small.layer_kinds) == set(large.layer_kinds) and set(small.ffn_kinds) == set(large.ffn_kinds)
    for key in ("scoring", "router_bias", "expert_bias", "activation", "num_hash_layers", "swiglu_limit"):
        assert getattr(small.moe, key) == getattr(large.moe, key)
    for key in ("bias", "sink", "qk_norm"):
        assert getattr(small.attention.gqa, key) == getattr(large.attention.gqa, key)
    assert small.residual.kind == large.residual.kind == "plain"
    assert (small.moe.num_groups > 1) == (large.moe.num_groups > 1)


def test_hyper_connections_start_as_in_the_paper():
    """Each site reads one stream in turn, writes to all, mixes none (arXiv 2409.19606)."""
    model = build_model(tiny_config("gqa gqa gqa", residual__kind="hc"))
    for block in range(3):
        for site, residual in enumerate((model.blocks[block].attention_residual, model.blocks[block].ffn_residual)):
            pre, post, mixing = residual.static_bias.split([4, 4, 16])
            assert pre.tolist() == [float(stream == (2 * block + site) % 4) for stream in range(4)]
            assert post.tolist() == [1.0] * 4 and torch.equal(mixing.view(4, 4), torch.eye(4))
            assert residual.gates.tolist() == pytest.approx([0.01] * 3)
    assert model.mtp.block.ffn_residual.static_bias[:4].tolist() == [0.0, 0.0, 0.0, 1.0]


def values(model):
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_deterministic_whatever_the_global_generator():
    torch.manual_seed(1)
    one = values(build_model(tiny_config()))
    torch.manual_seed(2)
    two = values(build_model(tiny_config()))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_seed_changes_every_random_tensor():
    one, two = (values(build_model(tiny_config(init__seed=seed))) for seed in (0, 1))
    constant = {name for name in one if torch.equal(one[name], two[name])}
    endings = ("norm.weight", "sink", "position_bias", "router.bias", "gates", "static_bias")
    assert constant == {name for name in one if name.endswith(endings)}


def test_every_random_tensor_differs_from_every_other():
    model = build_model(tiny_config())
    starts = [tuple(p.flatten()[:4].tolist()) for n, p in model.named_parameters() if p.dim() > 1 and p.std() > 0]
    assert len(starts) > 60 and len(set(starts)) == len(starts)


def test_more_layers_change_no_shared_tensor():
    short, long = (values(build_model(tiny_config(mix))) for mix in ("swa csa", "swa csa hca csa"))
    assert short.keys() < long.keys()
    assert all(torch.equal(short[name], long[name]) for name in short)


def test_an_expert_is_independent_of_their_number():
    few, many = (values(build_model(tiny_config(moe__num_experts=count))) for count in (4, 8))
    names = [name for name in few if ".experts." in name]
    assert len(names) == 2 * 5
    for name in names:
        assert torch.equal(few[name], many[name][:4])
        assert not torch.equal(many[name][0], many[name][1])


def test_normal_values_by_hand():
    """Seeded by the first eight bytes of SHA-256("seed/name"), top bit dropped."""
    config = tiny_config(init__seed=5, init__std=0.3)
    name = "blocks.0.attention.query_down.weight"
    number = int.from_bytes(hashlib.sha256(f"5/{name}".encode()).digest()[:8], "little") // 2
    expected = 0.3 * torch.randn(12, 32, generator=torch.Generator().manual_seed(number))
    torch.testing.assert_close(initial_value(name, torch.Size([12, 32]), config), expected)
    torch.testing.assert_close(build_model(config).get_parameter(name).detach(), expected)


def test_standard_deviation_of_every_matrix():
    model = build_model(tiny_config(hidden_size=96, init__std=0.05))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("position_bias") and parameter.numel() > 700:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.12), name
            assert abs(parameter.mean().item()) < 0.05 * 4 / parameter.numel() ** 0.5, name


def test_constants():
    changes = {"gate_init": 0.02, "pre_bias_init": -1.5, "post_bias_init": 0.25, "mixing_diagonal_init": 3.0}
    model = build_model(tiny_config(**{f"residual__{key}": value for key, value in changes.items()}))
    block, collapse = model.blocks[1], model.head.output_norm.collapse
    assert block.ffn_norm.weight.tolist() == [1.0] * 32
    assert block.attention.sink.tolist() == [0.0] * 4 and block.ffn.router.bias.tolist() == [0.0] * 8
    assert block.attention.compressor.position_bias.abs().sum() == 0
    torch.testing.assert_close(block.ffn_residual.gates, torch.full((3,), 0.02))
    mixing = [3.0 if j == k else 0.0 for j in range(4) for k in range(4)]
    assert block.ffn_residual.static_bias.tolist() == [-1.5] * 4 + [0.25] * 4 + mixing
    torch.testing.assert_close(collapse.gates, torch.full((1,), 0.02))
    assert collapse.static_bias.tolist() == [-1.5] * 4


def test_hash_tables_differ_between_layers():
    model = build_model(tiny_config("swa swa", moe__num_hash_layers=2))
    tables = [block.ffn.router.table for block in model.blocks]
    assert tables[0].shape == (64, 2) and not torch.equal(*tables)


def test_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = build_model(tiny_config())
    assert {tensor.device.type for tensor in values(model).values()} == {"meta"}


def test_first_loss_is_that_of_a_uniform_guess():
    model = build_model(tiny_config(init__std=0.02)).eval()
    tokens = random_tokens(2, 40)
    losses = model(tokens, None, tokens.roll(-1, 1)).losses
    for name in ("lm_loss", "mtp_loss"):
        assert losses[name].item() == pytest.approx(torch.tensor(64.0).log().item(), abs=0.1)
