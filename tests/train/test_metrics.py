"""metrics.jsonl must survive a kill at any byte, and stay readable by any JSON parser."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from v4train.train.metrics import MetricsFile, read_metrics, write_summary


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def write_steps(path, last):
    with MetricsFile(path) as file:
        for step in range(1, last + 1):
            file.write({"step": step, "loss": 1 / step, "note": "é\u2028\n"})


def test_each_record_is_one_line_readable_before_the_file_is_closed(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 2.5, "data_tokens": {"stdlib": 512}, "phase": "main"})
    assert path.read_text().count("\n") == 1
    file.write({"step": 1, "val_loss": 2.25})
    assert read_metrics(path) == [
        {"step": 1, "loss": 2.5, "data_tokens": {"stdlib": 512}, "phase": "main"},
        {"step": 1, "val_loss": 2.25},
    ]
    file.close()


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": 3, "loss": math.nan, "nested": {"a": [math.inf, -math.inf]}})
    raw = json.loads(path.read_text(), parse_constant=refuse_constant)
    assert raw == {"step": 3, "loss": "nan", "nested": {"a": ["inf", "-inf"]}}
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"]) and record["nested"]["a"] == [math.inf, -math.inf]


def test_tensors_and_arrays_become_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": torch.tensor(7), "loss": torch.tensor(math.nan), "lr": np.float32(0.5), "n": np.int64(2)})
    (record,) = read_metrics(path)
    assert record["step"] == 7 and math.isnan(record["loss"]) and record["lr"] == 0.5 and record["n"] == 2


def test_a_record_without_step_is_refused(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file, pytest.raises(KeyError, match="step"):
        file.write({"loss": 1.0})


@given(kept_bytes=st.integers(0, 10_000), checkpoint_step=st.integers(0, 8))
def test_torn_at_any_byte_then_resumed_from_any_checkpoint(tmp_path_factory, kept_bytes, checkpoint_step):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    write_steps(path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    torn = path.read_bytes()[: kept_bytes % (path.stat().st_size + 1)]
    path.write_bytes(torn)
    # oracle by length alone: a line is whole when all its bytes but the newline were written
    ends = [sum(map(len, lines[: i + 1])) - 1 for i in range(len(lines))]
    whole = sum(end <= len(torn) for end in ends)
    assert [record["step"] for record in read_metrics(path)] == list(range(1, whole + 1))

    with MetricsFile(path) as file:
        file.truncate_after(checkpoint_step)
        survivors = min(whole, checkpoint_step)
        assert path.read_bytes() == b"".join(lines[:survivors])
        file.write({"step": survivors + 1})
    assert [record["step"] for record in read_metrics(path)] == list(range(1, survivors + 2))
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


@given(garbage=st.binary(min_size=1, max_size=40))
def test_garbage_at_the_end_is_cut(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("garbage") / "metrics.jsonl"
    write_steps(path, 3)
    good = path.read_bytes()
    path.write_bytes(good + garbage)
    with MetricsFile(path) as file:
        file.truncate_after(3)
    assert path.read_bytes() == good


def test_all_lines_of_the_checkpoint_step_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for record in ({"step": 1}, {"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 1.0}, {"step": 3}):
            file.write(record)
        file.truncate_after(2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 2]


def test_a_failed_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 3)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with MetricsFile(path) as file, pytest.raises(KeyboardInterrupt):
        file.truncate_after(1)
    assert path.read_bytes() == before


def test_summary_is_one_json_object_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, {"loss": 3.0})
    write_summary(path, {"loss": math.nan, "steps": torch.tensor(5)})
    assert json.loads(path.read_text(), parse_constant=refuse_constant) == {"loss": "nan", "steps": 5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_line_that_the_disk_takes_a_part_of_comes_whole_later(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": 1})
        real = file._file

        class Full:
            def write(self, content):
                return real.write(content[:5])

            def close(self):
                real.close()

        file._file = Full()
        file.write({"step": 2, "loss": 1.5})
        assert path.read_bytes() == b'{"step": 1}\n' and "can't be written" in caplog.text
        file.write({"step": 3})
        assert file.flush()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_file_that_is_gone_is_made_again_with_what_waits(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": 1})
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("in the way")
        file.write({"step": 2})
        assert not file.flush()
        path.parent.unlink()
        file.write({"step": 3})
    assert [record["step"] for record in read_metrics(path)] == [2, 3]
