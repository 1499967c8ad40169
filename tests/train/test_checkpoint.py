"""Checkpoint files: what is written is what is read, whole or not at all."""

import json
import logging

import pytest
import torch

from v4train.errors import ConfigError
from v4train.train import checkpoint, checkpoint_writer
from v4train.train.checkpoint import CheckpointConfig, Reader

PARAMETERS = {
    "a.weight": {"weight": torch.arange(6.0).view(2, 3), "exp_avg": torch.ones(2, 3), "step": torch.tensor(4.0)},
    "b.bias": {"weight": torch.tensor([torch.pi]), "momentum_buffer": torch.tensor([-1.0])},
}
BUFFERS = {"router.bias": torch.tensor([0.5, -0.5]), "router.table": torch.tensor([[3, 1]])}


def save(folder, step, keep=0):
    pieces = [(kind, name, tensor) for name, tensors in PARAMETERS.items() for kind, tensor in tensors.items()]
    return checkpoint_writer.save(folder, step, pieces, BUFFERS, {"tokens": step * 10}, keep)


def test_what_is_saved_is_read_back_bitwise(tmp_path):
    reader = Reader(save(tmp_path, 7))
    assert reader.manifest["step"] == 7
    assert reader.manifest["state"] == {"tokens": 70}
    for name, tensors in PARAMETERS.items():
        read = reader.parameter(name)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[kind], tensors[kind]) for kind in tensors)
    assert all(torch.equal(reader.buffers()[name], tensor) for name, tensor in BUFFERS.items())


def test_nothing_is_pickled(tmp_path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_100000000"]


def test_a_future_that_was_abandoned_is_removed_not_kept_instead_of_the_present(tmp_path):
    """Step 3 is damaged, the run went back to 1 and saves 2: with keep=1, 2 must be what stays."""
    save(tmp_path, 1)
    (save(tmp_path, 3) / "weight-00000.safetensors").write_bytes(b"")
    save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_an_unfinished_write_is_never_found(tmp_path):
    good = save(tmp_path, 1)
    torn = tmp_path / ".step_00000002.tmp"
    torn.mkdir()
    (torn / "manifest.json").write_text("{}")
    assert checkpoint.newest(tmp_path) == good
    assert checkpoint.newest(tmp_path / "absent") is None


FILES = ["manifest.json", "weight-00000.safetensors", "exp_avg-00000.safetensors", "buffers-00000.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, file, harm):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path = bad / file
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncate": content[:-3], "flip": flipped, "empty": b""}[harm])
    with caplog.at_level(logging.WARNING, "v4train"):
        assert checkpoint.newest(tmp_path) == good
    assert str(bad) in caplog.text


def test_a_checkpoint_of_another_format_is_not_read(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 999}))
    assert checkpoint.damage(path) is not None


def test_resume_takes_auto_never_or_a_checkpoint(tmp_path):
    assert CheckpointConfig(0, 1, 0, "auto").resume == "auto"
    assert CheckpointConfig(0, 1, 0, str(save(tmp_path, 1)))
    with pytest.raises(ConfigError, match="checkpoint.resume"):
        CheckpointConfig(0, 1, 0, str(tmp_path))


def test_every_bit_of_a_manifest_counts(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (1, 4, 64):
            changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            path.write_bytes(changed)
            meant = _meaning(changed)
            assert (checkpoint.damage(path.parent) is None) == (meant == json.loads(content)), place


def _meaning(content):
    """Space between the tokens of JSON means nothing."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    assert checkpoint.damage(path) is None and Reader(path).manifest["state"] == {"tokens": 10}
