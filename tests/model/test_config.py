"""Model descriptions: patterns of attention kinds, and every rule that refuses a value."""

import pytest
import torch
from omegaconf import OmegaConf

from tests.models import tiny_config
from v4train.analysis.parameters import parameter_counts
from v4train.config import load
from v4train.errors import ConfigError
from v4train.model import build_model, model_config
from v4train.model.config import expand_mix


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (["swa", "csa"], "swa csa"),
        ("swa", "swa"),
        ("swa, csa,hca", "swa csa hca"),
        ("swa*2 csa", "swa swa csa"),
        ("(csa hca)*2 csa", "csa hca csa hca csa"),
        ("swa*2 (csa hca)*2 csa", "swa swa csa hca csa hca csa"),
        ("((swa csa)*2 hca)*2", "swa csa swa csa hca swa csa swa csa hca"),
        ("(swa*3)", "swa swa swa"),
        (" ( swa csa ) * 2 ", "swa csa swa csa"),
        ("swa*0 csa", "csa"),
        ("", ""),
    ],
)
def test_patterns(mix, expected):
    assert expand_mix(mix) == expected.split()


def test_published_patterns():
    flash, pro = (expand_mix(load([f"model={name}"]).model.attention_mix) for name in ("flash", "pro"))
    assert [flash.count(kind) for kind in ("swa", "csa", "hca")] == [2, 21, 20]
    assert [pro.count(kind) for kind in ("swa", "csa", "hca")] == [0, 30, 31]
    assert flash == ["swa"] * 2 + [("csa", "hca")[layer % 2] for layer in range(2, 43)]
    assert pro == ["hca"] * 2 + [("csa", "hca")[layer % 2] for layer in range(2, 61)]


@pytest.mark.parametrize("mix", ["(swa csa", "swa)", "swa*", "swa*two", "swa*-1", "swa + csa", "((swa)*2", 5, None])
def test_patterns_that_are_refused(mix):
    with pytest.raises(ConfigError, match="^model.attention_mix="):
        model_config(tiny_config("swa", attention_mix=mix))


