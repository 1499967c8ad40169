"""`tools/benchmark.py`: its figures from known times, and one real measurement of each kind on a tiny model."""

import importlib.util
import json
import subprocess
import sys

import pytest

TINY = ["model.hidden_size=32", "model.vocab_size=300", "model.num_layers=2", "model.attention_mix=[csa,hca]"]
SPEC = importlib.util.find_spec("tools.benchmark")


@pytest.fixture
def tool():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return module


def row(implementation, batch, length, seconds, memory):
    own = {"kind": "training", "implementation": implementation, "model": "m", "dtype": "fp32", "batch": batch}
    figures = {"seconds": seconds, "tokens_per_second": batch * length / seconds, "peak_memory_gib": memory}
    return own | {"length": length} | figures


def test_ratios_are_to_the_peer_at_the_same_shape(tool):
    rows = [row("v4train", 4, 8, 1.0, 2.0), row("transformers", 4, 8, 3.1, 8.0) | {"times_ours": 3.0}]
    rows += [row("v4train", 1, 8, 2.0, 1.0), row("transformers", 1, 8, 2.0, 1.0) | {"times_ours": 1.0}]
    assert [(r["shape"], r["speed"], r["memory"]) for r in tool.ratios(rows, "transformers")] == [
        ("4x8", 3.0, 0.25),
        ("1x8", 1.0, 1.0),
    ]
    assert tool.ratios(rows, None) == []


def test_growth_of_single_rows(tool):
    """Twice the time for twice the tokens is exponent 1; rows of several sequences don't count."""
    rows = [row("v4train", 1, 100, 1.0, 1), row("v4train", 1, 400, 8.0, 1), row("v4train", 4, 9000, 1.0, 1)]
    (figures,) = tool.growth(rows, "length")
    assert figures["length"] == [100, 400] and figures["exponent"] == 1.5 and figures["per_token"] == 2.0
    decode = {"kind": "decode", "implementation": "v4train", "model": "m", "dtype": "fp32"}
    rows = [decode | {"context": 10, "seconds": 1.0}, decode | {"context": 1000, "seconds": 1.5}]
    assert tool.growth(rows, "context")[0]["per_token"] == 1.5
    assert tool.growth(rows[:1], "context") == []


def run(*arguments):
    command = [sys.executable, "tools/benchmark.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_measures_beside_transformers(tmp_path):
    shapes = ["--shapes", "1x32", "1x64", "--decode", "16", "--rounds", "1", "--warm-up", "0"]
    files = ["--out", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "figures.png")]
    done = run("--against", "transformers", *shapes, *files, *TINY)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert (tmp_path / "figures.png").stat().st_size > 1000
    assert [r["implementation"] for r in result["training"]] == ["v4train", "transformers"] * 2
    assert all(
        0 < r["tokens_per_second"] and 0 < r["mfu"] < 1 and r["peak_memory_gib"] > 0.1 for r in result["training"]
    )
    assert result["decode"][0]["cache_bytes"] > 0 and len(result["ratios"]) == len(result["growth"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4by512"], "--shapes=4by512"),
        (["model.hiden_size=3"], "model.hiden_size"),
        (["--models", "flash_smal"], "flash_small"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
