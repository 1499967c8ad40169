"""Frozen groups: not a bit of weight or optimizer state changes, in every ZeRO stage; the others train as they should.

The phases are those of an indexer: unused, then trained alone, then with all the rest; without gradients and with. In
some launches the number of micro-batches changes as well, within and between them.
"""

import json
from functools import cache

import pytest
import torch

from tests.distributed.engine_worker import PHASES, STEPS, is_frozen, make_model, train_plainly
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

CLIP = 0.05
DROPPED = 1  # a step with an infinite gradient, just before other groups are frozen
LOSS_TOLERANCE = {"adamw": 1e-5, "muon": 1e-4}
ALL = pytest.mark.exhaustive
CHANGING = [1, 2, 3, 1, 2, 2, 4, 3]  # micro-batches of each step
LAUNCHES = [pytest.param((2, CHANGING), id="2-changing")]
LAUNCHES += [pytest.param(launch, marks=ALL, id="{}-{}".format(*launch)) for launch in ((2, 1), (1, 2), (2, 2), (3, 1))]
EACH_STAGE = [(stage, name) for stage in (0, 1, 2, 3) for name in ("adamw", "muon")]

oracle = cache(train_plainly)


@pytest.fixture(scope="module", params=LAUNCHES)
def ranks(tmp_path_factory, request) -> list[dict[tuple[int, str], dict]]:
    """Results of every rank by stage and optimizer, of one launch: (ranks, accumulation of all or each step)."""
    world, accumulation = request.param
    out = tmp_path_factory.mktemp(f"{world}")
    job = {"accumulation": accumulation, "grad_clip": CLIP, "phases": True}
    job |= {"inject": DROPPED, "injection": "infinite_loss"}
    jobs = [job | {"stage": stage, "optimizer": name} for stage, name in EACH_STAGE]
    launch("tests.distributed.engine_worker", world, [json.dumps({"folder": str(out), "jobs": jobs})], out, timeout=120)
    results = [torch.load(out / f"rank_{rank}.pt", weights_only=True) for rank in range(world)]
    return [dict(zip(EACH_STAGE, rank, strict=True)) for rank in results]


@pytest.mark.parametrize(("stage", "name"), EACH_STAGE)
def test_frozen_groups_keep_every_bit_and_the_others_change(ranks, stage, name):
    for rank in ranks:
        result = rank[stage, name]
        assert result["finite"] == [step != DROPPED for step in range(STEPS)]
        before = {parameter: {"weight": weight} for parameter, weight in make_model().state_dict().items()}
        for step, after in enumerate(result["states"]):
            for parameter, tensors in before.items():
                same = [torch.equal(x.view(torch.int32), after[parameter][key].view(torch.int32))
                        for key, x in tensors.items()]  # fmt: skip
                frozen = is_frozen(parameter, PHASES[step][0]) or step == DROPPED
                assert all(same) if frozen else not any(same), (step, parameter, list(tensors))
            before = after


@pytest.mark.parametrize(("stage", "name"), EACH_STAGE)
def test_training_in_phases_equals_plain_pytorch(ranks, stage, name):
    """Losses, norms of what trains, weights and counts: what was frozen goes on from where it stood."""
    expected = oracle(name, CLIP, 0, skip=DROPPED, phases=True)
    indexer_steps = sum(frozen != "indexer" and step != DROPPED for step, (frozen, _) in enumerate(PHASES))
    for rank in ranks:
        result = rank[stage, name]
        for figure, limits in (("losses", {"abs": LOSS_TOLERANCE[name], "rel": 0}), ("norms", {"rel": 1e-5})):
            finite = [(x, y) for step, (x, y) in enumerate(zip(result[figure], expected[figure], strict=True))
                      if step != DROPPED]  # fmt: skip
            ours, theirs = zip(*finite, strict=True)
            assert ours == pytest.approx(theirs, **limits), figure
        for parameter, weight in expected["weights"].items():
            ours = result["state"][parameter]["weight"]
            torch.testing.assert_close(ours, weight, atol=2e-5, rtol=0)
        if name == "adamw":
            assert result["state"]["indexer.weight"]["step"] == indexer_steps == 5
            assert result["state"]["embed.weight"]["step"] == STEPS - 1 - 3
