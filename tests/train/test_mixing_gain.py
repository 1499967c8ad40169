"""Gains of products of mixing matrices, against products written out and models whose matrices are known."""

import numpy as np
import pytest
import torch

from tests.runs import TINY
from v4train.config import load
from v4train.model import build_model
from v4train.train.mixing_gain import MixingGain, composite_gains


def naive(mixing: np.ndarray, token: int) -> tuple[list[float], list[float]]:
    """Of each site, by products of its own from the first site to it and from it to the last."""
    count, forward, backward = len(mixing), [], []
    for site in range(count):
        since_first, to_last = np.eye(mixing.shape[-1]), np.eye(mixing.shape[-1])
        for other in range(site + 1):
            since_first = np.dot(mixing[other, token], since_first)
        for other in range(site, count):
            to_last = np.dot(mixing[other, token], to_last)
        forward.append(max(sum(abs(x) for x in row) for row in since_first))
        backward.append(max(sum(abs(x) for x in column) for column in to_last.T))
    return forward, backward


def test_composite_gains_are_those_of_the_products():
    mixing = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forward, backward = composite_gains(mixing)
    for token in range(5):
        expected = naive(mixing.numpy(), token)
        np.testing.assert_allclose(forward[:, token], expected[0], rtol=1e-12)
        np.testing.assert_allclose(backward[:, token], expected[1], rtol=1e-12)


def built(kind: str):
    keys = [key for key in TINY if key.startswith("model.")]
    return build_model(load([f"model/residual={kind}", *keys, "tokenizer.vocab_size=320"]).model)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gains_of_a_model_are_of_the_matrices_that_its_tokens_met(recompute):
    """HC's static parts are the mixing where its gates are 0; recomputation adds nothing."""
    model, generator = built("hc"), torch.Generator().manual_seed(1)
    model.recompute = recompute
    static = []
    with torch.no_grad():
        for block in model.blocks:
            for site in (block.attention_residual, block.ffn_residual):
                site.gates.zero_()
                site.static_bias[-16:] = torch.randn(16, generator=generator)
                static.append(site.static_bias[-16:].view(1, 4, 4).mT.numpy())  # kept as [source, destination]
    gain = MixingGain(model)
    handles = gain.hook()
    for _ in range(2):
        ids = torch.randint(0, 320, (2, 40), generator=generator)
        model(ids, targets=ids).loss.backward()
    for handle in handles:
        handle.remove()
    assert {len(of) for of in gain._mixing.values()} == {2}
    found = gain.take()
    forward, backward = naive(np.array(static, dtype=np.float64), 0)
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2"]
    np.testing.assert_allclose([of[0] for of in found.values()], forward[1::2], rtol=1e-5)
    np.testing.assert_allclose([of[1] for of in found.values()], backward[::2], rtol=1e-5)
    assert gain.take() == {}


def test_sinkhorn_keeps_the_gain_near_one_and_a_plain_residual_has_none():
    for kind in ("mhc", "plain"):
        model = built(kind)
        gain = MixingGain(model)
        handles = gain.hook()
        ids = torch.zeros(1, 40, dtype=torch.long)
        model(ids, targets=ids)
        assert len(handles) == (6 if kind == "mhc" else 0)
        found = gain.take()
        assert len(found) == (3 if kind == "mhc" else 0)
        assert all(value == pytest.approx(1, abs=1e-3) for pair in found.values() for value in pair)