RULES = [
    # key, value, what the message says
    ("attention_mix", "swa xsa hca csa", "unknown attention kind.*swa, csa, hca"),
    ("attention_mix", "*2 swa", "unknown attention kind"),
    ("attention_mix", "swa csa", "lists 2 layers but model.num_layers is 4"),
    ("num_layers", 5, "lists 4 layers but model.num_layers is 5"),
    ("vocab_size", 0, "at least 1"),
    ("hidden_size", 0, "at least 1"),
    ("num_layers", 0, "at least 1"),
    ("attention.num_heads", 0, "at least 1"),
    ("attention.head_dim", -8, "at least 1"),
    ("attention.rope_dim", 0, "at least 1"),
    ("attention.q_lora_rank", 0, "at least 1"),
    ("attention.o_groups", 0, "at least 1"),
    ("attention.o_lora_rank", 0, "at least 1"),
    ("attention.window", 0, "at least 1"),
    ("attention.csa_compression", 0, "at least 1"),
    ("attention.hca_compression", 0, "at least 1"),
    ("attention.query_chunk", 0, "at least 1"),
    ("attention.indexer.num_heads", 0, "at least 1"),
    ("attention.indexer.head_dim", 0, "at least 1"),
    ("attention.indexer.top_k", 0, "at least 1"),
    ("attention.o_groups", 3, "num_heads=4 must be a multiple"),
    ("attention.rope_dim", 7, "even and at most model.attention.head_dim=16"),
    ("attention.rope_dim", 18, "even and at most model.attention.head_dim=16"),
    ("attention.rope_dim", 10, "indexer rotates model.attention.rope_dim=10"),
    ("moe.num_experts", 0, "at least 1"),
    ("moe.top_k", 0, "at least 1"),
    ("moe.top_k", 9, "exceeds model.moe.num_experts=8"),
    ("moe.intermediate_size", 0, "at least 1"),
    ("moe.num_shared_experts", -1, "negative"),
    ("moe.num_hash_layers", -1, "0..4"),
    ("moe.num_hash_layers", 5, "0..4"),
    ("residual.kind", "highway", "unknown residual.*plain, hc, mhc"),
    (
        "attention_mix",
        "swa swa gqa:windw=3 csa",
        "gqa has no option 'windw'; use window, dilation, global_tokens, sink",
    ),
    ("attention_mix", "swa swa gqa:window=x csa", "window must be a whole number"),
    ("attention_mix", "swa swa gqa:sink=1 csa", "sink must be true or false; write e.g. gqa:sink=true"),
    ("attention_mix", "swa swa gqa:window=-4 csa", "window must be a whole number; write e.g. gqa:window=128"),
    ("attention_mix", "swa swa gqa:window=² csa", "window must be a whole number"),
    ("attention_mix", "swa*² swa", "a whole number"),
    ("attention_mix", f"swa swa gqa:window={10**20} csa", "window must be a whole number"),
    ("attention_mix", "swa swa gqa:window=4:window=5 csa", "twice"),
    ("attention_mix", "swa swa dsa:window=8 csa", "dsa has no option 'window'"),
    ("attention_mix", "swa swa csa:window=null csa", "window must be a whole number"),
    ("attention_mix", "swa swa gqa:window=0 csa", "window must be at least 1"),
    ("attention_mix", "swa swa gqa:window=4:dilation=0 csa", "dilation must be at least 1"),
    ("attention_mix", "swa swa gqa:dilation=2 csa", "dilation without window.*gqa:window=128:dilation=2"),
    ("attention_mix", "swa swa mla:global_tokens=2 csa", "global_tokens without window"),
    ("attention.gqa.num_heads", 0, "at least 1"),
    ("attention.gqa.num_kv_heads", 3, "num_heads=4 must be a multiple"),
    ("attention.gqa.rope_dim", 10, "even and at most model.attention.gqa.head_dim=8"),
    ("attention.gqa.window", 0, "at least 1"),
    ("attention.mla.kv_lora_rank", 0, "at least 1"),
    ("attention.mla.rope_dim", 3, "even"),
    ("attention.mla.rope_dim", 10, "indexer rotates model.attention.mla.rope_dim=10"),
    ("attention.dsa.top_k", 0, "at least 1"),
    ("ffn_mix", "moe dense wide", "unknown FFN kind; use one of dense, moe"),
    ("ffn_mix", "moe*5", "lists 5 layers but model.num_layers is 4"),
    ("ffn_mix", "", "lists 0 layers"),
    ("ffn_mix", "dense moe", "hash-routed"),
    ("ffn.intermediate_size", 0, "at least 1"),
    ("moe.scoring", "relu", "unknown scoring; use one of sqrtsoftplus, sigmoid, softmax"),
    ("moe.activation", "gelu", "unknown activation; use one of swiglu, swiglu_oai"),
    ("moe.num_groups", 3, "num_experts=8 must be a multiple"),
    ("moe.num_groups", 8, "two experts a group"),
    ("mtp.attention", "xsa", "unknown attention kind"),
    ("mtp.attention", "gqa:dilation=3", "dilation without window"),
    ("residual.num_streams", 0, "at least 1"),
    ("residual.sinkhorn_iterations", 0, "at least 1"),
    ("mtp.num_layers", 2, "at most one MTP block"),
    ("mtp.num_layers", -1, "at most one MTP block"),
]
BLAMED = {
    # the key to change, where it is another than the one that was set
    ("num_layers", 5): "attention_mix",
    ("attention.rope_dim", 10): "attention.indexer.head_dim",
    ("attention.mla.rope_dim", 10): "attention.dsa.head_dim",
}


@pytest.mark.parametrize(("key", "value", "message"), RULES)
def test_every_rule_names_its_key(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        model_config(tiny_config(**{key.replace(".", "__"): value}))
    assert caught.value.key == f"model.{BLAMED.get((key, value), key)}"
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def node(**changes):
    """The tiny model as a Hydra node; dots reach into sections."""
    config = OmegaConf.structured(tiny_config())
    OmegaConf.set_struct(config, False)
    plain = OmegaConf.create(OmegaConf.to_container(config))
    for key, value in changes.items():
        OmegaConf.update(plain, key.replace("__", "."), value, force_add=True)
    return plain


def test_a_node_becomes_the_same_description():
    assert model_config(node()) == tiny_config()
    given = tiny_config()
    assert model_config(given) is given


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("hiden_size", "model.hidden_size"),
        ("moe__num_expert", "model.moe.num_experts"),
        ("attention__windows", "model.attention.window"),
        ("attention__indexer__topk", "model.attention.indexer.top_k"),
        ("attention__rope__thetta", "model.attention.rope.theta"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=f"unknown key; did you mean {nearest}\\?") as caught:
        model_config(node(**{key: 1}))
    assert caught.value.key == f"model.{key.replace('__', '.')}"


def test_an_unknown_key_like_no_other_lists_them():
    with pytest.raises(ConfigError, match="model.mtp.zzz=1: unknown key; known keys: num_layers, loss_weight"):
        model_config(node(mtp__zzz=1))


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "wide"), ("num_layers", 1.5), ("moe__top_k", "two"), ("attention__rope__theta", "big")],
)
def test_a_wrong_type_names_key_and_value(key, value):
    with pytest.raises(ConfigError, match=f"^model.{key.replace('__', '.')}={value}: "):
        model_config(node(**{key: value}))


