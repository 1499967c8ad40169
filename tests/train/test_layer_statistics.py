"""Against weights kept before and after, and outputs of the parts called by hand. Layouts: tests/distributed."""

import pytest
import torch
import torch.distributed as dist

from tests.runs import TINY
from v4train.config import load
from v4train.model import build_model
from v4train.train import layer_statistics
from v4train.train.activation_scales import ActivationScales
from v4train.train.layer_statistics import LayerStatistics, layer_of


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_figures_of_a_step(alone, monkeypatch):
    torch.manual_seed(0)
    keys = [key for key in TINY if key.startswith("model.")]
    model = build_model(load([*keys, "tokenizer.vocab_size=320"]).model)
    batches = [torch.randint(0, 320, (2, 40)) for _ in range(2)]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    statistics = LayerStatistics(model, sizes, True, torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scales = ActivationScales(model)
    with scales.measuring(), statistics.measuring():
        for ids in batches:
            model(ids, targets=ids)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    found = statistics.take(scales.scales({key: float(value) for key, value in scales.sums().items()}))

    assert list(found) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "head", "mtp"]
    for layer, figures in found.items():
        names = [name for name in sizes if layer_of(name) == layer]
        after = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
        then = torch.cat([before[name].flatten() for name in names])
        ratio = (after - then).norm() / after.norm()
        assert figures["update_ratio"] == pytest.approx(float(ratio), rel=1e-5), layer

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
        squares = dict.fromkeys(("blocks.0", "blocks.1", "blocks.2"), 0.0)
        for ids in batches:
            state = model.embedding(None, ids, torch.zeros_like(ids), None)
            for name, block in zip(squares, model.blocks, strict=True):
                state = block(*state)
                squares[name] += float(state[0].square().mean()) / 2
    for name, square in squares.items():
        assert found[name]["activation_rms"] == pytest.approx(square**0.5, rel=1e-5)
    assert {name for name, figures in found.items() if "activation_rms" in figures} == set(squares)
    for way in ("gain_forward", "gain_backward"):  # mHC's are near 1: test_mixing_gain.py
        assert {name: figures[way] for name, figures in found.items() if way in figures} == pytest.approx(
            dict.fromkeys(squares, 1.0), abs=1e-2
        )


def test_a_sample_of_a_large_tensor_is_near(alone, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(400, 1000, generator=generator))
    sample = layer_statistics._sample(parameter)
    assert layer_statistics.SAMPLED / 2 <= len(sample) <= layer_statistics.SAMPLED
    assert float(sample.square().mean()) == pytest.approx(float(parameter.detach().square().mean()), rel=0.02)


def test_nothing_is_left_behind(alone):
    keys = [key for key in TINY if key.startswith("model.")]
    model = build_model(load([*keys, "tokenizer.vocab_size=320"]).model)
    statistics = LayerStatistics(model, {}, True, torch.device("cpu"))
    with ActivationScales(model).measuring():
        assert all(hook.passes_on for block in model.blocks for hook in block._forward_hooks.values())
        with statistics.measuring():
            pass
    assert not any(block._forward_hooks for block in model.blocks)
