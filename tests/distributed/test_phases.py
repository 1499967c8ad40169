"""Phases inside a run: every layout trains them as one process does, and a run killed in any of them loses nothing."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.test_attention_modes import changed
from tests.faults.lives import Life
from tests.phases import ENDS, PHASES, STEPS, in_phases
from tests.runs import checkpoint_digests, losses, tiny
from v4train.analysis.flops import training_flops_per_token
from v4train.config import load, settings
from v4train.errors import ConfigError
from v4train.train import checkpoint
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

TOLERANCE = {"adamw": 1e-5, "muon": 1e-4}
ALL = pytest.mark.exhaustive
STOPS = (2, 4, 7, 10)  # in the ramp, behind it, in the warm-up, in the sparse phase
KEEP_ALL = ["checkpoint.every=1", f"checkpoint.keep={STEPS}"]
LAYOUTS = [
    pytest.param((2, ["parallelism=zero1", "train.micro_batch_size=2"], STOPS), id="zero1"),
    pytest.param((2, ["parallelism=pipeline"], (7,)), id="pipeline", marks=ALL),
]
LAYOUTS += [
    pytest.param((ranks, how.split(), STOPS), id=how, marks=ALL)
    for ranks, how in (
        (1, "parallelism=zero1"),
        (2, "parallelism=context"),
        (2, "parallelism=tensor"),
        (2, "parallelism=expert"),
        (2, "parallelism=pipeline train.micro_batch_size=1"),
        (2, "parallelism=zero0 train.micro_batch_size=1"),
        (2, "parallelism=zero2 train.micro_batch_size=1"),
        (2, "parallelism=zero3 train.micro_batch_size=2"),
        (4, "parallelism=pipeline parallelism.context=2"),
        (4, "parallelism=pipeline parallelism.zero_stage=0 train.micro_batch_size=1"),
    )
]


def train(base: Path, ranks: int, jobs: list[tuple[str, list[str]]]) -> None:
    """Run all jobs (name, further overrides) in one launch of `ranks` processes, one after the other; once."""
    folder = base / f"launch_{ranks}_{jobs[0][0]}"
    if folder.exists():
        return  # pytest sets a module's fixtures up anew where the order of tests goes back to an earlier parameter
    folder.mkdir(parents=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([in_phases(tiny(base, name), *overrides) for name, overrides in jobs]))
    launch("tests.distributed.training_worker", ranks, [str(path), str(folder), "even"], folder, timeout=240)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("phases")


@pytest.fixture(scope="module", params=["muon", pytest.param("adamw", marks=ALL)])
def reference(base, request) -> str:
    """Name of the single-process run with one optimizer that others are compared with."""
    name = f"reference_{request.param}"
    train(base, 1, [(name, [f"optimizer={request.param}", "parallelism=zero0", *KEEP_ALL])])
    return name


@pytest.fixture(scope="module", params=LAYOUTS)
def whole_and_parts(base, reference, request) -> tuple[str, str]:
    """Names of two runs on one layout: one undisturbed, one stopped and continued several times."""
    (ranks, overrides, stops), optimizer = request.param, reference.partition("_")[2]
    whole = re.sub(r"\W+", "_", " ".join([optimizer, *overrides]))
    jobs = [(whole, [])]
    jobs += [(f"{whole}_parts", [f"train.stop_at_step={stop}"]) for stop in stops] + [(f"{whole}_parts", [])]
    train(base, ranks, [(name, [f"optimizer={optimizer}", *overrides, *more]) for name, more in jobs])
    return jobs[0][0], jobs[-1][0]


def test_losses_are_those_of_one_process(base, reference, whole_and_parts):
    run, tolerance = whole_and_parts[0], TOLERANCE[reference.partition("_")[2]]
    for key in ("loss", "lm_loss", "mtp_loss", "balance_loss"):
        got = losses(base, run, key)
        assert len(got) == STEPS
        assert got == pytest.approx(losses(base, reference, key), abs=tolerance, rel=0), key
    for key in ("lr", "tokens", "data_tokens", "data_hash", "phase", "global_batch_size", "sequence_length"):
        assert losses(base, run, key) == losses(base, reference, key), key
    kl = [[r["indexer_kl"] for r in records(base, of) if r["phase"] > 0] for of in (run, reference)]
    assert kl[0] == pytest.approx(kl[1], abs=tolerance, rel=0) and len(kl[0]) == STEPS - ENDS["dense"]
    norms = [losses(base, of, "grad_norm") for of in (run, reference)]
    assert norms[0][:8] == pytest.approx(norms[1][:8], rel=1e-4)  # of what trains, the warm-up's included


def test_a_run_stopped_in_each_phase_and_continued_is_bitwise_the_same(base, whole_and_parts):
    whole, parts = whole_and_parts
    for key in ("loss", "lm_loss", "mtp_loss", "grad_norm", "max_violation", "tokens", "data_hash"):
        assert losses(base, parts, key) == losses(base, whole, key), key
    assert checkpoint_digests(base, parts, STEPS) == checkpoint_digests(base, whole, STEPS)


def records(base: Path, run: str) -> list[dict]:
    return [record for record in read_metrics(base / run / "metrics.jsonl") if "loss" in record]


def test_the_log_tells_the_phase_of_each_step(base, reference):
    logged = records(base, reference)
    first = 1
    for index, (phase, (name, last)) in enumerate(zip(PHASES, ENDS.items(), strict=True)):
        for record in logged[first - 1 : last]:
            assert (record["phase"], record["phase_name"], record["step"]) == (index, name, first)
            assert record["attention_mode"] == phase["attention_mode"]
            assert record["sequence_length"] == phase["sequence_length"]
            assert ("indexer_kl" in record) == (name != "dense")
            first += 1
    assert [record["global_batch_size"] for record in logged] == [4] * 2 + [8] * 3 + [4] * 7
    assert [record["tokens"] for record in logged][:3] == [192, 384, 768]


def test_mfu_counts_what_the_phase_computes(base, reference):
    model = settings(load(in_phases(tiny(base, "other")))).model
    per_token = [record["mfu"] / record["tokens_per_second"] for record in records(base, reference)]
    flops = [training_flops_per_token(model, of["sequence_length"], of["attention_mode"]) for of in PHASES]
    expected = [flops[record["phase"]] / flops[0] for record in records(base, reference)]
    assert [value / per_token[0] for value in per_token] == pytest.approx(expected, rel=1e-9)
    assert flops[1] < 0.5 * flops[2]


def test_losses_have_the_weights_of_their_phase(base, reference):
    weights = [0.2] * 5 + [0.3] * 4 + [0.05] * 3  # the phase's, the model's, from the start of the decay
    for record, weight in zip(records(base, reference), weights, strict=True):
        assert record["loss"] == pytest.approx(record["lm_loss"] + weight * record["mtp_loss"], abs=1e-5)


def state(base: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, optimizer states, buffers."""
    reader = checkpoint.Reader(base / run / "checkpoints" / f"step_{step:08d}")
    tensors = reader.buffers()
    for name in reader.weights():
        tensors |= {f"{name} {key}": tensor for key, tensor in reader.parameter(name).items()}
    return tensors


