"""lm_eval's Python API scores what was exported, on a task file of one's own, as our model does itself."""

import math
import sysconfig
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer

from tests.lm_eval_tasks import write_choice
from tests.parity.peers import lower_index_wins_ties
from tests.untrained import LLAMA, V3, untrained_run
from tools import export_hf
from v4train.data import Tokenizer
from v4train.train.checkpoint import load_model
from v4train.train.run_directory import find_checkpoint

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Which of three lines follows a line? Of lengths that differ, so that a batch has padding."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_text().splitlines()
    lines = [line for line in lines if line.strip()][:60]
    documents = []
    for i in range(0, 36, 3):
        choices = ["\n" + lines[j].rstrip() for j in (i + 1, i + 20, i + 21)]
        documents.append({"context": lines[i].rstrip(), "choices": choices, "answer": 0})
    write_choice(folder, "next_line", documents)
    return folder


@pytest.mark.parametrize(
    "overrides",
    [[], pytest.param(V3, marks=pytest.mark.exhaustive), LLAMA],
    ids=["deepseek_v4", "deepseek_v3", "llama"],
)
def test_lm_eval_scores_an_exported_model(overrides, tasks, tmp_path, monkeypatch):
    lower_index_wins_ties(monkeypatch, DeepseekV4Indexer)
    run = untrained_run(tmp_path, "run", *overrides)
    export_hf.main([f"run={run}", f"out={tmp_path / 'out'}"])
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "max_length": 256, "add_bos_token": True},
        tasks=["next_line"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    directory, path = find_checkpoint(str(run))
    model, tokenizer = load_model(path), Tokenizer.load(directory.tokenizer)
    right = 0
    for sample in found["samples"]["next_line"]:
        own = [log_likelihood(model, tokenizer, sample["doc"]["context"], text) for text in sample["doc"]["choices"]]
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(own, abs=1e-3)
        right += own.index(max(own)) == 0
    assert found["results"]["next_line"]["acc,none"] == pytest.approx(right / len(found["samples"]["next_line"]))


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """As lm_eval defines it: a token of both is the context's, which keeps its own tokens."""
    before, whole = tokenizer.encode(context).tolist(), tokenizer.encode(context + continuation).tolist()
    ids = [tokenizer.bos_id, *before, *whole[len(before) :]]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return math.fsum(logits[i - 1, ids[i]].item() for i in range(1 + len(before), len(ids)))
