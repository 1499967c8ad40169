"""`tools/report.py` as a person starts it."""

import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT
from tests.report.folders import make_run
from tools.report import without_dashes


def run_tool(*arguments: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_and_a_comparison(tmp_path):
    for name in ("sweep_a", "sweep_b"):
        make_run(tmp_path / "runs", name)
    one = run_tool("run=runs/sweep_a", cwd=tmp_path)
    assert (one.returncode, one.stdout, one.stderr) == (0, "runs/sweep_a/report/index.html\n", "")
    both = run_tool("compare=[runs/sweep_*]", "out=both", cwd=tmp_path)
    assert (both.returncode, both.stdout, both.stderr) == (0, "both/index.html\n", "")
    dashed = run_tool("--compare", "runs/sweep_*", "--out", "again", cwd=tmp_path)
    assert (dashed.returncode, dashed.stdout, dashed.stderr) == (0, "again/index.html\n", "")
    page = (tmp_path / "both" / "index.html").read_text()
    assert "<title>2 runs</title>" in page and "sweep_a" in page and "sweep_b" in page


def test_dashes():
    words = ["--compare", "a_seed=1", "b, c", "out=x", "--run=r"]
    assert without_dashes(words) == ["out=x", 'compare=["a_seed=1", "b, c"]', "run=r"]
    assert without_dashes(["--compare=a", "--compare", "b"]) == ['compare=["a", "b"]']
    assert without_dashes(["--compare", "run", "\U0001f600", "--out", "out"]) == [
        'compare=["run", "\U0001f600"]',
        "out=out",
    ]
    assert without_dashes(["compare=[a,b]", "out=x"]) == ["compare=[a,b]", "out=x"]


def test_a_pattern_leaves_out_folders_that_hold_no_run(tmp_path):
    make_run(tmp_path / "runs", "a")
    (tmp_path / "runs" / "b" / "logs").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").write_text("no folder")
    result = run_tool("compare=[runs/*]", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "<title>1 run</title>" in (tmp_path / "comparison" / "index.html").read_text()
    named = run_tool("compare=[runs/a,runs/b]", cwd=tmp_path)
    assert named.returncode == 2 and "runs/b: the folder holds no run" in named.stderr


@pytest.mark.parametrize(
    "bad",
    [
        ["run=nowhere"],
        ["compare=[nowhere]"],
        ["compare=[no*]"],
        [],
        ["rum=x"],
        ["compare=[a"],
        ["compare=[]"],
        ["--compare"],
        ["--rum", "x"],
        ["--run"],
        ["--compare", "a", "--out", "b", "c"],
    ],
)
def test_bad_input_is_one_line_and_code_2(bad, tmp_path):
    result = run_tool(*bad, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