def test_each_phase_changes_what_it_trains_and_nothing_else(base, reference):
    states = {step: state(base, reference, step) for step in range(1, STEPS + 1)}
    indexer = {name for name in states[1] if "indexer" in name}
    trained = {name for name in states[1] if not name.endswith("table")}
    assert changed(states[1], states[5]) == trained - indexer
    for step in (6, 7, 8):
        assert changed(states[step - 1], states[step]) == indexer, step
    biases = {name for name in trained if name.endswith("router.bias")}  # which may have come back
    assert trained - biases <= changed(states[8], states[STEPS]) <= trained
    counts = {step: {name: int(tensor) for name, tensor in states[step].items() if name.endswith(" step")}
              for step in (5, 8, STEPS)}  # fmt: skip
    for name in counts[5]:
        assert [of[name] for of in counts.values()] == ([0, 3, 7] if "indexer" in name else [5, 5, 9]), name


def test_selection_biases_move_at_the_speed_of_their_phase(base, reference):
    for before, speed in ((4, 0.01), (8, 0.02)):  # the model's, the phase's
        states = [state(base, reference, step) for step in (before, before + 1)]
        biases = [name for name in states[0] if name.endswith("router.bias")]
        moved = torch.cat([(states[1][name] - states[0][name]).abs() for name in biases])
        assert moved.max().item() == pytest.approx(speed, rel=1e-4)
        assert all(size == 0 or size == pytest.approx(speed, rel=1e-4) for size in moved.tolist())


def test_a_checkpoint_is_loaded_in_the_mode_of_its_phase(base, reference):
    for (_, last), phase in zip(ENDS.items(), PHASES, strict=True):
        model = checkpoint.load_model(base / reference / "checkpoints" / f"step_{last:08d}")
        assert model.attention_mode == phase["attention_mode"]


@pytest.mark.faults
@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_in_each_phase_is_bitwise_the_same(base, ranks):
    arguments = ["optimizer=muon", "parallelism=zero1", *KEEP_ALL]
    runs = {name: in_phases(tiny(base, name), *arguments) for name in (f"whole_{ranks}", f"killed_{ranks}")}
    whole, killed = runs
    log = base / f"{killed}.log"
    for of in (whole, killed):
        stops = STOPS[1:] if of == killed else ()
        for stop in (*stops, None):
            lives = Life.of_ranks(ranks, runs[of], log)
            if stop is None:
                assert [life.end() for life in lives] == [0] * ranks, log.read_text()[-3000:]
                continue
            for life in lives:
                assert life.kill_when(lambda stop=stop: steps_logged(base, killed) >= stop), log.read_text()[-3000:]
            assert steps_logged(base, killed) < STEPS
    assert losses(base, killed) == losses(base, whole)
    assert checkpoint_digests(base, killed, STEPS) == checkpoint_digests(base, whole, STEPS)


def steps_logged(base: Path, run: str) -> int:
    path = base / run / "metrics.jsonl"
    return len(records(base, run)) if path.exists() else 0


def test_other_phases_than_those_already_trained_are_refused(base, reference):
    manifest = checkpoint.read_manifest(base / reference / "checkpoints" / f"step_{ENDS['warmup']:08d}")
    history = manifest["state"]["history"]
    arguments = in_phases(tiny(base, "other"))
    settings(load([*arguments, "schedule.phases.2.tokens=4000"])).plan.check_continues(ENDS["warmup"], history)
    with pytest.raises(ConfigError, match="schedule.phases"):
        settings(load([*arguments, "schedule.phases.1.tokens=384"])).plan.check_continues(ENDS["warmup"], history)
