"""Killed at any moment and started again by the same command, a run ends with the parameters of an undisturbed one."""

import random
import time

import pytest

from tests.faults.lives import Life, overrides
from tests.runs import checkpoint_digests, losses

pytestmark = pytest.mark.faults

CASES = [(3, "muon")] + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((20, "muon"), (6, "adamw"))]
STEPS = 6  # that a run has for each kill


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.mark.parametrize(("kills", "optimizer"), CASES)
def test_sigkill_at_random_moments(base, kills, optimizer):
    """In turns: anywhere in a step, while a checkpoint is being written, and while the run starts."""
    name, draw, steps = f"{kills}_{optimizer}", random.Random(kills), STEPS * kills
    arguments = [f"optimizer={optimizer}", f"train.max_steps={steps}"]
    whole = Life(overrides(base, f"whole_{name}", *arguments), base / f"whole_{name}.log")
    assert whole.end() == 0, whole.log.read_text()
    folder, log, hits = base / name / "checkpoints", base / f"{name}.log", []
    for number in range(kills):
        life, began = Life(overrides(base, name, *arguments), log), len(losses_so_far(base, name))
        if number % 3 == 2:
            moment = time.monotonic() + draw.uniform(0, 1.5)
        else:
            more = draw.randrange(STEPS // 2)
            while life.process.is_alive() and len(losses_so_far(base, name)) <= began + more:
                time.sleep(0.002)
            moment = time.monotonic() + draw.uniform(0, 0.15)
        if number % 3 == 1:
            hits.append(life.kill_when(lambda: any(folder.glob(".step_*"))))
        else:
            hits.append(life.kill_when(lambda moment=moment: time.monotonic() >= moment))
    life = Life(overrides(base, name, *arguments), log)
    assert life.end() == 0, log.read_text()[-3000:]
    assert sum(hits) >= kills * 3 // 4 and sum(hits[1::3]) >= kills // 5, hits
    assert losses(base, name) == losses(base, f"whole_{name}")
    assert checkpoint_digests(base, name, steps) == checkpoint_digests(base, f"whole_{name}", steps)


def losses_so_far(base, name):
    try:
        return losses(base, name)
    except FileNotFoundError:
        return []
