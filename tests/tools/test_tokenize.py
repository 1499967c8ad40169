"""`tools/tokenize.py` as a program: killed and started again it writes the same shards, and says what it did."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.runs import tiny
from v4train.data.shards import Shards
from v4train.data.tokenizer import Tokenizer, train_tokenizer
from v4train.errors import ConfigError

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "tokenize.py"
SPEC = importlib.util.find_spec("tools.tokenize")


def command(out: Path, tmp_path: Path, *others: str) -> list[str]:
    """Some 30 shards."""
    given = [f"out={out}", "shard_tokens=2000", "data=jsonl", f"data.path={tmp_path}/data/*.jsonl", *others]
    return [sys.executable, str(TOOL), *given, f"tokenizer.path={tmp_path}/tokenizer.json", "model.vocab_size=300"]


@pytest.fixture
def main():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return module.main


@pytest.fixture
def tokenizer(tmp_path):
    """And data beside it."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in "abc":
        with (tmp_path / "data" / f"{name}.jsonl").open("w") as file:
            for _ in range(300):
                file.write(json.dumps({"text": " ".join(rng.choice(["some", "Ünïcode", "words"], 30))}) + "\n")
            file.write("no JSON\n")
    tokenizer = train_tokenizer(["some words"], 270)
    tokenizer.save(tmp_path / "tokenizer.json")
    return tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same_bytes(tokenizer, tmp_path):
    skip = "data.on_error=skip"
    whole = run(command(tmp_path / "whole", tmp_path, skip))
    assert whole.returncode == 0, whole.stderr
    assert "900 documents" in whole.stdout and "left out: 3 malformed" in whole.stdout and "tokens/s" in whole.stdout
    with subprocess.Popen(
        command(tmp_path / "killed", tmp_path, skip), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdout.readline()  # a shard is written
        os.kill(process.pid, signal.SIGKILL)
    index = json.loads((tmp_path / "killed" / "index.json").read_text())
    shards = len(json.loads((tmp_path / "whole" / "index.json").read_text())["shards"])
    assert 1 <= len(index["shards"]) < shards and not index["complete"]
    resumed = run(command(tmp_path / "killed", tmp_path, skip))
    assert resumed.returncode == 0, resumed.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert "900 documents" in resumed.stdout and "left out: 3 malformed" in resumed.stdout
    again = run(command(tmp_path / "killed", tmp_path, skip))
    assert again.returncode == 0 and "complete already, nothing to do" in again.stdout
    Shards(tmp_path / "killed").check_tokenizer(tokenizer.fingerprint)
    other = run(command(tmp_path / "killed", tmp_path, skip, "data.column=body"))
    assert other.returncode == 2 and other.stdout == ""
    assert other.stderr.startswith("error: out=") and "another source" in other.stderr and other.stderr.count("\n") == 1


@pytest.mark.slow
def test_bad_data_end_in_one_line(tokenizer, tmp_path):
    done = run(command(tmp_path / "out", tmp_path))
    assert done.returncode == 2 and "a.jsonl, record 300" in done.stderr and done.stderr.count("\n") == 1


def test_without_a_tokenizer_it_trains_one(main, tmp_path, capsys):
    main([f"out={tmp_path / 'out'}", *tiny(tmp_path, "none")])
    shards = Shards(tmp_path / "out")
    assert shards.num_documents > 1 and Tokenizer.load(shards.tokenizer_path).vocab_size == 320
    out = capsys.readouterr().out
    assert f"{shards.num_documents} documents, {shards.num_tokens:,} tokens" in out and "left out: nothing" in out


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["data=stdlib"], "out=: a folder to write"),
        (["out", "data=stdlib"], "out=: a folder to write"),
        (["out=x", "shard_tokens=many"], "shard_tokens=many"),
        (["out=x", "shard_tokens=0"], "shard_tokens=0"),
        (["out=x", "data.nonsense=1"], "data.nonsense="),
    ],
)
def test_bad_input_is_refused(main, arguments, error):
    with pytest.raises(ConfigError, match=f"^{error}"):
        main(arguments)


def test_its_name_takes_the_standard_library_s_module_from_nobody():
    """`python tools/x.py` puts tools/ first on the path, and `inspect`, which most libraries import, wants tokenize."""
    program = "import inspect, sys, tokenize; print(tokenize.open.__module__, sys.path[0]); inspect.getsource(tokenize)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); {program}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"tokenize {TOOL.parent}\n")
