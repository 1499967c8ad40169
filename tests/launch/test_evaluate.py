"""`launch/evaluate.py` as a person starts it, on a tiny run, and the same figures during training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import evaluate as program
from tests.distributed.launch import ROOT
from tests.launch.test_generate import start
from tests.phases import in_phases
from tests.runs import corpus, losses, tiny
from tests.untrained import untrained_run
from v4train.errors import ConfigError
from v4train.evaluation.report import tables
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

RECALL = {"recall_rows": 6, "recall_keys": 32, "recall_values": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("evaluate"), "run")


def arguments(run: Path, *others: str) -> list[str]:
    return [f"run={run}", *(f"{key}={value}" for key, value in RECALL.items()), *others]


def test_it_prints_tables_and_writes_the_same_numbers(run, tmp_path):
    out = tmp_path / "deep" / "found.json"
    result = start("evaluate.py", *arguments(run, f"out={out}", "recall_distances=[20,60]", "tokens=500"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert result.stdout == tables(found) + "\n"
    assert result.stderr.splitlines()[-1] == f"written to {out}"
    assert (found["checkpoint"], found["step"], found["sequence_length"]) == ("step_00000007", 7, 96)
    assert 300 < found["text"]["all"]["tokens"] <= 500
    assert found["text"]["all"]["loss"] == pytest.approx(5.77, abs=0.15)  # log 320: random weights know nothing
    assert [of["distance"] for of in found["recall"]] == [20, 60] and found["settings"]["recall_values"] == 16
    lines = [line.split() for line in result.stdout.splitlines()]
    shown = f"{found['text']['by_source']['text']['bits_per_byte']:.4f}"
    assert ["text", shown] == next(line for line in lines if line[:1] == ["text"])[:2]


def test_the_run_of_its_folder_gets_the_file_and_a_longer_context_is_asked_for(run, capsys):
    program.main(arguments(run, "sequence_length=160", "tokens=0"))
    found = json.loads((run / "evaluation" / "step_00000007.json").read_text())
    assert found["sequence_length"] == 160 and "text" not in found
    assert [of["distance"] for of in found["recall"]] == [32, 64, 128]
    assert "recall at distance" in capsys.readouterr().out


def test_figures_during_training_are_those_of_the_checkpoint_and_change_no_loss(tmp_path):
    """In the first of several phases, whose rows are short, of streamed text: more of it than is validated on."""
    corpus(tmp_path / "corpus")
    data = tmp_path / "texts.jsonl"
    texts = [path.read_text() for path in sorted((tmp_path / "corpus").iterdir())]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    every = ["train.evaluate_every=1", *(f"evaluation.{key}={value}" for key, value in RECALL.items())]
    for name, more in (("with", every), ("without", [])):
        own = [key for key in in_phases(tiny(tmp_path, name)) if not key.startswith(("data=", "data.path="))]
        own += ["data=jsonl", f"data.path={data}", "train.validation_tokens=200"]
        overrides = [*own, "train.max_steps=2", "parallelism=zero1", *more]
        result = start("pretrain.py", *overrides, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path, "with") == losses(tmp_path, "without")
    records = [record for record in read_metrics(tmp_path / "with" / "metrics.jsonl") if "eval/bits_per_byte" in record]
    assert [record["step"] for record in records] == [1, 2]
    program.main(arguments(tmp_path / "with"))
    found = json.loads((tmp_path / "with" / "evaluation" / "step_00000002.json").read_text())
    last = records[-1]
    assert found["sequence_length"] == 48 and found["text"]["all"]["tokens"] > 400
    assert last["eval/bits_per_byte"] == pytest.approx(found["text"]["all"]["bits_per_byte"], rel=1e-6)
    for of in found["text"]["by_position"]:
        assert last[f"eval/bits_per_byte_at/{of['start']}"] == pytest.approx(of["bits_per_byte"], rel=1e-6)
    for of in found["recall"]:
        assert last[f"eval/recall/{of['distance']}"] == pytest.approx(of["accuracy"], abs=0.05)


def test_bad_input_is_one_line_and_code_2(run, tmp_path):
    result = start("evaluate.py", f"run={run}", "batch_size=none\n", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: batch_size=none") and len(result.stderr.splitlines()) == 1


def test_lm_eval_is_imported_for_tasks_only():
    code = "import sys, launch.evaluate; print(*{'deepspeed', 'wandb', 'lm_eval', 'transformers'} & {*sys.modules})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("", "")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["runn=x"], r"runn=x: unknown key; did you mean run\?"),
        (["recall_pair=1"], r"recall_pair=1: unknown key; did you mean recall_pairs\?"),
        (["tokens=-1"], "tokens=-1: it can't be negative"),
        (["tokens=0", "recall_rows=0"], "tokens=0: nothing is asked for"),
        (["recall_pairs=0"], "recall_pairs=0: at least 1"),
        (["recall_distances=[-4]"], r"recall_distances=\[-4\]: each is at least 1"),
        (["recall_distances=[a]"], "recall_distances.*=.*Integer"),
        (["sequence_length=1"], "sequence_length=1: it must be at least 2"),
        (["task_path=/nope", "tasks=a"], "task_path=/nope: there is no such folder"),
        (["task_path=/"], "task_path=/: no task of it is asked for"),
        (["precision=fp8"], "precision=fp8: unknown precision"),
    ],
)
def test_bad_arguments_are_refused_by_key(bad, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        program.read_arguments(["run=r", *bad])


def test_values_are_typed_and_defaults_come_from_both_files():
    config = program.read_arguments(["run=r", "recall_distances=64, 128", "tasks=[a,b]", "tokens=7", "out=null"])
    assert (config.recall_distances, config.tasks, config.tokens, config.out) == ([64, 128], ["a", "b"], 7, None)
    assert program.read_arguments(["run=r", "recall_distances=null"]).recall_distances is None
    assert (config.recall_pairs, config.batch_size, config.few_shot) == (4, 4, None)
    with pytest.raises(ConfigError, match="^run=missing"):
        program.read_arguments([])


def test_what_does_not_fit_the_model_is_refused(run):
    with pytest.raises(ConfigError, match="^recall_distances=.200.: each must lie between"):
        program.main(arguments(run, "recall_distances=200"))
    with pytest.raises(ConfigError, match="^recall_values=16: the tokenizer has"):
        program.main(arguments(run, "recall_keys=400"))


def test_a_diverged_model_is_an_error(run, monkeypatch):
    original = program.load_model

    def broken(path):
        model = original(path)
        model.head.lm_head.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(program, "load_model", broken)
    for more in ([], ["tokens=0"]):
        with pytest.raises(ConfigError, match="^run=.*diverged"):
            program.main(arguments(run, *more))
