"""`launch/pretrain.py` as a person starts it: what it writes, says and returns."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import ROOT
from tests.runs import STEPS, checkpoint_digests, losses, tiny
from tests.wandb_reader import ending, history, offline_files, read_run
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

LIMIT = 120  # seconds a program may take
RECALL = "tokens_per_pair: 10, keys: 9, values: 9, seed: 1, nearest: 5, distances: 3, text_targets: 1.0"


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / "pretrain.py"), *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def pretrain(*overrides: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*overrides), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def finished(base) -> tuple[Path, subprocess.CompletedProcess]:
    """A whole run by plain `python`, with everything switched on."""
    result = pretrain(
        *tiny(base, "whole", "tracking.mode=offline", "train.sample_tokens=5", "train.validate_every=4"),
        "train.log_every=1",
        cwd=base,
    )
    assert result.returncode == 0, result.stderr
    return base / "whole", result


def test_it_leaves_everything_a_run_promises(finished):
    folder, _ = finished
    for name in ("config.yaml", "summary.json", "samples.txt", "log.txt", "tokenizer.json", "report/index.html"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "report" / "loss_by_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert (folder / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").is_file()


def test_every_line_of_the_metrics_has_the_promised_keys(finished):
    records = read_metrics(finished[0] / "metrics.jsonl")
    keys = (
        "step tokens loss lm_loss mtp_loss balance_loss indexer_kl lr grad_norm tokens_per_second mfu memory_gib "
        "indexer_captured indexer_recall max_violation phase attention_mode sequence_length global_batch_size "
        "data_tokens"
    ).split()
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(key in record for record in steps for key in keys)
    for record in steps:  # the first layer's experts are hashed
        by_layer = record["max_violation_by_layer"]
        assert list(by_layer) == ["blocks.0", "blocks.1", "blocks.2", "mtp"]
        assert record["max_violation"] == max(by_layer[name] for name in ("blocks.1", "blocks.2", "mtp")) > 0
    assert steps[-1]["tokens"] == STEPS * 4 * 96
    assert steps[-1]["data_tokens"] == {"text": round(STEPS * 4 * 96 * (1 - steps[-1]["padding"]))}
    assert len({record["data_hash"] for record in steps}) == STEPS
    validations = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in validations] == [4, 8, STEPS]
    assert all(record["val_bits_per_byte"] > 0 for record in validations)


def test_the_last_lines_and_the_summary_hold_the_final_loss_against_the_unigram_entropy(finished):
    folder, result = finished
    summary = json.loads((folder / "summary.json").read_text())
    gain = summary["unigram_entropy"] - summary["val_loss"]
    assert summary["val_gain_over_unigram"] == pytest.approx(gain)
    assert result.stdout.splitlines()[-1].startswith(f"final validation loss {summary['val_loss']:.4f} nats/token")
    assert f"{summary['unigram_entropy']:.4f}" in result.stdout.splitlines()[-1]


def test_it_shows_no_warnings_of_other_libraries(finished):
    _, result = finished
    assert result.stderr == ""
    assert "arning" not in result.stdout


def test_a_finished_run_says_so_and_is_not_touched(finished, base):
    folder, _ = finished
    before = files_of(folder)
    result = pretrain(*tiny(base, "whole", "guard.window=33"), cwd=base)
    assert result.returncode == 0
    assert "finished" in result.stdout and "run.overwrite=true" in result.stdout
    assert before == files_of(folder)


def test_a_finished_run_with_other_settings_is_refused_by_key(finished, base):
    """As of a sweep whose file has changed: what lies there are the figures of something else."""
    folder, _ = finished
    before = files_of(folder)
    result = pretrain(*tiny(base, "whole"), "schedule.learning_rate=0.123", cwd=base)
    assert result.returncode == 2 and result.stderr.startswith("error: schedule.learning_rate=0.123: the run that ")
    assert "has finished with " in result.stderr and "run.overwrite=true" in result.stderr
    assert before == files_of(folder)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (["train.evaluate_every=1", "evaluation.recall_distances=[400]"], "error: evaluation.recall_distances=[400]: "),
        (
            [f"data.recall={{contexts: [24,400], {RECALL}}}"],
            "error: data.recall.contexts=[24, 400]: a row has 96 tokens",
        ),
    ],
)
def test_what_only_the_data_show_to_be_bad_is_refused_before_anything_is_deleted(finished, base, bad, says):
    folder, _ = finished
    before = files_of(folder)
    result = pretrain(*tiny(base, "whole"), *bad, "run.overwrite=true", cwd=base)
    assert result.returncode == 2 and result.stderr.startswith(says) and len(result.stderr.splitlines()) == 1
    assert before == files_of(folder)
    result = pretrain(*tiny(base, "never"), *bad, cwd=base)
    assert result.returncode == 2 and not (base / "never").exists()


def test_held_out_text_that_only_evaluation_wants_is_read_before_anything_is_deleted(finished, base):
    """It is beyond what the run validates on, in records that are read as far as somebody wants them."""
    folder, _ = finished
    before = files_of(folder)
    records = [json.dumps({"text": f"{number} words of text " * 200}) for number in range(40)]
    (base / "records.jsonl").write_text("\n".join([*records, "not JSON", ""]))
    streamed = ["data=jsonl", f"data.path={base}/records.jsonl", "data.on_error=error", "data.validation_fraction=0.9"]
    more = ["train.evaluate_every=1", "train.validation_tokens=96", "evaluation.tokens=1000000"]
    result = pretrain(*tiny(base, "whole"), *streamed, *more, "run.overwrite=true", cwd=base)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert before == files_of(folder)


BAD_ON_RANK_1 = """
import os, sys
from v4train.config import load, settings
from v4train.errors import ConfigError
from v4train.train import pretrain

