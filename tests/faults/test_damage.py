"""Each file of the newest checkpoint truncated, with one bit flipped, or deleted: a run goes on from the one before.

It ends with the parameters of an undisturbed run, since nothing was lost but time.
"""

import random
import shutil

import pytest

from tests.faults.lives import Life, overrides
from tests.runs import checkpoint_digests, losses
from v4train.train import checkpoint

pytestmark = pytest.mark.faults

HARMS = ("truncate", "flip", "delete")
STOPPED = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`whole`, and `stopped`, the same run up to a step in the middle."""
    base = tmp_path_factory.mktemp("damage")
    for name, more in (("whole", ()), ("stopped", (f"train.stop_at_step={STOPPED}",))):
        life = Life(overrides(base, name, "train.max_steps=10", *more), base / f"{name}.log")
        assert life.end() == 0, life.log.read_text()
    return base


def harm(path, how, draw):
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.exhaustive)])
def test_all_damage_is_found(base, times):
    newest = base / "stopped" / "checkpoints" / f"step_{STOPPED:08d}"
    before, draw = checkpoint.read_manifest(newest), random.Random(times)
    files = [*before["files"], checkpoint.MANIFEST]
    for name in files:
        kept = (newest / name).read_bytes()
        for how in HARMS:
            for _ in range(1 if how == "delete" else times):
                harm(newest / name, how, draw)
                unharmed = how == "flip" and checkpoint.damage(newest) is None
                if not unharmed:
                    assert checkpoint.newest(newest.parent).name == f"step_{STOPPED - 1:08d}"
                else:  # white space of the manifest
                    assert name == checkpoint.MANIFEST and checkpoint.read_manifest(newest) == before
                (newest / name).write_bytes(kept)
    assert checkpoint.damage(newest) is None


@pytest.mark.parametrize("how", ["flip", *(pytest.param(how, marks=pytest.mark.exhaustive) for how in HARMS[::2])])
def test_the_run_goes_on_from_the_one_before(base, how):
    name = f"harmed_{how}"
    shutil.copytree(base / "stopped", base / name)
    newest = base / name / "checkpoints" / f"step_{STOPPED:08d}"
    harm(newest / "weight-00000.safetensors", how, random.Random(1))
    life = Life(overrides(base, name, "train.max_steps=10"), base / f"{name}.log")
    assert life.end() == 0, life.log.read_text()
    assert f"checkpoint {newest} is damaged" in life.log.read_text()
    assert losses(base, name) == losses(base, "whole")
    assert checkpoint_digests(base, name, 10) == checkpoint_digests(base, "whole", 10)
