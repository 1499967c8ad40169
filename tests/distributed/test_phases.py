"""Phases inside a run: every layout trains them as one process does, and a run killed in any of them loses nothing."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.test_attention_modes import changed
from tests.faults.lives import Life
from tests.phases import ENDS, PHASES, STEPS, in_phases
from tests.runs import checkpoint_digests, losses, tiny
from v4train.errors import ConfigError
from v4train.train import checkpoint
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

TOLERANCE = {"adamw": 1e-5, "muon": 1e-4}
ALL = pytest.mark.exhaustive
STOPS = (2, 4, 7, 10)  # in the ramp, behind it, in the warm-up, in the sparse phase
KEEP_ALL = ["checkpoint.every=1", f"checkpoint.keep={STEPS}"]
LAYOUTS = [
    (2, "zero1", ["parallelism=zero1", "train.micro_batch_size=2"]),
    (2, "pipeline", ["parallelism=pipeline"]),
    *(
        pytest.param((ranks, name, how), marks=ALL)
        for ranks, name, how in (
            (2, "context", ["parallelism=context"]),
            (2, "tensor", ["parallelism=tensor"]),
            (2, "expert", ["parallelism=expert"]),
            (2, "zero0", ["parallelism=zero0", "train.micro_batch_size=1"]),
            (2, "zero2", ["parallelism=zero2", "train.micro_batch_size=1"]),
            (2, "zero3", ["parallelism=zero3", "train.micro_batch_size=2"]),
            (4, "context_pipeline", ["parallelism=pipeline", "parallelism.context=2"]),
            (4, "data_pipeline", ["parallelism=pipeline", "train.micro_batch_size=1"]),
        )
    ),
]


def train(base: Path, ranks: int, jobs: list[tuple[str, list[str]]]) -> None:
    """Run all jobs (name, further overrides) in one launch of `ranks` processes, one after the other."""
    folder = base / f"launch_{ranks}_{jobs[0][0]}"
    folder.mkdir(parents=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([in_phases(tiny(base, name), *overrides) for name, overrides in jobs]))
    launch("tests.distributed.training_worker", ranks, [str(path), str(folder), "even"], folder, timeout=240)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Folder with the single-process runs that all others are compared with."""
    base = tmp_path_factory.mktemp("phases")
    jobs = [(f"reference_{name}", [f"optimizer={name}", "parallelism=zero0", *KEEP_ALL]) for name in TOLERANCE]
    train(base, 1, jobs)
    return base


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout[1])
def layout(base, request) -> tuple[Path, str]:
    """One layout with both optimizers, and with Muon stopped and continued several times."""
    ranks, name, overrides = request.param
    jobs = [(f"{name}_{optimizer}", [f"optimizer={optimizer}", *overrides]) for optimizer in TOLERANCE]
    parts = [[f"train.stop_at_step={stop}"] for stop in STOPS] + [[]]
    jobs += [(f"{name}_parts", ["optimizer=muon", *overrides, *part]) for part in parts]
    train(base, ranks, jobs)
    return base, name


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_losses_are_those_of_one_process(layout, optimizer):
    base, name = layout
    run, expected = f"{name}_{optimizer}", f"reference_{optimizer}"
    for key in ("loss", "lm_loss", "mtp_loss", "balance_loss"):
        got = losses(base, run, key)
        assert len(got) == STEPS
        assert got == pytest.approx(losses(base, expected, key), abs=TOLERANCE[optimizer], rel=0), key
    for key in ("lr", "tokens", "data_tokens", "data_hash", "phase", "global_batch_size", "sequence_length"):
        assert losses(base, run, key) == losses(base, expected, key), key
    kl = [[r["indexer_kl"] for r in records(base, of) if r["phase"] > 0] for of in (run, expected)]
    assert kl[0] == pytest.approx(kl[1], abs=TOLERANCE[optimizer], rel=0) and len(kl[0]) == STEPS - ENDS["dense"]