@pytest.mark.parametrize("key", ["hidden_size", "attention.indexer.top_k", "attention"])
def test_a_missing_key_is_named(key):
    config = node()
    *sections, field = key.split(".")
    del (OmegaConf.select(config, ".".join(sections)) if sections else config)[field]
    with pytest.raises(ConfigError, match=f"^model.{key}=missing"):
        model_config(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=3", "did you mean model.hidden_size"),
        ("model.moe.top_k=99", "^model.moe.top_k=99"),
        ("model.attention_mix=5", "^model.attention_mix=5"),
        ("model.residual.kind=x", "^model.residual.kind=x"),
    ],
)
def test_the_same_from_the_command_line(override, message):
    with pytest.raises(ConfigError, match=message):
        load([override])


@pytest.mark.parametrize("section", ["gqa", "mla"])
@pytest.mark.parametrize(("name", "value"), [("dilation", 2), ("global_tokens", 3)])
def test_an_option_of_all_layers_needs_a_window(section, name, value):
    changes = {f"attention__{section}__{name}": value}
    with pytest.raises(ConfigError, match=f"^model.attention.{section}.{name}={value}: {name} without window"):
        model_config(tiny_config([section], **changes))
    model_config(tiny_config([section], **changes, **{f"attention__{section}__window": 4}))
    with pytest.raises(ConfigError, match=f"{name} without window"):
        model_config(tiny_config(["swa"], **changes))  # though no layer has it
    model_config(tiny_config([f"{section}:window=4"], **changes))


def test_chosen_groups_must_hold_enough_experts():
    changes = {"moe__num_groups": 4, "moe__top_k_groups": 1}
    with pytest.raises(ConfigError, match="^model.moe.top_k=3: the chosen groups hold 2 experts"):
        model_config(tiny_config(**changes, moe__top_k=3))
    with pytest.raises(ConfigError, match="^model.moe.top_k_groups=5: it exceeds model.moe.num_groups=4"):
        model_config(tiny_config(moe__num_groups=4, moe__top_k_groups=5))


def test_options_of_single_layers():
    config = tiny_config("(gqa:window=5:sink=true gqa)*2 swa:window=3 mla:window=null")
    layers = config.layers
    assert [layer.kind for layer in layers] == ["gqa", "gqa", "gqa", "gqa", "swa", "mla"] == config.layer_kinds
    assert [layer.options.window for layer in layers] == [5, None, 5, None, 3, None]
    assert [layer.options.sink for layer in layers[:4]] == [True, False, True, False]
    assert config.attention.gqa.window is None and config.attention.window == 8  # the sections stay as they are


def test_the_last_ffn_fills_the_rest():
    assert tiny_config("swa*4", ffn_mix="dense*2 moe").ffn_kinds == ["dense", "dense", "moe", "moe"]
    assert tiny_config("swa*4", ffn_mix=["dense", "moe", "dense"]).ffn_kinds == ["dense", "moe", "dense", "dense"]
    assert tiny_config("swa*2", ffn_mix="moe").ffn_kinds == ["moe", "moe"]


def test_a_mix_with_options_from_the_command_line():
    config = model_config(load(["model=gpt_oss_small", "model.attention_mix='(gqa:window=16 mla)*3'"]).model)
    assert [layer.options.window for layer in config.layers] == [16, None] * 3


def test_any_mix_is_one_override():
    config = load(["model=flash_small", "model.attention_mix='hca*2 (swa csa)*2'"])
    assert model_config(config.model).layer_kinds == ["hca", "hca", "swa", "csa", "swa", "csa"]


def test_streams_of_a_plain_residual():
    assert tiny_config().num_streams == 4
    assert tiny_config(residual__kind="plain").num_streams == 1


def test_a_tied_embedding_is_one_parameter_with_both_gradients():
    tied, untied = (build_model(tiny_config(tie_embedding=tie, mtp__num_layers=0)) for tie in (True, False))
    (total, active), (more, as_active) = (parameter_counts(model.config) for model in (tied, untied))
    assert active == as_active and more - total == tied.embedding.lookup.weight.numel()
    names = {name for name, _ in untied.named_parameters()} - {name for name, _ in tied.named_parameters()}
    assert names == {"head.lm_head.weight"}
    untied.load_state_dict(tied.state_dict())
    tokens = torch.arange(24).view(2, 12)
    for model in (tied, untied):
        model.eval()(tokens, targets=tokens.roll(-1, 1)).loss.backward()
    expected = untied.embedding.lookup.weight.grad + untied.head.lm_head.weight.grad
    torch.testing.assert_close(tied.embedding.lookup.weight.grad, expected)
