"""Killed at any moment and started again by the same command, a run ends with the parameters of an undisturbed one."""

import random
import time

import pytest

from tests.faults.lives import STEPS, Life, overrides
from tests.runs import checkpoint_digests, losses

pytestmark = pytest.mark.faults

OPTIMIZERS = ["muon", pytest.param("adamw", marks=pytest.mark.exhaustive)]
KILLS = [4, pytest.param(20, marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


def whole(base, optimizer):
    """The run that nobody disturbed."""
    name = f"whole_{optimizer}"
    if not (base / name).exists():
        life = Life(overrides(base, name, f"optimizer={optimizer}"), base / f"{name}.log")
        assert life.end() == 0, life.log.read_text()
    return name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kills", KILLS)
def test_sigkill_at_random_moments(base, kills, optimizer):
    """Every other kill hits while a checkpoint is being written."""
    name, draw = f"killed_{kills}_{optimizer}", random.Random(kills)
    folder, log = base / name / "checkpoints", base / f"killed_{kills}_{optimizer}.log"
    expected, done, during_saves = whole(base, optimizer), 0, 0
    while done < kills:
        life = Life(overrides(base, name, f"optimizer={optimizer}"), log)
        began, more = len(losses_so_far(base, name)), draw.randrange(max(1, STEPS // kills))
        while life.process.is_alive() and len(losses_so_far(base, name)) <= began + more:
            time.sleep(0.002)
        if done % 2:
            hit = life.kill_when(lambda: any(folder.glob(".step_*")))
            during_saves += hit
        else:
            moment = time.monotonic() + draw.uniform(0, 0.2)
            hit = life.kill_when(lambda moment=moment: time.monotonic() >= moment)
        if not hit:
            break
        done += 1
    life = Life(overrides(base, name, f"optimizer={optimizer}"), log)
    assert life.end() == 0, log.read_text()[-3000:]
    assert done >= kills * 3 // 4 and during_saves >= kills // 4
    assert losses(base, name) == losses(base, expected)
    assert checkpoint_digests(base, name, STEPS) == checkpoint_digests(base, expected, STEPS)


def losses_so_far(base, name):
    try:
        return losses(base, name)
    except FileNotFoundError:
        return []