def refusing(settings):
    raise ConfigError("data.path", "/far", "it isn't mounted here", "mount it")

if os.environ["RANK"] == "1":
    pretrain.find_data = refusing
try:
    pretrain.pretrain(settings(load(sys.argv[1:])))
except ConfigError as error:
    sys.stdout.write(f"rank {os.environ['RANK']}: {error}\\n")  # in one piece: both ranks write to one pipe
"""


def test_what_one_rank_refuses_all_do_before_anything_is_deleted(finished, base, tmp_path):
    folder, _ = finished
    before = files_of(folder)
    program = tmp_path / "program.py"
    program.write_text(BAD_ON_RANK_1)
    launched = [sys.executable, "-m", "v4train.launching.ranks", "2", str(program)]
    result = on_two_ranks(launched, *tiny(base, "whole"), "run.overwrite=true", cwd=base)
    said = [f"rank {rank}: data.path=/far: it isn't mounted here; mount it" for rank in (0, 1)]
    assert sorted(line for line in result.stdout.splitlines() if line.startswith("rank")) == said, result.stderr
    assert before == files_of(folder)


BEGUN_MEANWHILE = """
import sys
from pathlib import Path
from v4train.config import load, settings
from v4train.errors import ConfigError
from v4train.train import pretrain

find_data = pretrain.find_data

def begin_another(settings):
    folder = Path(settings.run.dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("another job's")
    return find_data(settings)

pretrain.find_data = begin_another
try:
    pretrain.pretrain(settings(load(sys.argv[1:])))
except ConfigError as error:
    print(error)
"""


def test_a_run_that_another_job_begins_while_data_are_read_is_left_to_it(base, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(BEGUN_MEANWHILE)
    started = [sys.executable, str(program), *tiny(base, "meanwhile")]
    result = subprocess.run(started, cwd=base, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert "another job has begun or gone on with it meanwhile; run one job" in result.stdout, result.stderr
    assert [path.name for path in (base / "meanwhile").iterdir()] == ["config.yaml"]


def test_a_checkpoint_of_other_data_is_refused_before_anything_is_deleted(finished, base):
    """Only the documents tell: the configuration is the same."""
    folder, _ = finished
    shutil.copytree(folder, base / "copy")
    before = files_of(base / "copy")
    file = base / "corpus" / "00.txt"
    text = file.read_text()
    file.write_text("other text than before\n" * 20)
    try:
        result = pretrain(*tiny(base, "copy", "run.overwrite=true", f"checkpoint.resume={folder}"), cwd=base)
    finally:
        file.write_text(text)
    assert result.returncode == 2 and "the saved data position belongs to corpus=" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert before == files_of(base / "copy")


def on_two_ranks(launched: list[str], *overrides: str, cwd: Path) -> subprocess.CompletedProcess:
    ranks = environment() | {"GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([*launched, *overrides], cwd=cwd, env=ranks, capture_output=True, text=True, timeout=LIMIT)


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_killed_just_before_its_summary_gets_it_when_started_again(finished, base):
    summary = finished[0] / "summary.json"
    before = json.loads(summary.read_text())
    summary.unlink()
    result = pretrain(*tiny(base, "whole", "train.sample_tokens=5"), cwd=base)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(summary.read_text()) == before
    steps = [record["step"] for record in read_metrics(finished[0] / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_a_finished_run_that_goes_on_is_unfinished_until_it_ends_again(finished, base):
    folder = base / "longer"
    shutil.copytree(finished[0], folder)
    longer = tiny(base, "longer", f"train.max_steps={STEPS + 4}")
    paused = pretrain(*longer, f"train.stop_at_step={STEPS + 2}", cwd=base)
    assert paused.returncode == 0 and not (folder / "summary.json").exists(), paused.stderr
    refusals = {
        "train.max_steps=10": ["train.max_steps=10"],
        "train.max_tokens=1": ["train.max_tokens=1"],
        "schedule.learning_rate=0.123": [f"train.max_steps={STEPS + 2}", "schedule.learning_rate=0.123"],
    }
    for key, overrides in refusals.items():
        refused = pretrain(*tiny(base, "longer"), *overrides, cwd=base)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert refused.stderr.startswith(f"error: {key}: the run ")
    assert pretrain(*longer, cwd=base).returncode == 0
    assert json.loads((folder / "summary.json").read_text())["step"] == STEPS + 4


def test_every_rank_refuses_what_rank_0_finds_in_the_run_directory(finished, base):
    """One line, and code 2 from both ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command()[1:]]
    result = on_two_ranks(torchrun, *tiny(base, "whole"), "seed=2", cwd=base)
    assert result.stderr.count("error: seed=2") == 1
    assert "Traceback" not in result.stderr.split("error: seed=2")[0]
    assert "exitcode  : 2" in result.stderr and "exitcode  : 1 " not in result.stderr


