"""The parity tests, the same for every architecture of transformers. A test file derives a class with its cases.

The oracle is transformers' own model, whose weights are ours converted, or the other way round.
"""

import copy
import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models import random_model, random_tokens, tiny_config
from v4train.errors import ConfigError
from v4train.hf import ARCHITECTURES, from_hf, to_hf
from v4train.hf.common import convert
from v4train.model import ModelConfig, Transformer, build_model
from v4train.model.config import LayerAttention, RopeConfig

PLAIN = {"residual__kind": "plain", "moe__num_hash_layers": 0, "mtp__num_layers": 0}
DENSE = PLAIN | {"ffn_mix": "dense"}
YARN = RopeConfig(1000.0, 4.0, 40, 4.0, 1.0, True, 1.1)  # short enough to matter
THEIR_YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=40, beta_fast=4.0)
SMALLEST = 1e-3  # norm of a gradient in these cases that is not zero but for rounding (a softmax over one key)
DECODED = 20  # last tokens, one by one
# What is no part of the model, or said in another form, in transformers' settings
UNCOMPARED = {"architectures", "dtype", "transformers_version", "rope_parameters", "tie_word_embeddings"}
UNCOMPARED |= {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path"}
UNCOMPARED |= {"max_window_layers"}  # qwen3: meaningless beside layer_types


class Parity:
    """Tests against one architecture."""

    name: str  # its model_type
    base: dict[str, Any]  # changes of `tiny_config` that all cases have
    cases: dict[str, tuple[str, int, int, dict[str, Any]]]  # mix, batch, length, changes
    own: dict[str, dict[str, Any]]  # settings of transformers' own models
    keeps: tuple[str, ...]  # what must survive of our description, beside what all have
    refused: dict[str, tuple[str, dict[str, Any], str, str]]  # mix, changes, key below model, words of the message
    refused_own: dict[str, tuple[str, dict[str, Any]]]  # key, settings

    def prepare(self, model: Transformer) -> None:
        """Change the random weights of ours where the architecture asks for it."""

    def pytest_generate_tests(self, metafunc):
        tables = {"case": self.cases, "own": self.own, "refused": self.refused, "refused_own": self.refused_own}
        for argument, values in tables.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values.values(), ids=values.keys())

    def model(self, mix: str, **changes: Any) -> Transformer:
        model = random_model(tiny_config(mix, **(self.base | changes)), seed=1).eval()
        self.prepare(model)
        return model

    def peers(self, case: tuple) -> tuple[Transformer, PreTrainedModel, torch.Tensor]:
        mix, batch, length, changes = case
        model = self.model(mix, **changes)
        return model, for_odd_widths(to_hf(model)), random_tokens(batch, length)

    def test_logits_agree(self, case):
        model, peer, tokens = self.peers(case)
        assert peer.config.model_type == self.name
        with torch.no_grad():
            assert_close(model(tokens).logits, peer(tokens, use_cache=False).logits)

    def test_gradients_agree(self, case):
        """Of the language-model loss; transformers gives an indexer none, and in eval mode neither do we."""
        model, peer, tokens = self.peers(case)
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        model(tokens, targets=targets).loss.backward()
        logits = peer(tokens, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        ours = {name: gradient(parameter) for name, parameter in model.named_parameters() if "indexer" not in name}
        assert all(parameter.grad is None for name, parameter in model.named_parameters() if "indexer" in name)
        theirs = {name: gradient(parameter) for name, parameter in peer.named_parameters() if "indexer" not in name}
        shapes = {name: tensor.shape for name, tensor in theirs.items()}
        ours, left = convert(ARCHITECTURES[self.name].all_links(model.config), ours, shapes)
        assert not left and ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            error = (ours[name] - expected).norm() / expected.norm().clamp(min=SMALLEST)
            assert error < 1e-4, f"{name}: relative error {error:.1e}"

    def test_decoding_agrees(self, case):
        """Prefill in uneven chunks, then token by token: with the peer's whole forward pass, and with its cache."""
        model, peer, tokens = self.peers(case)
        tokens = tokens[:1].repeat(2, 1) if len(tokens) == 1 else tokens[:2]
        tokens[1] = tokens[1].flip(0)
        cache, past, ours, theirs = model.new_cache(2, tokens.shape[1]), None, [], []
        with torch.no_grad():
            for part in tokens.split(decoding_steps(tokens.shape[1]), dim=1):
                ours.append(model(part, cache=cache).logits)
                output = peer(part, past_key_values=past, use_cache=True)
                theirs.append(output.logits)
                past = output.past_key_values
            whole = peer(tokens, use_cache=False).logits
        ours, theirs = torch.cat(ours, dim=1), torch.cat(theirs, dim=1)
        assert_close(ours, whole)
        assert_close(ours, theirs)

    def test_ours_survives_the_way_there_and_back(self, case):
        model, peer, _ = self.peers(case)
        config, state = from_hf(peer)
        assert_same_tensors(state, model.state_dict())
        assert described(config, self.keeps) == described(model.config, self.keeps)
        assert from_hf(to_hf(loaded(config, state)))[0] == config

    def test_theirs_survives_the_way_there_and_back(self, own):
        peer = randomised(transformers_model(self.name, own))
        config, state = from_hf(peer)
        model, tokens = loaded(config, state), random_tokens(2, 45, peer.config.vocab_size)
        again = to_hf(model)
        assert_same_tensors(again.state_dict(), peer.state_dict())
        assert settings(again) == settings(peer)
        with torch.no_grad():
            expected = peer(tokens, use_cache=False).logits
            assert_close(model(tokens).logits, expected)
            assert_close(for_odd_widths(again)(tokens, use_cache=False).logits, expected)

    def test_mtp_stays_behind(self):
        mix, batch, length, changes = next(iter(self.cases.values()))
        model, peer, tokens = self.peers((mix, batch, length, changes | {"mtp__num_layers": 1}))
        with torch.no_grad():
            assert_close(model(tokens).logits, peer(tokens, use_cache=False).logits)
        assert from_hf(peer)[0].mtp.num_layers == 0

    def test_refuses_what_it_cannot_hold(self, refused):
        mix, changes, key, words = refused
        with pytest.raises(ConfigError, match=words) as caught:
            to_hf(self.model(mix, **changes))
        assert caught.value.key == f"model.{key}"

    def test_refuses_what_we_do_not_have(self, refused_own):
        key, own = refused_own
        peer = transformers_model(self.name, own)
        with pytest.raises(ConfigError) as caught:
            from_hf(peer)
        assert caught.value.key == f"{self.name}.{key}"

    def test_a_saved_directory_loads(self, tmp_path):
        mix, _, length, changes = next(iter(self.cases.values()))
        model, tokens = self.model(mix, **changes), random_tokens(1, length)
        to_hf(model).save_pretrained(tmp_path)
        config, state = from_hf(tmp_path)
        assert_same_tensors(state, model.state_dict())
        with torch.no_grad():
            assert_close(loaded(config, state)(tokens).logits, model(tokens).logits)


def transformers_model(name: str, own: dict[str, Any]) -> PreTrainedModel:
    """From a copy of the settings: transformers writes into nested ones."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **copy.deepcopy(own)))


def for_odd_widths(peer: PreTrainedModel) -> PreTrainedModel:
    """Experts in a loop: transformers' grouped_mm crashes on widths that are no multiple of 16 bytes."""
    if any("experts" in name for name, _ in peer.named_modules()):
        peer.set_experts_implementation("eager")
    return peer


def randomised(peer: PreTrainedModel) -> PreTrainedModel:
    """All weights random, so that nothing hides at zero or one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in peer.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.2 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
            else:  # a hash table: different experts for each token
                experts = torch.rand(len(tensor), peer.config.n_routed_experts, generator=generator).argsort(-1)
                tensor.copy_(experts[:, : tensor.shape[1]])
    return for_odd_widths(peer.eval())


def loaded(config: ModelConfig, state: dict[str, torch.Tensor]) -> Transformer:
    model = build_model(config).eval()
    model.load_state_dict(state)
    return model


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def decoding_steps(length: int) -> list[int]:
    """Lengths of the pieces: a prefill in four uneven chunks or fewer, then single tokens."""
    prefill = max(length - DECODED, length // 2)
    cuts = sorted({0, prefill // 3, prefill // 3 + 1, prefill // 2, prefill} & set(range(prefill + 1)))
    return [stop - start for start, stop in pairwise(cuts)] + [1] * (length - prefill)


def described(config: ModelConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """What `keys` name, and what all architectures record; mha and mqa layers as the gqa layers they are."""
    common = ("vocab_size", "hidden_size", "num_layers", "ffn_kinds", "norm_eps", "init.std", "residual.kind")
    values = {key: functools.reduce(getattr, key.split("."), config) for key in (*common, *keys)}
    if "layers" in values:
        gqa = config.attention.gqa
        kv_heads = {"mha": gqa.num_heads, "mqa": 1}
        values["layers"] = [
            LayerAttention("gqa", replace(layer.options, num_kv_heads=kv_heads[layer.kind]))
            if layer.kind in kv_heads
            else layer
            for layer in values["layers"]
        ]
    return values


def settings(peer: PreTrainedModel) -> dict[str, Any]:
    return {key: value for key, value in peer.config.to_dict().items() if key not in UNCOMPARED}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def lower_index_wins_ties(monkeypatch: pytest.MonkeyPatch, indexer: type[torch.nn.Module]) -> None:
    """Give an indexer of the oracle our tie rule: its topk breaks exact ties arbitrarily (ReLU makes several percent of
    them)."""

    def topk(self, k, dim=-1, sorted=True, largest=True):
        values, indices = torch.sort(self, dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    forward = indexer.forward

    def stable_forward(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", topk)
            return forward(self, *args, **kwargs)

    monkeypatch.setattr(indexer, "forward", stable_forward)
