"""A disk that is full, or a folder that is gone: the run says so, trains on, and saves once it can again."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress

import pytest

from tests.faults.lives import Life, overrides
from tests.runs import checkpoint_digests, losses
from v4train.train import checkpoint, saving
from v4train.train.metrics import read_metrics

pytestmark = pytest.mark.faults

FAST = ("train.max_steps=60", "checkpoint.keep=1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("disk")
    life = Life(overrides(base, "whole", *FAST), base / "whole.log")
    assert life.end() == 0, life.log.read_text()
    return base


@pytest.fixture
def small_disk(base):
    """A file system with room for some checkpoints, and little more."""
    size = sum(file.stat().st_size for file in (base / "whole" / "checkpoints").rglob("*") if file.is_file())
    with mounted(base / "small", f"size={size * 4}") as mount:
        yield mount


@contextmanager
def mounted(folder, options="rw"):
    """A file system of its own in memory."""
    folder.mkdir(parents=True)
    if os.geteuid():
        pytest.skip("only root may mount a file system; continuous integration is")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def retry_soon():
    saving.RETRY_SECONDS = 0.2


def step_of(base, name):
    try:
        return read_metrics(base / name / "metrics.jsonl")[-1]["step"]
    except (FileNotFoundError, IndexError):
        return 0


def wait_for(life, ready):
    end = time.monotonic() + 60
    while not ready() and time.monotonic() < end:
        assert life.process.is_alive(), life.log.read_text()[-3000:]
        time.sleep(0.005)
    assert ready(), life.log.read_text()[-3000:]


def test_a_full_disk(base, small_disk):
    name, log = "full", base / "full.log"
    folder, filler = small_disk / name / "checkpoints", small_disk / "filler"
    life = Life([*overrides(base, name, *FAST), f"run.dir={small_disk / name}"], log, retry_soon)
    wait_for(life, lambda: checkpoint.newest(folder) is not None)

    def refused():
        """Another program takes whatever room there is, until a checkpoint has none."""
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(65536)):
                pass
        return "a checkpoint can't be written" in log.read_text()

    wait_for(life, refused)
    wait_for(life, lambda: checkpoint.newest(folder) is not None)  # what was saved is whole
    filler.unlink()
    assert life.end() == 0, log.read_text()[-3000:]
    assert losses(small_disk, name) == losses(base, "whole")
    assert checkpoint_digests(small_disk, name, 60) == checkpoint_digests(base, "whole", 60)


@pytest.mark.exhaustive
def test_a_disk_that_is_full_from_the_start_is_refused(base, small_disk):
    """In one line, and what is there stays: a run that was saved goes on once there is room."""
    name, log, filler = "resumed_full", base / "resumed_full.log", small_disk / "filler"
    arguments = [*overrides(base, name, *FAST), f"run.dir={small_disk / name}"]
    assert Life([*arguments, "train.stop_at_step=30"], log).end() == 0, log.read_text()[-3000:]
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert Life(arguments, log, give_up_soon).end() == 1
    assert f"run.dir={small_disk / name}: it can't be written (No space left on device)" in log.read_text()
    assert checkpoint.newest(small_disk / name / "checkpoints").name == "step_00000030"
    filler.unlink()
    assert Life(arguments, log).end() == 0, log.read_text()[-3000:]
    assert losses(small_disk, name) == losses(base, "whole")
    assert checkpoint_digests(small_disk, name, 60) == checkpoint_digests(base, "whole", 60)


@pytest.mark.exhaustive
def test_a_folder_that_is_read_only_for_a_while(base):
    name, log = "read_only", base / "read_only.log"
    assert Life([*overrides(base, name, *FAST), "train.stop_at_step=4"], log).end() == 0, log.read_text()[-3000:]
    saved = (base / name / "checkpoints").rename(base / name / "saved")
    with mounted(base / name / "checkpoints") as folder:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        life = Life(overrides(base, name, *FAST), log, retry_soon)
        wait_for(life, lambda: step_of(base, name) >= 5)
        wait_for(life, lambda: remounted(folder, "ro"))  # refused while a file is open for writing
        wait_for(life, lambda: "a checkpoint can't be written" in log.read_text())
        assert checkpoint.newest(folder) is not None
        assert remounted(folder, "rw")
        assert life.end() == 0, log.read_text()[-3000:]
        assert losses(base, name) == losses(base, "whole")
        assert checkpoint_digests(base, name, 60) == checkpoint_digests(base, "whole", 60)


def remounted(folder, how):
    return subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], capture_output=True).returncode == 0


@pytest.mark.exhaustive
def test_a_folder_that_vanishes(base):
    name, log = "vanished", base / "vanished.log"
    life = Life(overrides(base, name, *FAST), log, retry_soon)
    wait_for(life, lambda: step_of(base, name) >= 10)
    shutil.rmtree(base / name / "checkpoints", ignore_errors=True)
    assert life.end() == 0, log.read_text()[-3000:]
    assert losses(base, name) == losses(base, "whole")
    assert checkpoint_digests(base, name, 60) == checkpoint_digests(base, "whole", 60)


@pytest.mark.exhaustive
def test_a_folder_that_can_not_be_written_to_the_end(base):
    """The run ends with one line and another code than success, with the checkpoint before as it was."""
    name, log = "in_the_way", base / "in_the_way.log"
    life = Life(overrides(base, name, *FAST), log, give_up_soon)
    wait_for(life, lambda: step_of(base, name) >= 5)
    kept = base / name / "kept"
    os.kill(life.process.pid, signal.SIGSTOP)
    os.rename(base / name / "checkpoints", kept)
    (base / name / "checkpoints").write_text("in the way")
    os.kill(life.process.pid, signal.SIGCONT)
    assert life.end() == 1
    assert log.read_text().count("error: checkpoint") == 1
    assert any(checkpoint.damage(path) is None for path in kept.glob("step_*"))


def give_up_soon():
    retry_soon()
    saving.FINAL_PAUSES = (0, 0.1)
