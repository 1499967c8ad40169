"""An offline run is read back by W&B's own reader, `wandb-core leet inspect`, as `wandb sync` would send it."""

import base64
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import omegaconf
import psutil
import pytest
import wandb

import v4train
from tests.train.wandb_service import Service
from tests.wandb_reader import ending, history, of_type, offline_files, read_run
from v4train.errors import ConfigError
from v4train.train.signals import REQUEUE
from v4train.train.tracking import Tracker, TrackingConfig

CONFIG = {"model": {"num_layers": 2, "attention_mix": ["swa", "csa"]}, "seed": 1}
FAKE_KEY = "0123456789abcdef" * 3


def tracking_config(**changes) -> TrackingConfig:
    shipped = omegaconf.OmegaConf.load(Path(v4train.__file__).parent / "conf" / "tracking" / "wandb.yaml")
    return TrackingConfig(
        **{**omegaconf.OmegaConf.to_container(shipped, resolve=True), "system_metrics": False} | changes
    )


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "v4train"]


def test_offline_run_holds_config_metrics_table_and_picture(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    picture = tmp_path / "loss.png"
    matplotlib.image.imsave(picture, np.zeros((4, 4, 3)))
    run_dir = tmp_path / "runs" / "small"

    shown = {"group": "sweep", "job_type": "pretrain", "tags": ["a"], "notes": "why"}
    tracker = Tracker(tracking_config(**shown), run_dir, "small", CONFIG, run_id=None)
    assert Path(tracker.location).parent == run_dir / "wandb"
    for step in (1, 2):
        figures = {"loss": 5.0 / step, "tokens": 512 * step, "mfu": None, "data_tokens": {"a": 1}, "load": {"x": [1]}}
        tracker.log(figures, step=step)
    tracker.table("samples", ["prompt", "text"], [("def", "def f(): pass")], step=2)
    tracker.image("loss_plot", picture, step=2)
    tracker.summary({"final_loss": 2.5})
    tracker.finish()
    tracker.log({"loss": 0.0}, step=3)  # a no-op by now

    (file,) = offline_files(run_dir)
    records = read_run(file)
    run = of_type(records, "run")[0]
    assert (run["run_id"], run["display_name"], run["project"]) == (tracker.run_id, "small", "v4train")
    assert (run["run_group"], run["job_type"], run["tags"], run["notes"]) == ("sweep", "pretrain", ["a"], "why")
    config = run["config"]["update"]
    assert {key: config[key] for key in CONFIG} == CONFIG

    rows = history(records)
    assert [(row["step"], row["loss"], row["tokens"]) for row in rows[:2]] == [(1, 5.0, 512), (2, 2.5, 1024)]
    assert rows[0]["data_tokens.a"] == 1 and not {"mfu", "load", "load.x"} & rows[0].keys()
    assert len(rows) == 4 and {row["step"] for row in rows[2:]} == {2}
    assert rows[2]["samples._type"] == "table-file" and rows[3]["loss_plot._type"] == "image-file"
    table = next(file.parent.glob("files/media/table/*.json"))
    assert json.loads(table.read_text()) == {"columns": ["prompt", "text"], "data": [["def", "def f(): pass"]]}
    assert (file.parent / "files" / rows[3]["loss_plot.path"]).read_bytes() == picture.read_bytes()

    axes = {m.get("name", m.get("glob_name")): m.get("step_metric") for m in of_type(records, "metric")}
    by_tokens = {"val_loss": "tokens", "val_bits_per_byte": "tokens"}
    assert axes == {"step": None, "*": "step", "tokens": "step"} | by_tokens
    summaries = [update["update"] for update in of_type(records, "summary") if "update" in update]
    assert {"final_loss": 2.5}.items() <= {key: x[key] for x in summaries for key in x}.items()
    assert of_type(records, "exit")[0]["exit_code"] == 0

    assert capfd.readouterr() == ("", "")
    for path in run_dir.rglob("*"):
        assert path.is_dir() or FAKE_KEY.encode() not in path.read_bytes()


def test_a_resumed_run_keeps_its_id_and_may_go_back_a_step(tmp_path):
    first = Tracker(tracking_config(), tmp_path, "name", CONFIG, run_id=None)
    first.log({"loss": 1.0}, step=10)
    first.finish()
    second = Tracker(tracking_config(), tmp_path, "name", {**CONFIG, "seed": 2}, run_id=first.run_id)
    second.log({"loss": 2.0}, step=6)
    second.finish()
    assert second.run_id == first.run_id
    assert [[row["step"] for row in history(read_run(file))] for file in offline_files(tmp_path)] == [[10], [6]]


def test_a_run_started_again_before_its_first_checkpoint_is_the_same_run(tmp_path):
    ids = []
    for name in ("here", "here", "elsewhere"):
        tracker = Tracker(tracking_config(), tmp_path / name, "name", CONFIG, run_id=None)
        tracker.finish()
        ids.append(tracker.run_id)
    assert ids[0] == ids[1] != ids[2]


def test_system_metrics_are_sampled_if_asked_for(tmp_path):
    for wanted in (True, False):
        tracker = Tracker(tracking_config(system_metrics=wanted), tmp_path / str(wanted), "name", CONFIG, run_id=None)
        tracker.finish()
        stats = of_type(read_run(offline_files(tmp_path / str(wanted))[0]), "stats")
        assert bool(stats) == wanted


def test_artifacts_are_kept_if_asked_for(tmp_path):
    checkpoint, tokenizer = tmp_path / "step_00000007", tmp_path / "tokenizer.json"
    checkpoint.mkdir()
    (checkpoint / "weight-00000.safetensors").write_bytes(b"weights")
    (checkpoint / "manifest.json").write_text("{}")
    tokenizer.write_text("{}")
    kept = {}
    for asked in (["checkpoint", "tokenizer"], ["tokenizer"]):
        folder = tmp_path / "-".join(asked)
        tracker = Tracker(tracking_config(artifacts=asked), folder, "a=1,b", CONFIG, run_id=None)
        tracker.artifact("checkpoint", checkpoint, step=7)
        tracker.artifact("tokenizer", tokenizer, step=7)
        tracker.finish()
        kept[len(asked)] = of_type(read_run(offline_files(folder)[0]), "artifact")
    assert [(artifact["name"], artifact["type"]) for artifact in kept[2]] == [
        ("a-1-b-checkpoint", "model"),
        ("a-1-b-tokenizer", "tokenizer"),
    ]
    assert [artifact["name"] for artifact in kept[1]] == ["a-1-b-tokenizer"]
    model = kept[2][0]
    assert set(model["aliases"]) == {"latest", "step-7"}
    contents = {entry["path"]: entry for entry in model["manifest"]["contents"]}
    assert set(contents) == {"weight-00000.safetensors", "manifest.json"}
    weights = contents["weight-00000.safetensors"]
    assert Path(weights["local_path"]) == checkpoint / "weight-00000.safetensors"  # not a copy
    assert base64.b64decode(weights["digest"]) == hashlib.md5(b"weights").digest()


@pytest.mark.parametrize("code", [0, 1, REQUEUE])
def test_how_the_program_ended_is_in_the_run(code, tmp_path):
    tracker = Tracker(tracking_config(), tmp_path, "name", CONFIG, run_id=None)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish(code)
    tracker.finish(1)  # the first end holds
    assert ending(read_run(offline_files(tmp_path)[0])) == (code == REQUEUE, code)


VARIABLES = {"ENTITY": "team", "PROJECT": "mine", "RUN_GROUP": "seeds", "TAGS": "x,y", "NOTES": "from outside"}
VARIABLES |= {"JOB_TYPE": "ablation", "NAME": "shown", "RUN_ID": "given1"}


def test_variables_of_wandb_hold_where_the_configuration_says_nothing(tmp_path, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = Tracker(tracking_config(), tmp_path, "name", CONFIG, run_id=None)
    tracker.finish()
    run = of_type(read_run(offline_files(tmp_path)[0]), "run")[0]
    assert (run["entity"], run["project"], run["run_group"], run["notes"]) == ("team", "mine", "seeds", "from outside")
    assert sorted(run["tags"]) == ["x", "y"]
    assert (run["job_type"], run["display_name"], run["run_id"]) == ("ablation", "shown", "given1")


def test_variables_of_wandb_that_a_run_fixes(tmp_path, monkeypatch, capfd):
    """Folder and way of resuming; the id where the run has one; nothing is said on the terminal."""
    fixed = {"DIR": str(tmp_path / "elsewhere"), "RESUME": "never", "RUN_ID": "given1", "SILENT": "false"}
    for name, value in (fixed | {"CONSOLE": "wrap", "DISABLED": "true"}).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = Tracker(tracking_config(), tmp_path, "name", CONFIG, run_id="known1")
    tracker.finish()
    (file,) = offline_files(tmp_path)
    run = of_type(read_run(file), "run")[0]
    assert run["run_id"] == tracker.run_id == "known1" and not (tmp_path / "elsewhere").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("answers", [False, True])
def test_a_service_that_is_away_costs_a_little_time_and_no_data(answers, tmp_path, monkeypatch, caplog):
    """A port that refuses, and one that takes calls and never says a word."""
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        if answers:
            service.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{service.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY[:40])
        started = time.monotonic()
        with caplog.at_level(logging.WARNING, "v4train"):
            tracker = Tracker(tracking_config(mode="online", timeout=2), tmp_path, "name", CONFIG, run_id=None)
            tracker.log({"loss": 1.0}, step=1)
            tracker.finish()
        assert time.monotonic() - started < 20
    (warning,) = warnings(caplog)
    assert "tracked offline" in warning
    assert "offline-run" in str(offline_files(tmp_path)[-1])
    assert [row["loss"] for row in history(read_run(offline_files(tmp_path)[-1]))] == [1.0]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or FAKE_KEY[:40].encode() not in path.read_bytes()


def test_a_service_that_goes_away_ends_nothing_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY[:40])
    with Service() as service:
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        tracker = Tracker(tracking_config(mode="online", timeout=3), tmp_path, "name", CONFIG, run_id=None)
        assert tracker.location.startswith(service.url)
        tracker.log({"loss": 1.0}, step=1)
        tracker.log({"loss": 2.0}, step=2)
        assert service.came.wait(40)
        assert service.rows[tracker.run_id][0]["loss"] == 1.0
    started = time.monotonic()
    tracker.log({"loss": 3.0}, step=3)
    assert time.monotonic() - started < 1
    tracker.finish()
    assert time.monotonic() - started < 20
    (file,) = tmp_path.glob("wandb/run-*/run-*.wandb")
    assert [row["loss"] for row in history(read_run(file))] == [1.0, 2.0, 3.0]


def test_an_offline_run_is_sent_by_wandb_sync(tmp_path, monkeypatch):
    """Two parts, as of a requeued run."""
    tracker = None
    for step in (1, 2):
        tracker = Tracker(tracking_config(), tmp_path, "name", CONFIG, tracker and tracker.run_id)
        tracker.log({"loss": 1.0 / step}, step=step)
        tracker.finish()
    with Service() as service:
        where = {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": FAKE_KEY[:40], "WANDB_ERROR_REPORTING": "false"}
        sync = [sys.executable, "-m", "wandb", "sync", *map(str, sorted(tmp_path.glob("wandb/offline-run-*")))]
        done = subprocess.run(sync, env=os.environ | where, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert tracker.run_id in service.rows, done.stdout + done.stderr
    assert {row["step"]: row["loss"] for row in service.rows[tracker.run_id]} == {1: 1.0, 2: 0.5}


def test_disabled_writes_nothing_and_keeps_the_id(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda *_, **__: pytest.fail("W&B was started"))
    tracker = Tracker(tracking_config(mode="disabled"), tmp_path, "name", CONFIG, run_id="abc")
    tracker.log({"loss": 1.0}, step=1)
    tracker.table("samples", ["text"], [["x"]], step=1)
    tracker.image("plot", "missing.png", step=1)
    tracker.finish()
    assert tracker.run_id == "abc" and tracker.location == "disabled"
    assert list(tmp_path.iterdir()) == []


def test_a_failing_start_is_one_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING, "v4train"):
        tracker = Tracker(tracking_config(mode="online"), tmp_path, "name", CONFIG, run_id="abc")
        tracker.log({"loss": 1.0}, step=1)
        tracker.finish()
    (warning,) = warnings(caplog)
    assert "no route to host" in warning
    assert tracker.run_id == "abc" and tracker.location == "failed"


def test_failures_while_logging_are_one_warning_and_later_rows_arrive(tmp_path, caplog):
    tracker = Tracker(tracking_config(), tmp_path, "name", CONFIG, run_id=None)
    with caplog.at_level(logging.WARNING, "v4train"):
        tracker.image("plot", tmp_path / "missing.png", step=1)
        tracker.image("plot", tmp_path / "missing.png", step=2)
    tracker.log({"loss": 1.0}, step=3)
    tracker.finish()
    (warning,) = warnings(caplog)
    assert "missing.png" in warning
    assert [row["step"] for row in history(read_run(offline_files(tmp_path)[0]))] == [3]


def test_the_helper_process_is_told_not_to_report_to_its_makers(tmp_path):
    """Without this flag wandb-core 0.31.0 looks up a host name at each start, also offline (seen with strace)."""
    tracker = Tracker(tracking_config(), tmp_path, "name", CONFIG, run_id=None)
    commands = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    tracker.finish()
    helpers = [command for command in commands if "wandb-core" in command[0]]
    assert helpers and all("--no-observability" in command for command in helpers)


def test_an_unknown_artifact_is_refused():
    with pytest.raises(ConfigError, match="tracking.artifacts=weights: .*checkpoint, tokenizer"):
        tracking_config(artifacts=["weights"])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="tracking.mode=on: .*offline, online, disabled"):
        tracking_config(mode="on")
