"""Every parameter by name and shape against the model's own, and what a layout gives each rank."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.analysis.test_flops import MODELS, config_of
from tests.models import tiny_config
from v4train.analysis.flops import active_matrix_parameters
from v4train.analysis.parameters import PARTS, copied_embedding, counts_by_part, parameters, stage_shares
from v4train.analysis.work import Work
from v4train.model import Transformer, model_config
from v4train.optim.param_groups import is_muon_parameter
from v4train.overrides import composed, config_dir
from v4train.parallel.layout import HEADS, KEY_VALUE
from v4train.parallel.sizes import Sizes
from v4train.parallel.stages import Stages
from v4train.parallel.topology import Topology

SHIPPED = sorted(path.stem for path in Path(config_dir(), "model").glob("*.yaml"))


def on_meta(config):
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_parameter_of_a_shipped_model(name):
    config = model_config(composed("pretrain", [f"model={name}"]).model)
    ours, model = list(parameters(config)), on_meta(config)
    assert {p.name: p.shape for p in ours} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sum(p.size for p in ours) == sum(p.numel() for p in model.parameters())
    assert sum(counts_by_part(config).values()) == sum(p.size for p in ours)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_any_mix(name):
    config = config_of(name)
    named = dict(on_meta(config).named_parameters())
    assert {p.name: p.shape for p in parameters(config)} == {n: tuple(p.shape) for n, p in named.items()}
    assert all(p.is_matrix == is_muon_parameter(p.name, named[p.name]) for p in parameters(config))


def test_a_tied_embedding_is_counted_once():
    config = tiny_config(tie_embedding=True)
    assert sum(p.size for p in parameters(config)) == sum(p.numel() for p in on_meta(config).parameters())


@pytest.mark.parametrize("name", ["v4", "norms, biases, sinks", "heads", "dense, then experts"])
def test_what_tensor_parallelism_cuts(name):
    """The same dimension of the same tensors as the layout's own table, the module that owns each looked up."""
    config = config_of(name)
    model, ours = on_meta(config), {p.name: p for p in parameters(config)}
    tables = [(kind, dims) for kind, dims in HEADS.items()]
    for parameter_name in dict(model.named_parameters()):
        found, path = None, parameter_name.split(".")
        for depth in range(len(path)):
            module, leaf = model.get_submodule(".".join(path[:depth])), ".".join(path[depth:])
            found = next((dims[leaf] for kind, dims in tables if isinstance(module, kind) and leaf in dims), found)
            if type(module).__name__ == "GroupedQueryAttention" and leaf in KEY_VALUE:
                found = KEY_VALUE[leaf]
                assert ours[parameter_name].pieces == module.num_kv_heads
        assert ours[parameter_name].cut == found, parameter_name


@pytest.mark.parametrize(("pipeline", "length"), [(1, 64), (2, 64), (3, 64), (3, 1 << 20)])
def test_what_a_stage_trains(pipeline, length):
    """Stages are cut once, for one length, whatever the rows of a step are."""
    config = tiny_config("gqa swa csa hca", tie_embedding=False)
    model, shares = on_meta(config), stage_shares(config, Work(64, pipeline=pipeline, stage_length=length))
    for rank, share in enumerate(shares):
        topology = Topology(rank, 0, Sizes(pipeline=pipeline), torch.device("cpu"))
        here = Stages(model, topology, length).parts
        sizes = {id(p): p.numel() for part in here for p in part.parameters()}
        assert share.size == sum(sizes.values())
    assert sum(share.size for share in shares) == sum(p.numel() for p in model.parameters())
    assert copied_embedding(config, Work(64, pipeline=pipeline)) == (64 * 32 if pipeline > 1 else 0)


def test_shares_of_experts_and_heads():
    """By hand: one swa layer of 4 experts' share each, query_up and output cut in two."""
    config = tiny_config("swa", mtp__num_layers=0, residual__kind="plain", moe__num_hash_layers=0)
    whole, ours = stage_shares(config, Work(64))[0], stage_shares(config, Work(64, data=4, tensor=2, expert=4))[0]
    experts = 8 * 3 * 16 * 32
    assert whole.experts == experts and ours.experts == experts // 4 // 2
    cut = 2 * 64 * 32 + 4 * 16 * 12 + 4 + 2 * 8 * 32 + 32 * 16 + 3 * 16 * 32  # both vocabularies, attention, shared
    assert ours.size - ours.experts == whole.size - whole.experts - cut // 2
    assert whole.matrices == whole.size - 2 * 64 * 32 - 4 - 12 - 16 - 3 * 32  # vocabulary, sink, norms


@pytest.mark.parametrize("name", MODELS)
def test_parts_have_names(name):
    config = config_of(name)
    assert set(counts_by_part(config)) <= set(PARTS)
    trunk = replace(config, mtp=replace(config.mtp, num_layers=0))
    assert active_matrix_parameters(trunk) <= active_matrix_parameters(config)
