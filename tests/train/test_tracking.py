"""An offline run is read back from its file with W&B's own record definition, as `wandb sync` would send it."""

import json
import logging
import struct
from pathlib import Path

import matplotlib.image
import numpy as np
import omegaconf
import psutil
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

import v4train
from v4train.errors import ConfigError
from v4train.train.tracking import Tracker, TrackingConfig

CONFIG = {"model": {"num_layers": 2, "attention_mix": ["swa", "csa"]}, "seed": 1}
FAKE_KEY = "0123456789abcdef" * 3


def tracking_config(**changes) -> TrackingConfig:
    shipped = omegaconf.OmegaConf.load(Path(v4train.__file__).parent / "conf" / "tracking" / "wandb.yaml")
    return TrackingConfig(**{**omegaconf.OmegaConf.to_container(shipped), "system_metrics": False, **changes})


def read_run(path: Path) -> list[wandb_internal_pb2.Record]:
    """The records of a .wandb file: a 7-byte header, then the LevelDB log format (32 KiB blocks; crc, length, type)."""
    data, position, records, pending = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(pending))
            pending = b""
    return records


def history(records) -> list[dict]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def offline_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "v4train"]


def test_offline_run_holds_config_metrics_table_and_picture(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    picture = tmp_path / "loss.png"
    matplotlib.image.imsave(picture, np.zeros((4, 4, 3)))
    run_dir = tmp_path / "runs" / "small"

    tracker = Tracker(tracking_config(tags=["a"], notes="why"), run_dir, "small", CONFIG, run_id=None)
    assert Path(tracker.location).parent == run_dir / "wandb"
    for step in (1, 2):
        tracker.log({"loss": 5.0 / step, "tokens": 512 * step, "mfu": None, "data_tokens": {"a": 1}}, step=step)
    tracker.table("samples", ["prompt", "text"], [("def", "def f(): pass")], step=2)
    tracker.image("loss_plot", picture, step=2)
    tracker.summary({"final_loss": 2.5})
    tracker.finish()
    tracker.log({"loss": 0.0}, step=3)  # a no-op by now

    (file,) = offline_files(run_dir)
    records = read_run(file)
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.display_name, run.project) == (tracker.run_id, "small", "v4train")
    assert list(run.tags) == ["a"] and run.notes == "why"
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG

    rows = history(records)
    assert [(row["step"], row["loss"], row["tokens"]) for row in rows[:2]] == [(1, 5.0, 512), (2, 2.5, 1024)]
    assert rows[0]["data_tokens.a"] == 1 and "mfu" not in rows[0]
    assert len(rows) == 4 and {row["step"] for row in rows[2:]} == {2}
    table = next(file.parent.glob("files/media/table/*.json"))
    assert json.loads(table.read_text()) == {"columns": ["prompt", "text"], "data": [["def", "def f(): pass"]]}
    assert len(list(file.parent.glob("files/media/images/*.png"))) == 1

    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
    summaries = {u.key: u.value_json for r in records for u in r.summary.update}
    assert summaries["final_loss"] == "2.5"

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


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="tracking.mode=on: .*offline, online, disabled"):
        tracking_config(mode="on")
