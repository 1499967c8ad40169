"""`train.dry_run=true`: figures of the formulas and of a real first batch, and no trace of a run."""

import subprocess
import sys

import pytest
import torch

from tests.runs import tiny
from v4train.analysis.flops import training_flops_per_token
from v4train.analysis.memory import GIB, peak_memory
from v4train.analysis.work import Work
from v4train.config import load, settings
from v4train.data import Batch
from v4train.model.config import model_config
from v4train.overrides import composed
from v4train.train.dry_run import batch_statistics, planned, works


def test_statistics_of_rows_by_hand():
    documents = torch.tensor([[0, 0, 1, 1, -1], [5, 5, 5, 5, 5]])
    targets = torch.tensor([[3, -100, 4, -100, -100], [1, 2, 3, 4, -100]])
    counts = batch_statistics([Batch(torch.zeros_like(documents), documents, targets)])
    assert counts == {"positions": 10, "padding": 1, "targets": 6, "documents": 3}


def test_the_work_of_each_phase():
    made = settings(load(["schedule=v4_small", "+schedule.phases.2.micro_batch_size=1"]))
    stages, found = zip(*works(made, Work(1, data=1)), strict=True)
    sizes = [(of.sequence_length, of.rows, of.accumulation) for of in found]
    assert sizes == [(256, 4, 1), (256, 8, 1), (512, 4, 1), (512, 1, 4)]
    assert [of.step_tokens for of in found] == [of.tokens for of in stages] == [1024, 2048, 2048, 2048]
    flops = [planned(made, *of)["flops_per_step"] for of in zip(stages, found, strict=True)]
    assert flops == [
        size * training_flops_per_token(made.model, length, mode)
        for size, length, mode in (
            (1024, 256, "dense"),
            (2048, 256, "dense"),
            (2048, 512, "indexer_warmup"),
            (2048, 512, "sparse"),
        )
    ]


def test_phases_that_are_cut_off_are_left_out():
    def names(steps):
        made = settings(load(["schedule=v4_small", f"train.max_steps={steps}"]))
        return [(stage.name, stage.global_batch_size) for stage, _ in works(made, Work(1, data=1))]

    # 24 steps of 1024 tokens, 48 of 2048, then 20 of the indexers
    assert names(24) == [("dense", 4)]
    assert names(25) == names(72) == [("dense", 4), ("dense", 8)]
    assert names(92) == [("dense", 4), ("dense", 8), ("indexer_warmup", 4)]
    assert names(93)[3:] == [("sparse", 4)]


@pytest.mark.slow
def test_what_it_shows_and_leaves(tmp_path):
    overrides = tiny(tmp_path, "dry", "train.dry_run=true")
    command = [sys.executable, "launch/pretrain.py", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    config = model_config(composed("pretrain", overrides).model)
    memory = peak_memory(config, Work(96, rows=4, device="cpu")).total / GIB
    assert f"{memory:.3g} GiB on it" in lines["memory"]
    assert "384 positions" in lines["first"] and "10 steps of 1 x 4 rows of 96 tokens" in lines["training"]
    assert not (tmp_path / "dry").exists()
