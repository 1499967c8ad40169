"""What a watchdog outside reads."""

import json
import os
import socket
import time

from v4train.train.heartbeat import Heartbeat


def test_the_file_says_when_where_and_who(tmp_path):
    before = time.time()
    Heartbeat(tmp_path / "heartbeat.json", rank=0, world_size=4).beat(17, "training")
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert before <= beat.pop("time") <= time.time()
    assert beat == {
        "step": 17,
        "doing": "training",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "world_size": 4,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_it_is_written_once_a_second_unless_something_else_is_done(tmp_path):
    now, path = [100.0], tmp_path / "heartbeat.json"
    heartbeat = Heartbeat(path, 0, 1, clock=lambda: now[0])
    seen = []
    for later, step, doing in ((0, 1, "training"), (0.5, 2, "training"), (0.6, 3, "training"), (0.1, 3, "saving")):
        now[0] += later
        heartbeat.beat(step, doing)
        seen.append(json.loads(path.read_text())["step"])
    assert seen == [1, 1, 3, 3] and json.loads(path.read_text())["doing"] == "saving"


def test_other_ranks_and_full_disks_are_silent(tmp_path):
    Heartbeat(tmp_path / "heartbeat.json", rank=1, world_size=2).beat(1, "training")
    Heartbeat(tmp_path / "missing" / "heartbeat.json", rank=0, world_size=2).beat(1, "training")
    assert list(tmp_path.iterdir()) == []
