"""A process of its own hangs, since what ends it ends all of it; more ranks: tests/distributed/test_operating.py."""

import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT

PROGRAM = """
import sys, threading, time
from pathlib import Path
from v4train.train import hang_watch
hang_watch.GRACE = 1.0

def comes_no_further():
    threading.Event().wait()

with hang_watch.HangWatch(Path(sys.argv[1]), rank=0, world_size=int(sys.argv[2]), timeout=float(sys.argv[3])) as watch:
    for _ in range(5):
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            pass
        watch.beat()
    if sys.argv[4] == "hang":
        comes_no_further()
print("ended")
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_ends_and_says_where(tmp_path):
    result = run(str(tmp_path / "stacks"), "1", "1", "hang")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: nothing has moved for 1 s (train.hang_timeout)")
    assert "rank 0 hangs outside of any collective" in line and str(tmp_path / "stacks") in line
    stack = (tmp_path / "stacks" / "rank-00000.txt").read_text()
    assert "in comes_no_further" in stack


def test_a_rank_that_leaves_no_stack_is_named(tmp_path):
    assert "rank 1 doesn't answer" in run(str(tmp_path / "stacks"), "2", "1", "hang").stderr


@pytest.mark.parametrize("timeout", ["1", "0"])
def test_one_that_gets_on_is_left_alone(timeout, tmp_path):
    """Two seconds in all, and never one without a beat; 0 is never."""
    result = run(str(tmp_path / "stacks"), "1", timeout, "go on")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ended\n", "")
    assert not (tmp_path / "stacks").exists()
