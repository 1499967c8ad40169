"""`train.evaluate_every` on every layout: the figures are those of one process."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
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
    path.write_text(json.dumps([tiny(base, name, *COMMON, *layout)]))
    launch("tests.distributed.training_worker", ranks, [str(path), str(folder), "even"], folder, timeout=100)
    records = read_metrics(base / name / "metrics.jsonl")
    (found,) = (record for record in records if "eval/bits_per_byte" in record)
    return {key: value for key, value in found.items() if key.startswith("eval/")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def expected(base) -> dict[str, float]:
    return figures(base, 1, "single", ["parallelism=single"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LAYOUTS)
def test_figures_are_those_of_one_process(base, expected, name):
    assert len(expected) == 8 and expected["eval/bits_per_byte"] > 1
    assert figures(base, 2, name, LAYOUTS[name]) == pytest.approx(expected, rel=1e-6)
