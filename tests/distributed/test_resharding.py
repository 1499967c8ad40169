"""A checkpoint of any layout continues in any other, optimizer state included (DESIGN 10).

Layouts stand in a ring: each one saves in the middle of a run, and the next one continues from that. What is saved does
not depend on who saved it (test_layouts.py), so the ring stands for all pairs; the ends of it are 4 ranks and 1.
"""

import shutil
from pathlib import Path

import pytest

from tests.distributed.test_layouts import FOUR, LOSS, OPTIMIZERS, SHARD_ALL, TWO, train
from tests.runs import STEPS, losses
from v4train.train.checkpoint import Reader

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive, pytest.mark.timeout(280)]

MIDDLE = 5
ZERO = {stage: [f"parallelism=zero{stage}", *([SHARD_ALL] if stage == 3 else [])] for stage in range(4)}
# Neighbours differ in ranks, ZeRO stage or what is cut, most in all of these
RING = {
    "one": (1, ZERO[0]),
    "full4": (4, FOUR["full4"]),
    "tensor": (2, TWO["tensor"]),
    "four_zero3": (4, ZERO[3]),
    "expert": (2, TWO["expert"]),
    "four_stages": (4, FOUR["four_stages"]),
    "two_zero2": (2, ZERO[2]),
    "tensor_context_expert": (4, FOUR["tensor_context_expert"]),
    "one_zero3": (1, ZERO[3]),
    "expert_replicas": (4, FOUR["expert_replicas"]),
    "context": (2, TWO["context"]),
    "tensor_pipeline": (4, FOUR["tensor_pipeline"]),
    "two_zero3": (2, ZERO[3]),
    "context_data_expert": (4, FOUR["context_data_expert"]),
    "pipeline": (2, TWO["pipeline"]),
    "tensor_expert": (4, FOUR["tensor_expert"]),
    "two_zero1": (2, ZERO[1]),
    "expert_pipeline": (4, FOUR["expert_pipeline"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("resharding")
    train(base, 1, {f"whole_{optimizer}": [f"optimizer={optimizer}", *ZERO[0]] for optimizer in OPTIMIZERS})
    return base


def halves(name: str) -> dict[str, list[str]]:
    """Runs of a layout that stop in the middle, by name."""
    _, overrides = RING[name]
    return {
        f"{name}_{optimizer}": [f"optimizer={optimizer}", *overrides, f"train.stop_at_step={MIDDLE}"]
        for optimizer in OPTIMIZERS
    }


@pytest.mark.parametrize("name", RING)
def test_each_layout_continues_what_the_one_before_it_saved(base, name):
    names = list(RING)
    before = names[names.index(name) - 1]
    ranks, overrides = RING[name]
    if not (base / f"{before}_muon").exists():  # the first of the ring, or a test run alone
        train(base, RING[before][0], halves(before))
    moved = {f"{before}_to_{name}_{optimizer}": [f"optimizer={optimizer}", *overrides] for optimizer in OPTIMIZERS}
    for optimizer in OPTIMIZERS:
        shutil.copytree(base / f"{before}_{optimizer}", base / f"{before}_to_{name}_{optimizer}")
    own = {} if (base / f"{name}_muon").exists() else halves(name)
    train(base, ranks, own | moved)
    for optimizer in OPTIMIZERS:
        run, whole = f"{before}_to_{name}_{optimizer}", f"whole_{optimizer}"
        assert Reader(base / run / "checkpoints" / f"step_{STEPS:08d}").manifest["world_size"] == ranks
        for key in ("loss", "mtp_loss", "indexer_kl"):
            got, expected = losses(base, run, key), losses(base, whole, key)
            assert len(got) == STEPS
            assert got == pytest.approx(expected, abs=LOSS[optimizer], rel=0), (optimizer, key)
