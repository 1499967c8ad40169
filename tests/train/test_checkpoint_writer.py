"""Writing while training goes on: what was begun is written as it was, or the reason is known and nothing is harmed."""

import shutil
import threading

import pytest
import torch

from v4train.train import checkpoint, checkpoint_writer
from v4train.train.checkpoint_writer import CheckpointWriter

BUFFERS = {"router.bias": torch.tensor([0.5, -0.5])}


def parameters(value):
    names = ("a", "b", "c")
    weights = [("weight", name, torch.full((3,), value)) for name in names]
    return weights + [("step", name, torch.tensor(value)) for name in names]


def start(writer, step):
    writer.start(step, parameters(float(step)), BUFFERS, {"tokens": step})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held(monkeypatch):
    """Writing waits for this event."""
    event, save_file = threading.Event(), checkpoint_writer.save_file
    monkeypatch.setattr(checkpoint_writer, "save_file", lambda *args: event.wait(20) and save_file(*args))
    yield event
    event.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, held):
    writer, buffer, state = CheckpointWriter(tmp_path), BUFFERS["router.bias"].clone(), {"list": [1]}
    writer.start(5, parameters(5.0), {"router.bias": buffer}, state)
    assert checkpoint.newest(tmp_path) is None and not writer.failed
    buffer += 1  # the next step
    state["list"].append(2)
    held.set()
    assert writer.settle() is None
    reader = checkpoint.Reader(checkpoint.newest(tmp_path))
    assert reader.manifest["step"] == 5 and reader.manifest["state"] == {"list": [1]}
    assert torch.equal(reader.buffers()["router.bias"], BUFFERS["router.bias"])
    assert torch.equal(reader.parameter("b")["weight"], torch.full((3,), 5.0))
    assert names(tmp_path) == ["step_00000005"] and set(reader.manifest["files"]) == {
        "weight-00000.safetensors",
        "step-00000.safetensors",
        "buffers-00000.safetensors",
    }
    assert writer.settle() is None  # nothing is in flight


def test_a_process_killed_while_it_writes_leaves_the_one_before(tmp_path, held):
    good = checkpoint_writer.CheckpointWriter(tmp_path)
    held.set()
    start(good, 1)
    good.settle()
    held.clear()
    start(CheckpointWriter(tmp_path), 2)  # and is never heard of again
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    assert len(names(tmp_path)) <= 2
    held.set()


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".step_00000002-12345678-1").mkdir()
    (tmp_path / ".step_00000002.tmp").mkdir()  # of older versions
    writer = CheckpointWriter(tmp_path)
    assert names(tmp_path) == []
    start(writer, 2)
    assert writer.settle() is None and names(tmp_path) == ["step_00000002"]


def test_the_newest_are_kept_and_each_nth(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=3)
    for step in range(1, 10):
        start(writer, step)
        assert writer.settle() is None
    assert names(tmp_path) == [f"step_{step:08d}" for step in (3, 6, 8, 9)]


def test_a_full_disk_is_said_and_harms_nothing(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=1)
    start(writer, 1)
    assert writer.settle() is None
    save_file = checkpoint_writer.save_file

    def full(tensors, path):
        if "step-" in path.name:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    start(writer, 2)
    problem = writer.settle()
    assert "rank 0" in problem and "No space left on device" in problem
    assert names(tmp_path) == ["step_00000001"] and checkpoint.damage(tmp_path / "step_00000001") is None
    monkeypatch.setattr(checkpoint_writer, "save_file", save_file)
    start(writer, 3)
    assert writer.settle() is None and names(tmp_path) == ["step_00000003"]


def test_a_folder_that_vanished_is_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    writer = CheckpointWriter(folder)
    start(writer, 1)
    writer.settle()
    shutil.rmtree(folder)
    start(writer, 2)
    assert writer.settle() is None and names(folder) == ["step_00000002"]


def test_a_folder_that_is_none_is_a_problem_until_it_is_one(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.write_text("in the way")
    writer = CheckpointWriter(folder)
    start(writer, 1)
    assert writer.settle()
    folder.unlink()
    start(writer, 2)
    assert writer.settle() is None and names(folder) == ["step_00000002"]


def test_a_step_that_comes_again_takes_the_place_of_the_damaged_one(tmp_path):
    writer = CheckpointWriter(tmp_path)
    start(writer, 2)
    writer.settle()
    (tmp_path / "step_00000002" / "weight-00000.safetensors").write_bytes(b"")
    start(writer, 2)
    assert writer.settle() is None and names(tmp_path) == ["step_00000002"]
    assert checkpoint.damage(tmp_path / "step_00000002") is None


def test_files_that_vanish_meanwhile_are_missed(tmp_path, monkeypatch):
    writer, replace = CheckpointWriter(tmp_path, keep=1), checkpoint_writer.durable.replace
    start(writer, 1)
    assert writer.settle() is None

    def removing(path, content):
        replace(path, content)
        for weights in path.parent.glob("weight-*"):
            weights.unlink()

    monkeypatch.setattr(checkpoint_writer.durable, "replace", removing)
    start(writer, 2)
    assert "have vanished: weight-00000.safetensors" in writer.settle()
    assert names(tmp_path) == ["step_00000001"]


def test_a_users_own_copy_stays(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1)
    start(writer, 1)
    writer.settle()
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001_best")
    start(writer, 2)
    writer.settle()
    assert names(tmp_path) == ["step_00000001_best", "step_00000002"]
