"""torchrun with the exit code of its ranks, and signals that reach them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.distributed.launch import ROOT
from v4train.launching.ranks import exit_code

PROGRAM = """
import os, signal, sys, time
rank = os.environ["RANK"]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']}\\n".encode())
open(f"{rank}.started", "w").close()
while not os.path.exists(f"{1 - int(rank)}.started"):  # torchrun ends the other one with the first
    time.sleep(0.01)
if sys.argv[1] == "wait":
    time.sleep(60)
if sys.argv[1] == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]) if rank == "0" and sys.argv[1].isdigit() else 0)
"""


@pytest.mark.parametrize(
    ("codes", "code"), [({0: 2, 1: 2}, 2), ({1: 1}, 1), ({0: 75, 1: -15}, 75), ({0: -9, 1: 1}, 137), ({3: 1, 2: 5}, 5)]
)
def test_the_code_of_a_job(codes, code):
    assert exit_code(codes) == code


def start(folder, *arguments: str) -> subprocess.Popen:
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, "-m", "v4train.launching.ranks", "2", "program.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.distributed
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("what", "code"), [("3", 3), ("kill", 137), ("0", 0)])
def test_a_job_ends_as_its_ranks_do(tmp_path, what, code):
    output, errors = (process := start(tmp_path, what)).communicate(timeout=50)
    assert process.returncode == code
    assert sorted(output.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]
    assert errors == ("error: rank 1 was ended by SIGKILL\n" if what == "kill" else "")


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_a_signal_reaches_every_rank(tmp_path):
    process = start(tmp_path, "wait")
    end = time.monotonic() + 40
    while len(list(tmp_path.glob("*.started"))) < 2 and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=15)
    assert process.returncode == 75
