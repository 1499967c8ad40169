"""Training on a server's files, cut off, failing and killed: the sequence of tokens is that of an undisturbed run."""

import io
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs import TINY, losses
from tests.serving import serve
from v4train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS, KILLED_AFTER = 40, 14
LEFT_OUT = ("data", "train.max_steps", "checkpoint.every")
CASES = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 1, 3)]


def corpus() -> dict[str, bytes]:
    """Three Parquet files of several row groups and three of JSON lines, by path."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text[i : i + 3000] for text in (f.read_text(errors="replace") for f in library) for i in (0, 3000, 6000)]
    texts = [text for text in texts if text.strip()][:390]
    files = {}
    for number in range(6):
        part = texts[number * 65 : (number + 1) * 65]
        if number % 2:
            files[f"corpus/{number}.jsonl"] = "\n".join(json.dumps({"text": text}) for text in part).encode()
        else:
            written = io.BytesIO()
            pq.write_table(pa.table({"text": part}), written, row_group_size=20)
            files[f"corpus/{number}.parquet"] = written.getvalue()
    return files


def command(base: Path, name: str, paths: list[str], ranks: int, workers: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    own = [f"data.path=[{','.join(paths)}]", "data=hub", "data.validation_fraction=0.05", f"data.workers={workers}"]
    own += [f"train.max_steps={STEPS}", "checkpoint.every=10", "train.micro_batch_size=1"]
    own += [f"run.name={name}", f"run.dir={base / name}", f"tokenizer.cache_dir={base / 'cache'}"]
    tiny = [override for override in TINY if not override.startswith(LEFT_OUT)]
    return [sys.executable, *torchrun, "launch/pretrain.py", "model=flash_small", *tiny, *own]


def environment() -> dict[str, str]:
    return os.environ | {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def start(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150, check=False
    )


def finish(arguments: list[str]) -> None:
    done = start(arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def kill_after(arguments: list[str], metrics: Path, step: int) -> None:
    """Start the program and kill all its processes once so many steps are logged."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count('"data_hash"') < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()
    process.wait()


def hashes(base: Path, name: str) -> list[str]:
    return [record["data_hash"] for record in read_metrics(base / name / "metrics.jsonl") if "data_hash" in record]


@pytest.fixture(scope="module")
def server():
    with serve(corpus()) as served:
        yield served


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def undisturbed(server, base):
    """By one process without threads."""
    finish(command(base, "clean", [server.url + path for path in server.files], 1, 0))
    return hashes(base, "clean"), losses(base, "clean")


@pytest.mark.distributed
@pytest.mark.exhaustive
@pytest.mark.parametrize(("ranks", "workers"), CASES)
def test_cut_off_failing_and_killed_it_goes_on_with_the_same_tokens(server, base, undisturbed, ranks, workers):
    name = f"ranks-{ranks}-workers-{workers}"
    arguments = command(base, name, [server.url + path for path in server.files], ranks, workers)
    server.faults[:] = [None] * 8 + [~3000, 503, None, ~100, None, None, ~20000]
    kill_after(arguments, base / name / "metrics.jsonl", KILLED_AFTER)
    server.faults[:] = [None] * 7 + [~500, 500, None, ~9000]
    finish(arguments)
    assert not server.faults, "the server was asked too seldom to fail"
    expected, expected_losses = undisturbed
    assert len(expected) == len(set(expected)) == STEPS and hashes(base, name) == expected
    assert losses(base, name) == pytest.approx(expected_losses, abs=2e-4)
    assert "from " in (base / name / "log.txt").read_text()


@pytest.fixture(scope="module")
def damaged(base):
    """JSON lines, four of which hold no text for four reasons, and the run's arguments but for the policy."""
    texts = [json.loads(line)["text"] for line in corpus()["corpus/1.jsonl"].splitlines()]
    lines = [json.dumps({"text": text[:400]}).encode() for text in texts]
    lines[40:44] = [b'{"text": "caf\xe9"}', b"not JSON", b'{"other": 1}', b'{"text": ""}']
    (base / "damaged.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    own = ["data=jsonl", "data.epochs=1", "train.validation_tokens=20", "tokenizer.train_bytes=20000"]
    return lambda name, ranks: [*command(base, name, [str(base / "damaged.jsonl")], ranks, 1), *own]


@pytest.mark.distributed
def test_bad_data_end_a_run_with_one_line_whichever_rank_meets_them(damaged):
    done = start([*damaged("error", 2), "train.max_steps=1000"])
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data.on_error=error: damaged.jsonl, record 4" in line and "data.on_error=skip" in line


def test_bad_data_are_skipped_and_counted_and_a_dry_source_ends_the_run(damaged, base):
    done = start([*damaged("skip", 1), "data.on_error=skip", "train.max_steps=1000"])
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("data left out of jsonl: ")]
    assert set(line.partition(": ")[2].split(", ")) == {"1 undecodable", "1 malformed", "1 missing column", "1 empty"}
    assert "the data have ended after step " in done.stdout
    summary = json.loads((base / "skip" / "summary.json").read_text())
    assert 0 < summary["step"] < 1000
