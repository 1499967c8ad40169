"""Which optimizer gets which parameter."""

import re

import pytest
import torch
from torch import nn

from tests.shipped import shipped
from v4train.config import load, settings
from v4train.errors import ConfigError
from v4train.model import build_model
from v4train.optim.config import OptimizerConfig
from v4train.optim.param_groups import is_muon_parameter, param_groups, parameter_counts


def optimizer(preset, **overrides):
    """The shipped YAML as it stands."""
    return OptimizerConfig(**(shipped("optimizer", preset) | overrides))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 4)
        self.lm_head = nn.Linear(4, 11, bias=False)
        self.norm = nn.RMSNorm(4)
        self.projection = nn.Linear(4, 6)
        self.experts = nn.Parameter(torch.zeros(3, 2, 4, 5))
        self.position_bias = nn.Parameter(torch.zeros(4, 8))
        self.sink = nn.Parameter(torch.zeros(2))
        self.fused = nn.Parameter(torch.zeros(24, 4))
        self.fused.independent_rows = (4, 4, 16)
        self.indexer = nn.Linear(4, 3)


def names(groups):
    return {group.name: list(group.parameters) for group in groups}


def test_muon_holds_matrices_and_adamw_the_rest():
    model, config = Model(), optimizer("muon")
    groups = param_groups(model, config)
    assert names(groups) == {
        "muon": ["experts", "projection.weight"],
        "muon_rows_4_4_16": ["fused"],
        "muon_indexer": ["indexer.weight"],
        "adamw": ["position_bias", "sink", "embed_tokens.weight", "lm_head.weight", "norm.weight", "projection.bias"],
        "adamw_indexer": ["indexer.bias"],
    }
    assert {group.name: group.rows for group in groups}["muon_rows_4_4_16"] == (4, 4, 16)
    assert [group.name for group in groups if group.indexer] == ["muon_indexer", "adamw_indexer"]
    # experts, projection, fused, indexer; the rest: embedding, head, norm, two biases, position bias, sink
    expected = {"muon": 120 + 24 + 96 + 12, "adamw": 44 + 44 + 4 + 6 + 3 + 32 + 2}
    assert parameter_counts(model, groups, config) == expected


def test_heads_and_groups_are_matrices_where_the_options_say_so():
    model = Model()
    model.projection.weight.head_rows, model.experts.grouped = 3, True
    by_option = {}
    for per_head in (False, True):
        for per_group in (False, True):
            groups = param_groups(model, optimizer("muon", per_head=per_head, per_group=per_group))
            held = {name: group for group in groups for name in group.parameters}
            of_head, of_group = held["projection.weight"], held["experts"]
            assert (of_head.rows, of_head.joined) == (3 if per_head else None, False)
            assert (of_group.rows, of_group.joined) == (None, not per_group)
            by_option[per_head, per_group] = sorted(group.name for group in groups if group.use_muon)
    others = ["muon_indexer", "muon_rows_4_4_16"]
    assert by_option[False, True] == ["muon", *others]
    assert by_option[True, False] == ["muon_heads_3", "muon_indexer", "muon_joined", "muon_rows_4_4_16"]


@pytest.mark.parametrize("preset", ["flash", "pro", "v3", "v32", "gpt_oss", "dense_small", "flash_small"])
def test_of_the_shipped_models_adamw_has_no_matrix_but_embedding_and_head(preset):
    """Stacks of biases and the compressors' position biases have two dimensions and are no matrices."""
    with torch.device("meta"):
        model = build_model(load([f"model={preset}"]).model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with_adamw = {name for name, parameter in model.named_parameters() if not is_muon_parameter(name, parameter)}
    own = {name for name in with_adamw if len(shapes[name]) > 1}
    tables = {"embedding.lookup.weight", "head.lm_head.weight"} & shapes.keys()
    assert own == tables | {name for name in shapes if re.search(r"(position_bias|gate_up_bias|down_bias)$", name)}
    rest = {name.split(".")[-1] for name in with_adamw - own}
    assert rest <= {"weight", "bias", "sink", "gates", "static_bias", "logit_bias"}
    assert all("norm" in name for name in with_adamw - own if name.endswith(".weight"))


def test_adamw_holds_everything():
    model, config = Model(), optimizer("adamw")
    groups = param_groups(model, config)
    assert [group.name for group in groups] == ["adamw", "adamw_indexer"]
    assert parameter_counts(model, groups, config) == {"adamw": sum(p.numel() for p in model.parameters())}


def test_a_missed_matrix_is_an_error():
    model, config = Model(), optimizer("muon")
    groups = param_groups(model, config)
    held = {group.name: group for group in groups}
    held["adamw"].parameters["projection.weight"] = held["muon"].parameters.pop("projection.weight")
    with pytest.raises(ValueError, match=r"projection.weight \[6, 4\] is held by AdamW but belongs to Muon"):
        parameter_counts(model, groups, config)
    del held["adamw"].parameters["projection.weight"]
    with pytest.raises(ValueError, match="projection.weight"):
        parameter_counts(model, groups, config)


def test_a_parameter_in_two_groups_is_an_error():
    model, config = Model(), optimizer("muon")
    groups = param_groups(model, config)
    groups[0].parameters["experts"] = groups[1].parameters["experts"] = model.experts
    with pytest.raises(ValueError, match="exactly one group"):
        parameter_counts(model, groups, config)


def test_tied_parameters_are_held_once():
    model, config = Model(), optimizer("muon")
    model.lm_head.weight = model.embed_tokens.weight
    groups = param_groups(model, config)
    assert sum("lm_head" in name for group in groups for name in group.parameters) == 0
    assert parameter_counts(model, groups, config)["adamw"] == 44 + 4 + 6 + 3 + 32 + 2


def test_bad_models_are_refused():
    model = Model()
    model.fused.independent_rows = (4, 4)
    with pytest.raises(ValueError, match="fused: independent_rows"):
        param_groups(model, optimizer("muon"))
    model = Model()
    model.projection.weight.head_rows = 4
    with pytest.raises(ValueError, match="projection.weight: heads of 4 rows"):
        param_groups(model, optimizer("muon"))
    model = Model()
    model.sink.requires_grad_(False)
    with pytest.raises(ValueError, match="sink does not require a gradient"):
        param_groups(model, optimizer("adamw"))


@pytest.mark.parametrize("override", [{"name": "sgd"}, {"newton_schulz_dtype": "float16"}])
def test_bad_values_are_refused(override):
    with pytest.raises(ConfigError, match=f"optimizer.{next(iter(override))}="):
        optimizer("muon", **override)


def test_muon_multiplies_in_bfloat16_only_with_that_precision():
    for precision, given, expected in [
        ("fp32", "auto", "float32"),
        ("bf16", "auto", "bfloat16"),
        ("bf16", "float32", "float32"),
        ("bf16", "bfloat16", "bfloat16"),
    ]:
        config = optimizer("muon", newton_schulz_dtype=given)
        config.resolve_dtype(precision)
        assert config.newton_schulz_dtype == expected
    with pytest.raises(ConfigError, match="optimizer.newton_schulz_dtype=bfloat16: precision=fp32"):
        settings(load(["model=flash_small", "optimizer.newton_schulz_dtype=bfloat16"]))
    assert settings(load(["model=flash_small"])).optimizer.newton_schulz_dtype == "float32"


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_shipped_values_are_v4s(name):
    config = optimizer(name)
    assert (config.name, config.betas, config.eps, config.weight_decay) == (name, (0.9, 0.95), 1e-20, 0.1)
    assert (config.momentum, config.update_rms, config.newton_schulz_steps) == (0.95, 0.18, (8, 2))
