"""`tools/benchmark_engine.py`: its ratios from known times, and one real measurement of each kind on a tiny model."""

import importlib.util
import json
import subprocess
import sys

import pytest

TINY = ["model.hidden_size=32", "model.vocab_size=300", "model.num_layers=2", "model.attention_mix=[csa,hca]"]


def test_ratios_are_within_a_turn():
    spec = importlib.util.find_spec("tools.benchmark_engine")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    seconds = {"plain_1": [1.0, 2.0, 1.0], "zero1_1": [1.1, 2.2, 3.0], "zero1_2": [1.0, 2.0, 1.0]}  # half speed at once
    assert tool.compared(seconds, [1], 2) == {
        "seconds": {"plain_1": 1.0, "zero1_1": 2.2, "zero1_2": 1.0},
        "cost": {"zero1": 0.1},
        "efficiency": {"zero1": 1.1},
    }


def run(*arguments):
    command = [sys.executable, "tools/benchmark_engine.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_all_cases_are_measured():
    done = run("--stages", "0", "--shape", "2x32", "--rounds", "1", *TINY)
    assert not done.returncode, done.stderr
    result = json.loads(done.stdout)
    assert result["shape"] == "2x32" and set(result["seconds"]) == {"plain_1", "zero0_1", "zero0_2"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert set(result["cost"]) == set(result["efficiency"]) == {"zero0"}


def test_bad_input_ends_in_one_line():
    done = run("model.hidden_size=-1")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
