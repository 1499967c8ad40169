"""Programs on several ranks: `v4train/analysis/on_ranks.py`."""

import sys

import pytest

from v4train.analysis.on_ranks import collected, on_ranks

PROGRAM = """
import os, sys
from v4train.analysis.on_ranks import report
rank = int(os.environ["RANK"])
if sys.argv[1] == "all" or rank == 0:
    report(sys.argv[-1], rank, [rank, os.environ["OMP_NUM_THREADS"]])
else:
    sys.exit("rank 1 has nothing to say")
"""


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    command, environment = on_ranks(["program.py", "key=1"], 3)
    assert (command[0], command[-2:], environment["OMP_NUM_THREADS"]) == (sys.executable, ["program.py", "key=1"], "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert on_ranks(["program.py"], 3)[1]["OMP_NUM_THREADS"] == "1"


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_every_rank_reports_or_it_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert sorted(collected([str(program), "all"], 2)) == [[0, "1"], [1, "1"]]
    assert collected([str(program), "all"], 1) == [[0, "2"]]
    with pytest.raises(RuntimeError, match="rank 1 has nothing to say"):
        collected([str(program), "one"], 2)
