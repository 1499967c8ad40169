"""One of several ranks dies at any moment: the others end; the same command continues, on as many ranks or fewer."""

import random
import time

import pytest

from tests.distributed.test_layouts import FOUR, LOSS, TWO
from tests.faults.lives import Life, overrides
from tests.runs import checkpoint_digests, losses

pytestmark = [pytest.mark.faults, pytest.mark.distributed, pytest.mark.timeout(500)]

STEPS = 24
# name -> ranks, layout, kills
CASES = {
    "zero1": (2, ["parallelism=zero1"], 1),
    "zero3": (2, ["parallelism=zero3"], 3),
    "expert": (2, TWO["expert"], 3),
    "pipeline": (2, TWO["pipeline"], 3),
    "expert_pipeline": (4, FOUR["expert_pipeline"], 3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def undisturbed(base, ranks, layout, name):
    if not (base / name).exists():
        lives = Life.of_ranks(ranks, arguments(base, name, layout), base / f"{name}.log")
        assert [life.end() for life in lives] == [0] * ranks, lives[0].log.read_text()
    return name


def arguments(base, name, layout):
    return overrides(base, name, "optimizer=muon", f"train.max_steps={STEPS}", *layout)


def kill_one(base, name, ranks, layout, number, draw):
    """In turns: while a checkpoint is being written, anywhere in a step, and while the run starts."""
    lives, folder = (
        Life.of_ranks(ranks, arguments(base, name, layout), base / f"{name}.log"),
        base / name / "checkpoints",
    )
    victim = lives[draw.randrange(ranks)]
    if number % 3 == 2:
        moment = time.monotonic() + draw.uniform(0, 3)
        hit = victim.kill_when(lambda: time.monotonic() >= moment)
        for life in lives:  # as torchrun does: what waits for a rank to appear would wait for long
            life.process.kill()
    else:
        began, more = steps(base, name), draw.randrange(2, 8)
        hit = victim.kill_when(
            lambda: steps(base, name) >= began + more and (number % 3 == 1 or any(folder.glob(".step_*")))
        )
    codes = [life.end() for life in lives]
    assert hit and 0 not in codes, (codes, victim.log.read_text()[-3000:])


def steps(base, name):
    try:
        return len(losses(base, name))
    except FileNotFoundError:
        return 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_dies_costs_time_alone(base, case):
    ranks, layout, kills = CASES[case]
    whole, name = undisturbed(base, ranks, layout, f"whole_{case}"), f"killed_{case}"
    draw = random.Random(case)
    for number in range(kills):
        kill_one(base, name, ranks, layout, number, draw)
    lives = Life.of_ranks(ranks, arguments(base, name, layout), base / f"{name}.log")
    assert [life.end() for life in lives] == [0] * ranks, lives[0].log.read_text()[-3000:]
    assert losses(base, name) == losses(base, whole)
    assert checkpoint_digests(base, name, STEPS) == checkpoint_digests(base, whole, STEPS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["zero3", "expert", "expert_pipeline"])
def test_the_ranks_that_are_left_go_on(base, case):
    ranks, layout, _ = CASES[case]
    whole, name = undisturbed(base, ranks, layout, f"whole_{case}"), f"fewer_{case}"
    kill_one(base, name, ranks, layout, 0, random.Random(case))
    life = Life(arguments(base, name, ["parallelism=zero1"]), base / f"{name}.log")
    assert life.end() == 0, life.log.read_text()[-3000:]
    assert losses(base, name) == pytest.approx(losses(base, whole), abs=LOSS["muon"], rel=0)
