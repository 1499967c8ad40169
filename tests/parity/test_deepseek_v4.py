"""Our model against transformers' `deepseek_v4`: same weights, same logits, same gradients."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as peer_module

from tests.models import random_model, random_tokens, tiny_config
from v4train.hf import from_hf, to_hf
from v4train.hf.deepseek_v4 import hf_tensors
from v4train.model import build_model

pytestmark = pytest.mark.parity

CASES = {
    # mix, batch, length, changes
    "window only": ("swa swa", 2, 37, {}),
    "csa": ("csa csa", 2, 61, {}),
    "hca": ("hca hca", 3, 77, {}),
    "v4 order, hash layer": ("swa swa csa hca csa hca", 2, 75, {}),
    "two hash layers": ("hca csa csa", 1, 50, {"moe__num_hash_layers": 2}),
    "no hash layer": ("csa swa hca", 2, 43, {"moe__num_hash_layers": 0}),
    "published ratios": ("csa hca", 1, 290, {"attention__hca_compression": 128, "attention__window": 16}),
    "top-1 of many": ("csa csa", 2, 70, {"attention__indexer__top_k": 1}),
    "shorter than a block": ("csa hca", 2, 3, {}),
    "two streams": ("csa hca", 2, 41, {"residual__num_streams": 2}),
    "odd expert width": ("csa", 2, 33, {"moe__intermediate_size": 15, "hidden_size": 30}),
    "whole head rotated": ("csa hca", 2, 40, {"attention__rope_dim": 16, "attention__indexer__head_dim": 16}),
}


@pytest.fixture(autouse=True)
def lower_index_wins_ties(monkeypatch):
    """Give the oracle our tie rule: its topk breaks exact ties arbitrarily (ReLU makes several percent of them)."""

    def topk(self, k, dim=-1, sorted=True, largest=True):
        values, indices = torch.sort(self, dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    forward = peer_module.DeepseekV4Indexer.forward

    def stable_forward(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", topk)
            return forward(self, *args, **kwargs)

    monkeypatch.setattr(peer_module.DeepseekV4Indexer, "forward", stable_forward)


def peers(case: str):
    mix, batch, length, changes = CASES[case]
    model = random_model(tiny_config(mix, mtp__num_layers=0, **changes), seed=1).eval()
    peer = to_hf(model)
    peer.set_experts_implementation("eager")  # its grouped_mm crashes on widths that are no multiple of 16 bytes
    return model, peer, random_tokens(batch, length)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(case):
    model, peer, tokens = peers(case)
    with torch.no_grad():
        ours, theirs = model(tokens).logits, peer(tokens, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(case):
    """Of the language-model loss; transformers gives the indexer none, and in eval mode neither do we."""
    model, peer, tokens = peers(case)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    model(tokens, targets=targets).loss.backward()
    logits = peer(tokens, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    compared = 0
    for name, parameter in model.named_parameters():
        if "indexer" in name:
            assert parameter.grad is None
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for peer_name, ours in hf_tensors(name, gradient).items():
            expected = torch.zeros_like(ours) if theirs[peer_name] is None else theirs[peer_name]
            error = (ours - expected).norm() / expected.norm().clamp(min=1e-9)
            assert error < 1e-4, f"{peer_name}: relative error {error:.1e}"
            compared += 1
    assert compared == len([name for name in theirs if ".indexer." not in name])


def test_weights_survive_the_way_there_and_back():
    model = random_model(tiny_config("swa csa hca", mtp__num_layers=0)).eval()
    config, state = from_hf(to_hf(model))
    again = build_model(config).eval()
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    tokens = random_tokens(2, 50)
    torch.testing.assert_close(model(tokens).logits, again(tokens).logits, atol=1e-6, rtol=1e-6)  # chunks differ


def test_a_saved_directory_loads(tmp_path):
    model = random_model(tiny_config("csa hca", mtp__num_layers=0)).eval()
    to_hf(model).save_pretrained(tmp_path)
    config, state = from_hf(tmp_path)
    again = build_model(config).eval()
    again.load_state_dict(state)
    tokens = random_tokens(1, 40)
    torch.testing.assert_close(model(tokens).logits, again(tokens).logits)