def test_another_model_under_the_same_name_is_refused_in_one_line(finished, base):
    result = pretrain(*tiny(base, "whole", "train.max_steps=12", "model.moe.top_k=3"), cwd=base)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert "model.moe.top_k=3" in result.stderr and result.stdout == ""


@pytest.mark.parametrize("bad", ["model=nope", "train.max_stepz=1", "model.attention.o_groups=3", "data.path=/nope"])
def test_bad_input_is_one_line_and_code_2(bad, base):
    result = pretrain(*tiny(base, "bad"), bad, cwd=base)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and bad.partition("=")[0] in result.stderr
    assert not (base / "bad").exists()


def test_torchrun_says_bad_input_once(base):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command()[1:]]
    result = subprocess.run(
        [*torchrun, *tiny(base, "bad"), "parallelism.data=3"],
        cwd=base,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode != 0
    assert result.stderr.count("error: parallelism.data=3") == 1


def test_hydra_shows_the_configuration(base):
    result = pretrain("--cfg", "job", "train.max_steps=7", cwd=base)
    assert result.returncode == 0
    assert "max_steps: 7" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_a_signal_saves_and_the_same_command_continues_bitwise(finished, base, number):
    name = f"signalled_{number}"
    overrides = tiny(base, name, "train.validate_every=4", "train.max_steps=400", "tracking.mode=offline")
    process = subprocess.Popen(
        command(*overrides), cwd=base, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = base / name / "metrics.jsonl"
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and not (metrics.exists() and len(read_metrics(metrics)) >= 3):
        assert process.poll() is None, process.communicate()
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(number)
    output, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (75, "")
    assert "stopped by a signal" in output
    stopped = max(record["step"] for record in read_metrics(metrics))
    assert stopped < 400
    assert ending(read_run(*offline_files(base / name))) == (True, 75)

    # Further steps of the same run, against a run that nobody disturbed.
    further = stopped + 3
    assert pretrain(*overrides, f"train.stop_at_step={further}", cwd=base).returncode == 0
    whole = f"undisturbed_{number}"
    undisturbed = tiny(base, whole, "train.validate_every=4", "train.max_steps=400", f"train.stop_at_step={further}")
    assert pretrain(*undisturbed, cwd=base).returncode == 0
    assert losses(base, name) == losses(base, whole)
    assert checkpoint_digests(base, name, further) == checkpoint_digests(base, whole, further)


def test_a_run_that_fails_is_marked_as_failed(base):
    """The rank that keeps W&B's run is told by torchrun to end while it learns of the other's failure."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "tests.distributed.failing_worker", *tiny(base, "failed", "tracking.mode=offline")]
    result = subprocess.run(
        [*torchrun, *program],
        cwd=base,
        env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 1 and "a fault of rank 1" in result.stderr
    records = read_run(*offline_files(base / "failed"))
    assert ending(records) == (False, 1)
    assert [row["step"] for row in history(records)] == [1, 2, 3]


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_killed_ends_the_job_with_one_message(base, killed):
    """Mid-step, by SIGKILL: the others are in a collective with it, or about to be."""
    name = f"killed_{killed}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(ROOT / "launch" / "pretrain.py"), *tiny(base, name, "parallelism=context", "train.max_steps=2000")]
    job = subprocess.Popen(
        [*torchrun, *program], cwd=base, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = base / name / "metrics.jsonl"
        end = time.monotonic() + LIMIT
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < end:
            assert job.poll() is None, job.communicate()
            time.sleep(0.1)
        ranks = {int(rank.environ()["RANK"]): rank for rank in psutil.Process(job.pid).children()}
        ranks[killed].send_signal(signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    finally:
        for process in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else ():
            process.kill()
        job.kill()
    assert job.returncode != 0
    assert errors.count("error: rank ") == 1
    assert f"error: rank {1 - killed} lost contact with another rank" in errors
    assert "the same command continues from the last checkpoint" in errors
