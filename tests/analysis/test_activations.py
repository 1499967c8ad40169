"""What a step keeps for backward, against the storages that autograd really saves."""

import pytest
import torch

from v4train.analysis.activations import unit_bytes
from v4train.analysis.work import Work
from v4train.model import build_model, model_config
from v4train.model import recompute as recompute_module
from v4train.overrides import composed

# (model, rows, tokens, recompute, precision, overrides)
FEW = [
    ("flash_small", 2, 256, "none", "fp32", []),
    ("flash_small", 2, 256, "none", "bf16", []),
    ("flash_small", 1, 256, "attention", "fp32", []),
    ("flash_small", 1, 256, "block", "fp32", []),
    ("v32_small", 1, 512, "none", "fp32", []),
    ("dense_small", 1, 640, "none", "fp32", []),
]
MORE = [
    ("flash_small", 4, 512, "none", "fp32", []),
    ("flash_small", 4, 512, "none", "bf16", []),
    ("flash_small", 4, 512, "attention", "bf16", []),
    ("flash_small", 1, 1024, "none", "fp32", []),
    ("flash_small", 2, 512, "none", "fp32", ["model/residual=plain"]),
    ("flash_small", 2, 512, "none", "fp32", ["model/residual=hc"]),
    ("v3_small", 2, 512, "none", "fp32", []),
    ("v32_small", 1, 1024, "none", "fp32", []),
    ("gpt_oss_small", 2, 512, "none", "fp32", []),
    ("gpt_oss_small", 1, 1024, "none", "bf16", []),
    ("benchmark", 1, 2048, "none", "fp32", []),
    ("benchmark", 1, 4096, "none", "fp32", []),  # cheap tensors are computed again
]


def saved_bytes(config, rows, length, recompute, precision, monkeypatch):
    """Bytes of all storages that are saved in forward, but parameters and buffers."""
    monkeypatch.setattr(recompute_module, "_in_checkpoint", lambda: False)  # it takes the hooks for a checkpoint's
    model = build_model(config).train()
    model.recompute = recompute
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(config.vocab_size, (2, rows, length), generator=generator)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()  # kept alive, or its place would be another's later
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(ids, torch.zeros_like(ids), targets)
    return sum(storage.nbytes() for storage in saved.values())


def check(monkeypatch, name, rows, length, recompute, precision, overrides):
    config = model_config(composed("pretrain", [f"model={name}", *overrides]).model)
    work = Work(length, rows=rows, recompute=recompute, precision=precision)
    ours = sum(unit_bytes(config, work))
    assert ours == pytest.approx(saved_bytes(config, rows, length, recompute, precision, monkeypatch), rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=str)
def test_of_small_models(case, monkeypatch):
    check(monkeypatch, *case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", MORE, ids=str)
def test_of_more_models(case, monkeypatch):
    check(monkeypatch, *case)
