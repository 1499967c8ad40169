import os
import pickle
import threading
from collections import Counter

import pytest

from v4train.data import problems
from v4train.data.problems import KINDS, DataError, Problems
from v4train.errors import ConfigError


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_one_line_that_names_file_record_and_remedy(kind):
    with pytest.raises(DataError) as raised:
        Problems("error").report(kind, "part/a.jsonl", 12, "what\n is  wrong")
    message = str(raised.value)
    assert message.startswith("data.on_error=error: part/a.jsonl, record 12 (from 0): ")
    assert kind.replace("_", " ") in message and "what is wrong" in message and "data.on_error=skip" in message
    assert "\n" not in message
    assert isinstance(raised.value, ConfigError)


def test_error_of_a_whole_file_names_no_record_and_long_details_are_cut():
    with pytest.raises(DataError, match=r"^data.on_error=error: a.parquet: truncated: x") as raised:
        Problems("error").report(problems.TRUNCATED, "a.parquet", None, "x" * 100_000)
    assert len(str(raised.value)) < 600


def test_error_survives_pickling():
    with pytest.raises(DataError) as raised:
        Problems("error").report(problems.EMPTY, "a", 1, "no text")
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is DataError and str(copy) == str(raised.value) and copy.key == "data.on_error"


def test_skip_counts_all_and_logs_few(caplog):
    bad = Problems("skip")
    for i in range(1200):
        bad.report(problems.EMPTY, "a.jsonl", i, "no text")
    bad.report(problems.VANISHED, "b.jsonl", None, "gone")
    assert bad.counts == {"empty": 1200, "vanished": 1}
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "empty" in line and "times" not in line] == [
        f"data left out: a.jsonl, record {i} (from 0): empty: no text" for i in range(5)
    ]
    assert [line.split()[3] for line in lines if "times" in line] == ["10", "100", "1000"]
    assert lines[-1] == "data left out: b.jsonl: vanished: gone" and len(lines) == 9


def test_counts_are_a_copy():
    bad = Problems("skip")
    bad.counts["empty"] = 3
    assert bad.counts == {}


def test_counts_are_exact_from_many_threads():
    class Yielding(Counter):
        """Lets another thread in between reading a count and writing it."""

        def __getitem__(self, kind):
            count = self.get(kind, 0)
            os.sched_yield()
            return count

    bad = Problems("skip")
    bad._counts = Yielding()
    threads = [
        threading.Thread(target=lambda: [bad.report(problems.EMPTY, "a", i, "") for i in range(500)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bad.counts == {"empty": 4000}


def test_unknown_policy_and_kind():
    with pytest.raises(ConfigError, match="data.on_error=ignore: no such policy; one of error, skip"):
        Problems("ignore")
    with pytest.raises(ValueError, match="kind=odd"):
        Problems("skip").report("odd", "a", None, "")
