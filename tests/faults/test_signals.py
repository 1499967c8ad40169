"""Preemption: all ranks agree at a step edge, save, and leave with code 75; a second signal ends at once."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.distributed.launch import ROOT
from tests.faults.lives import Life, overrides
from v4train.train import checkpoint
from v4train.train.metrics import read_metrics

pytestmark = pytest.mark.faults

LONG = ("train.max_steps=100000", "checkpoint.every=0")


def steps(base, name):
    try:
        return len(read_metrics(base / name / "metrics.jsonl"))
    except FileNotFoundError:
        return 0


def wait_for_steps(base, name, count, alive):
    end = time.monotonic() + 90
    while steps(base, name) < count and time.monotonic() < end:
        assert alive()
        time.sleep(0.02)


def saved(base, name):
    """The step of the newest checkpoint, which must be the last of the metrics."""
    step = checkpoint.read_manifest(checkpoint.newest(base / name / "checkpoints"))["step"]
    assert read_metrics(base / name / "metrics.jsonl")[-1]["step"] == step
    return step


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_asks_to_be_started_again(tmp_path, number):
    life = Life(overrides(tmp_path, "run", *LONG), tmp_path / "log")
    wait_for_steps(tmp_path, "run", 2, life.process.is_alive)
    os.kill(life.process.pid, number)
    assert life.end() == 75
    assert saved(tmp_path, "run") >= 2
    assert "stopped by a signal" in life.log.read_text()


def test_a_second_signal_ends_at_once(tmp_path):
    life = Life(overrides(tmp_path, "run", *LONG, "train.global_batch_size=400"), tmp_path / "log")  # seconds a step
    wait_for_steps(tmp_path, "run", 1, life.process.is_alive)
    os.kill(life.process.pid, signal.SIGTERM)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(life.process.pid, signal.SIGTERM)
    assert life.end() == 128 + signal.SIGTERM and time.monotonic() - began < 1
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None


def test_the_time_that_a_run_has(tmp_path):
    life = Life(overrides(tmp_path, "run", *LONG, "train.max_minutes=0.1"), tmp_path / "log")
    began = time.monotonic()
    assert life.end() == 75
    assert 5 < time.monotonic() - began < 40
    assert saved(tmp_path, "run") >= 1
    assert "train.max_minutes" in life.log.read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("signalled", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_signal_to_one_rank_stops_all(tmp_path, signalled):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *overrides(tmp_path, "run", *LONG)]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        wait_for_steps(tmp_path, "run", 2, lambda: all(rank.poll() is None for rank in ranks))
        ranks[signalled].send_signal(signal.SIGUSR1)
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    assert saved(tmp_path, "run") >= 2