def test_a_run_stopped_in_each_phase_and_continued_is_bitwise_the_same(layout):
    base, name = layout
    for key in ("loss", "lm_loss", "mtp_loss", "grad_norm", "max_violation", "tokens", "data_hash"):
        assert losses(base, f"{name}_parts", key) == losses(base, f"{name}_muon", key), key
    digests = [checkpoint_digests(base, f"{name}_{of}", STEPS) for of in ("parts", "muon")]
    assert digests[0] == digests[1]


def records(base: Path, run: str) -> list[dict]:
    return [record for record in read_metrics(base / run / "metrics.jsonl") if "loss" in record]


def test_the_log_tells_the_phase_of_each_step(base):
    logged = records(base, "reference_muon")
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


def test_losses_have_the_weights_of_their_phase(base):
    weights = [0.2] * 5 + [0.3] * 4 + [0.05] * 3  # the phase's, the model's, from the start of the decay
    for record, weight in zip(records(base, "reference_muon"), weights, strict=True):
        assert record["loss"] == pytest.approx(record["lm_loss"] + weight * record["mtp_loss"], abs=1e-5)


def state(base: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, optimizer states, buffers."""
    reader = checkpoint.Reader(base / run / "checkpoints" / f"step_{step:08d}")
    tensors = reader.buffers()
    for name in reader.weights():
        tensors |= {f"{name} {key}": tensor for key, tensor in reader.parameter(name).items()}
    return tensors


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_each_phase_changes_what_it_trains_and_nothing_else(base, optimizer):
    states = {step: state(base, f"reference_{optimizer}", step) for step in range(1, STEPS + 1)}
    indexer = {name for name in states[1] if "indexer" in name}
    trained = {name for name in states[1] if not name.endswith("table")}
    assert changed(states[1], states[5]) == trained - indexer
    for step in (6, 7, 8):
        assert changed(states[step - 1], states[step]) == indexer, step
    assert changed(states[8], states[STEPS]) == trained
    counts = {step: {name: int(tensor) for name, tensor in states[step].items() if name.endswith(" step")}
              for step in (5, 8, STEPS)}  # fmt: skip
    for name in counts[5]:
        assert [of[name] for of in counts.values()] == ([0, 3, 7] if "indexer" in name else [5, 5, 9]), name


def test_selection_biases_move_at_the_speed_of_their_phase(base):
    for before, speed in ((4, 0.01), (8, 0.02)):  # the model's, the phase's
        states = [state(base, "reference_muon", step) for step in (before, before + 1)]
        biases = [name for name in states[0] if name.endswith("router.bias")]
        moved = torch.cat([(states[1][name] - states[0][name]).abs() for name in biases])
        assert moved.max().item() == pytest.approx(speed, rel=1e-4)
        assert all(size == 0 or size == pytest.approx(speed, rel=1e-4) for size in moved.tolist())


def test_a_checkpoint_is_loaded_in_the_mode_of_its_phase(base):
    for (_, last), phase in zip(ENDS.items(), PHASES, strict=True):
        model = checkpoint.load_model(base / "reference_muon" / "checkpoints" / f"step_{last:08d}")
        assert model.attention_mode == phase["attention_mode"]


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=ALL)])
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


def test_other_phases_than_those_already_trained_are_refused(base):
    from v4train.config import load, settings

    manifest = checkpoint.read_manifest(base / "reference_muon" / "checkpoints" / f"step_{ENDS['warmup']:08d}")
    history = manifest["state"]["history"]
    arguments = in_phases(tiny(base, "other"))
    settings(load([*arguments, "schedule.phases.2.tokens=4000"])).plan.check_continues(ENDS["warmup"], history)
    with pytest.raises(ConfigError, match="schedule.phases"):
        settings(load([*arguments, "schedule.phases.1.tokens=384"])).plan.check_continues(ENDS["warmup"], history)
