"""Start, continue or refuse what a run's folder holds."""

from unittest.mock import Mock

import pytest
import torch

from v4train import durable
from v4train.errors import ConfigError
from v4train.train import checkpoint, checkpoint_writer
from v4train.train.restarts import launch_name, restarts
from v4train.train.run_directory import RunDirectory

CONFIG = {
    "seed": 1,
    "model": {"hidden_size": 8, "attention": {"window": 4, "query_chunk": 16}},
    "data": {"source": "stdlib"},
    "tokenizer": {"vocab_size": 300, "cache_dir": "x"},
    "optimizer": {"name": "muon", "betas": [0.9, 0.95]},
    "train": {"sequence_length": 8, "max_steps": 3},
    "run": {"name": "name"},
    "checkpoint": {"keep": 1},
}


def changed(**sections) -> dict:
    return {key: value | sections.get(key, {}) if isinstance(value, dict) else sections.get(key, value)
            for key, value in CONFIG.items()}  # fmt: skip


def start(directory, resume="auto", overwrite=False, config=CONFIG):
    """What the program does: look, then prepare."""
    path = directory.find_start(resume, overwrite, config)
    directory.prepare(overwrite, config)
    return path


def save(directory, step):
    state = {"config": CONFIG}
    return checkpoint_writer.save(directory.checkpoints, step, [("weight", "a", torch.ones(1))], {}, state)


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "runs" / "name")


def test_a_new_run_starts_from_nothing(directory):
    assert start(directory) is None
    assert directory.config.is_file()


def test_auto_continues_from_the_newest_checkpoint(directory):
    start(directory)
    save(directory, 1)
    newest = save(directory, 2)
    assert start(directory) == newest


def test_a_run_killed_before_its_first_checkpoint_starts_again(directory):
    start(directory)
    assert start(directory) is None


def test_a_run_that_goes_on_has_not_ended_unless_it_can_not_go_on(directory, monkeypatch):
    start(directory)
    directory.summary.write_text("{}")
    with monkeypatch.context() as full, pytest.raises(OSError, match="no space"):
        full.setattr(durable, "replace", Mock(side_effect=OSError("no space")))
        start(directory)
    assert directory.summary.is_file()
    start(directory)
    assert not directory.summary.exists()


def test_never_refuses_an_existing_run(directory):
    start(directory, resume="never")
    with pytest.raises(ConfigError, match="run.overwrite=true"):
        start(directory, resume="never")


def test_overwrite_starts_anew_and_removes_what_was_there(directory):
    start(directory)
    save(directory, 1)
    (directory.path / "metrics.jsonl").write_text("{}")
    assert start(directory, overwrite=True) is None
    assert [path.name for path in directory.path.iterdir()] == ["config.yaml"]


def test_overwrite_empties_the_folder_that_a_link_leads_to(directory, tmp_path):
    (tmp_path / "far").mkdir()
    directory.path.parent.mkdir()
    directory.path.symlink_to(tmp_path / "far")
    start(directory)
    save(directory, 1)
    (directory.path / "latest").symlink_to(directory.checkpoints)
    start(directory, overwrite=True)
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["config.yaml"]


def test_who_writes_the_settings_anew_is_noticed(directory):
    start(directory)
    held = directory.holds()
    assert directory.holds() == held
    start(directory)
    again = directory.holds()
    save(directory, 1)
    assert held != again and again != directory.holds()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_run_is_never_touched(directory, overwrite):
    directory.path.mkdir(parents=True)
    (directory.path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="run.dir"):
        start(directory, overwrite=overwrite)
    assert (directory.path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"hidden_size": 16}}, "model.hidden_size"),
        ({"model": {"attention": {"window": 5, "query_chunk": 16}}}, "model.attention.window"),
        ({"data": {"source": "text"}}, "data.source"),
        ({"data": {"path": "new"}}, "data.path"),
        ({"seed": 2}, "seed"),
        ({"optimizer": {"name": "adamw"}}, "optimizer.name"),
        ({"train": {"sequence_length": 16}}, "train.sequence_length"),
    ],
)
def test_another_experiment_under_the_same_name_is_refused_by_key(directory, sections, key):
    start(directory)
    save(directory, 1)
    with pytest.raises(ConfigError, match=f"^{key}="):
        start(directory, config=changed(**sections))


def test_what_changes_no_result_may_change(directory):
    start(directory)
    newest = save(directory, 1)
    config = changed(
        model={"attention": {"window": 4, "query_chunk": 64}},
        train={"max_steps": 9, "attention_mode": "indexer_warmup", "recompute": "block"},
        tokenizer={"cache_dir": "y"},
    )
    assert start(directory, config=config) == newest


def test_a_job_started_again_continues_what_it_has_begun(directory, tmp_path, monkeypatch):
    """Whatever it was told: SLURM starts it with the same arguments, which may say to begin anew."""
    other = RunDirectory(tmp_path / "other")
    start(other)
    save(other, 8)
    source = str(other.checkpoints / "step_00000008")
    mine = launch_name({"SLURM_JOB_ID": "7"})
    directory.prepare(False, CONFIG, mine)
    assert directory.begun_by(mine) and not directory.begun_by(launch_name({"SLURM_JOB_ID": "8"}))
    assert not directory.begun_by(None)
    assert directory.find_start(source, False, CONFIG, again=True).samefile(source)  # none of its own yet
    save(directory, 12)
    for resume in ("never", source, "auto"):
        assert directory.find_start(resume, False, CONFIG, again=True).name == "step_00000012"
    with pytest.raises(ConfigError, match="a run of that name exists"):
        directory.find_start(source, False, CONFIG)


def test_how_often_a_job_was_started():
    assert restarts({}) == restarts({"SLURM_RESTART_COUNT": "0"}) == 0
    assert restarts({"SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "1"}) == 2
    assert launch_name({}) is None
    assert launch_name({"TORCHELASTIC_RUN_ID": "none"}) == launch_name({"TORCHELASTIC_RUN_ID": "none"})


def test_a_checkpoint_of_another_run_can_be_the_start(directory, tmp_path):
    other = RunDirectory(tmp_path / "other")
    start(other)
    path = save(other, 1)
    assert directory.find_start(str(path), False, CONFIG) == path
    newest = save(other, 2)
    assert start(directory, resume=str(other.path)) == newest
    with pytest.raises(ConfigError, match="checkpoint.resume"):  # once it exists, only `auto` continues it
        start(directory, resume=str(path))


def test_a_damaged_checkpoint_is_no_start(directory, tmp_path):
    other = RunDirectory(tmp_path / "other")
    start(other)
    path = save(other, 1)
    (path / "weight-00000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="weight-00000"):
        start(directory, resume=str(path))


def test_overwrite_never_deletes_the_checkpoint_to_start_from(directory):
    start(directory)
    path = save(directory, 1)
    with pytest.raises(ConfigError, match="checkpoint.resume"):
        start(directory, resume=str(path), overwrite=True)
    assert checkpoint.damage(path) is None


@pytest.mark.parametrize("config", [b"theme: dark", b"theme: \xff\xfe"])
def test_a_folder_with_a_config_of_something_else_is_never_touched(directory, config):
    directory.path.mkdir(parents=True)
    directory.config.write_bytes(config)
    with pytest.raises(ConfigError, match="run.dir"):
        start(directory, overwrite=True)
    assert directory.config.read_bytes() == config


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(directory):
    start(directory)
    (save(directory, 1) / "weight-00000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="run.overwrite=true"):
        start(directory)
