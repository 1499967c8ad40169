"""The first losses of every small model, which a refactoring must not move: tests/golden/<model>.json.

After a change that is meant to move them, and says so in its commit: python -m tests.model.test_golden
"""

import json
from pathlib import Path

import pytest
import torch

from tests.model.packings import ids_of, shifted
from v4train.config import load
from v4train.model import build_model
from v4train.overrides import config_dir

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("flash_small", "v3_small", "v32_small", "gpt_oss_small", "dense_small")
STEPS, LAYOUT, LEARNING_RATE = 5, [150, -6, 100], 0.02
# Fewer than the 64 entries and 250 tokens of so short a sequence, or nothing would be selected.
OVERRIDES = ["model.attention.indexer.top_k=16", "model.attention.dsa.top_k=64"]


def first_losses(name: str) -> list[dict[str, float]]:
    """All losses of each step: fp32, plain SGD (Adam's first steps would amplify rounding), skewed random tokens."""
    model = build_model(load([f"model={name}", *OVERRIDES]).model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    generator, ids = torch.Generator().manual_seed(0), ids_of(LAYOUT)
    history = []
    for _ in range(STEPS):
        tokens = (torch.rand(ids.shape, generator=generator) ** 6 * model.config.vocab_size).long()
        output = model(tokens, ids, shifted(tokens, ids))
        losses = {name: x.item() for name, x in sorted(output.losses.items()) if name.endswith(("loss", "kl"))}
        history.append({"loss": output.loss.item(), **losses})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return history


@pytest.mark.parametrize("name", MODELS)
def test_first_losses_have_not_moved(name):
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    ours = first_losses(name)
    assert len(ours) == len(expected) == STEPS
    for step, (now, before) in enumerate(zip(ours, expected, strict=True)):
        assert now == pytest.approx(before, abs=1e-4), f"step {step + 1}"
    assert expected[-1]["lm_loss"] < expected[0]["lm_loss"] - 0.3  # it does train


def test_every_small_model_has_its_losses():
    assert {path.stem for path in (config_dir() / "model").glob("*_small.yaml")} == set(MODELS)


if __name__ == "__main__":
    for model in MODELS:
        (GOLDEN / f"{model}.json").write_text(json.dumps(first_losses(model), indent=1) + "\n")
