"""`train.evaluate_every` on every layout: the figures are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, launch
from tests.lm_eval_tasks import write_choice
from tests.runs import tiny
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

COMMON = [
    "train.max_steps=1",
    "train.evaluate_every=1",
    "evaluation.recall_rows=5",
    "evaluation.recall_keys=32",
    "evaluation.recall_values=16",
    "schedule.learning_rate=0.0",
    "model.attention.o_groups=4",
    "model.attention.indexer.num_heads=4",
]
LAYOUTS = {
    "context": ["parallelism=context", "parallelism.zero_stage=3", "parallelism.expert=2"],
    "tensor": ["parallelism=tensor"],
    "pipeline": ["parallelism=pipeline"],
    "zero2": ["parallelism=zero2"],
}


def figures(base: Path, ranks: int, name: str, layout: list[str]) -> dict[str, float]:
    folder = base / f"launch_{name}"
    folder.mkdir()
    path = folder / "jobs.json"
    tasks = ["evaluation.tasks=[choose]", f"evaluation.task_path={base / 'tasks'}"]
    path.write_text(json.dumps([tiny(base, name, *COMMON, *tasks, *layout)]))
    launch("tests.distributed.training_worker", ranks, [str(path), str(folder), "even"], folder, timeout=100)
    records = read_metrics(base / name / "metrics.jsonl")
    (found,) = (record for record in records if "eval/bits_per_byte" in record)
    return {key: value for key, value in found.items() if key.startswith("eval/")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("evaluation")
    folder = base / "tasks"
    folder.mkdir()
    choices = [["a, b):", "x" * (i + 1), ")"] for i in range(7)]
    documents = [{"context": f"def f{i}(", "choices": of, "answer": 1} for i, of in enumerate(choices)]
    write_choice(folder, "choose", documents)
    return base


@pytest.fixture(scope="module")
def expected(base) -> dict[str, float]:
    return figures(base, 1, "single", ["parallelism=single"])


def test_tasks_are_those_of_the_checkpoint(base, expected):
    """As launch/evaluate.py asks it, in batches that are no longer than they need be."""
    found, program = base / "asked.json", [sys.executable, str(ROOT / "launch" / "evaluate.py")]
    asked = [f"run={base / 'single'}", "tasks=choose", f"task_path={base / 'tasks'}", "tokens=0", "recall_rows=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*program, *asked, f"out={found}"], check=True, capture_output=True, timeout=100, env=environment)
    tasks = json.loads(found.read_text())["tasks"]["choose"]
    assert {"acc", "acc_norm", "brier_score"} <= tasks.keys()
    own = {key.removeprefix("eval/tasks/choose/"): value for key, value in expected.items() if "/tasks/" in key}
    assert own == pytest.approx(tasks, rel=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LAYOUTS)
def test_figures_are_those_of_one_process(base, expected, name):
    assert len([key for key in expected if "/tasks/" not in key]) == 8 and expected["eval/bits_per_byte"] > 1
    assert figures(base, 2, name, LAYOUTS[name]) == pytest.approx(expected, rel=1e-6)
