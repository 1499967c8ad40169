"""A layout never changes the maths (DESIGN 7), and a run that was interrupted loses nothing (DESIGN 10)."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.runs import MIXED, STEPS, checkpoint_digests, losses, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

TOLERANCE = {"adamw": 1e-5, "muon": 1e-4}
STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("adamw", "muon")


def train(base: Path, ranks: int, jobs: dict[str, list[str]]) -> None:
    """Run all jobs (name -> further overrides) in one launch of `ranks` processes."""
    folder = base / f"launch_{ranks}_{next(iter(jobs))}"
    folder.mkdir(parents=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([tiny(base, name, *overrides) for name, overrides in jobs.items()]))
    launch("tests.distributed.training_worker", ranks, [str(path), str(folder), "even"], folder, timeout=240)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Folder with one single-process run of each optimizer, ZeRO 0, the reference for all others."""
    base = tmp_path_factory.mktemp("training")
    jobs = {f"reference_{name}": [f"optimizer={name}", "parallelism=zero0"] for name in OPTIMIZERS}
    train(base, 1, jobs | {"reference_mixed": ["optimizer=muon", *MIXED, "parallelism=zero0"]})
    return base


EVERY = dict.fromkeys(OPTIMIZERS, STAGES)
SAMPLE = {"adamw": (1, 3), "muon": (0, 2)}  # each stage once
WORLDS = [pytest.param((2, SAMPLE), id="2", marks=pytest.mark.exhaustive)]
WORLDS += [pytest.param((ranks, EVERY), id=f"{ranks}-every", marks=pytest.mark.exhaustive) for ranks in (1, 2, 4)]


@pytest.fixture(scope="module", params=WORLDS)
def layouts(base, request) -> tuple[Path, tuple[int, dict[str, tuple[int, ...]]]]:
    """ZeRO stages of each optimizer on so many ranks; the odd ones with gradient accumulation."""
    ranks, stages = request.param
    jobs = {}
    for name in OPTIMIZERS:
        for stage in stages[name]:
            accumulate = ["train.micro_batch_size=1"] if stage % 2 or ranks == 4 else []
            # Small tensors stay whole in ZeRO 3 unless told: here all are sharded, as a large model's are.
            shard = ["+parallelism.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
            further = accumulate + (shard if stage == 3 else [])
            jobs[run_name(request.param, stage, name)] = [f"optimizer={name}", f"parallelism=zero{stage}", *further]
    train(
        base,
        ranks,
        jobs | {run_name(request.param, 3, "mixed"): ["optimizer=muon", *MIXED, "parallelism=zero3", *shard]},
    )
    return base, request.param


def run_name(world: tuple[int, dict[str, tuple[int, ...]]], stage: int, name: str) -> str:
    ranks, stages = world
    return f"ranks{ranks}_{'every' if stages is EVERY else 'some'}_zero{stage}_{name}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_losses_are_those_of_one_process(layouts, name):
    base, world = layouts
    for stage in world[1][name]:
        losses_are_those_of_one_process(base, run_name(world, stage, name), name)


def losses_are_those_of_one_process(base, run, name):
    for key in ("loss", "lm_loss", "mtp_loss", "balance_loss", "indexer_kl"):
        expected, got = losses(base, f"reference_{name}", key), losses(base, run, key)
        assert len(got) == STEPS
        assert got == pytest.approx(expected, abs=TOLERANCE[name], rel=0), key
    for key in ("grad_norm", "max_violation", "lr", "tokens"):
        assert losses(base, run, key)[:2] == pytest.approx(losses(base, f"reference_{name}", key)[:2], rel=1e-4), key


def test_a_mix_of_the_other_kinds_trains_the_same(layouts):
    base, world = layouts
    for key in ("loss", "lm_loss", "mtp_loss", "balance_loss", "indexer_kl"):
        got = losses(base, run_name(world, 3, "mixed"), key)
        assert got == pytest.approx(losses(base, "reference_mixed", key), abs=TOLERANCE["muon"], rel=0), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stages_have_the_same_gradients_to_the_last_bit(layouts, name):
    """Not only close: AdamW turns rounding into whole learning rates where a gradient is nothing else, so the loss
    after one update tells. Later updates differ by the rounding of differently cut optimizer states. Sums over four
    ranks have the order of each collective; with accumulation over two, ZeRO 1 sums micro-batches before ranks and
    ZeRO 3 ranks before micro-batches."""
    base, (ranks, stages) = layouts
    pairs = [((1, 3), ranks == 1), ((0, 2), ranks < 4)]  # with the same accumulation
    for pair, bitwise in [(pair, bitwise) for pair, bitwise in pairs if set(pair) <= set(stages[name])]:
        for key in ("loss", "mtp_loss", "indexer_kl"):
            runs = [losses(base, run_name((ranks, stages), stage, name), key)[:2] for stage in pair]
            assert runs[0] == (runs[1] if bitwise else pytest.approx(runs[1], abs=2e-6)), key


@pytest.mark.exhaustive
def test_recomputation_and_profiling_change_no_bit(tmp_path):
    """On 2 ranks, where ZeRO 3 frees and gathers parameters in the middle of the backward pass."""
    jobs = {}
    for stage, levels in ((1, ("none",)), (3, ("none", "block", "attention"))):
        shard = ["+parallelism.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []
        for level in levels:
            overrides = [f"parallelism=zero{stage}", *shard, f"train.recompute={level}", "train.micro_batch_size=1"]
            jobs[f"zero{stage}_{level}"] = [*overrides, "train.stop_at_step=4"]
    profiled = ["train.recompute=block", "train.profile=[2,3]"]  # one step: writing takes its time
    jobs["zero1_profile"] = [*jobs["zero1_none"], *profiled]
    train(tmp_path, 2, jobs)
    for name in jobs:
        for key in ("loss", "mtp_loss", "balance_loss", "indexer_kl", "grad_norm", "max_violation"):
            assert losses(tmp_path, name, key) == losses(tmp_path, f"{name[:5]}_none", key), (name, key)
    profile = json.loads((tmp_path / "zero1_profile" / "profile" / "modules.json").read_text())
    rows = {row["module"]: row for row in profile["rows"]}
    assert profile["profiled_steps"] == 1 and rows["blocks.1.attention"]["calls"] == 2  # micro-batches a step
    parts = ("data", "normalisation", "engine", "gradients", "optimizer", "routers", "model")
    assert all(rows[part]["total"] > 0 for part in parts)


# optimizer, ZeRO stage on 2 ranks
FLASH_SMALL = [("adamw", 3), ("muon", 2)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "stage"), FLASH_SMALL)
def test_flash_small_trains_the_same_on_every_layout(tmp_path, name, stage):
    """The shipped model itself at its shipped learning rates, on short sequences."""
    common = ["model=flash_small", "train.sequence_length=128", "train.micro_batch_size=2", "train.sample_tokens=0"]
    common += ["train.max_steps=6", "train.validate_every=0", "train.validation_tokens=500", "checkpoint.every=0"]
    common += ["tracking.mode=disabled", f"tokenizer.cache_dir={tmp_path / 'cache'}", "device=cpu"]
    for ranks, on in ((1, 1), (2, stage)):
        path, run = tmp_path / f"jobs_{ranks}.json", f"run.dir={tmp_path / str(ranks)}"
        path.write_text(json.dumps([[*common, f"optimizer={name}", f"parallelism=zero{on}", run]]))
        launch("tests.distributed.training_worker", ranks, [str(path), str(tmp_path), "even"], tmp_path, timeout=140)
    expected, got = losses(tmp_path, "1"), losses(tmp_path, "2")
    assert got == pytest.approx(expected, abs=TOLERANCE[name], rel=0)


def test_the_reference_learns(base):
    for name in OPTIMIZERS:
        values = losses(base, f"reference_{name}")
        assert values[-1] < values[0] - 0.05


RESUMED = [
    # ranks, stage, optimizer
    (2, 3, "muon"),
    pytest.param(1, 1, "muon", marks=pytest.mark.exhaustive),
    pytest.param(2, 2, "adamw", marks=pytest.mark.exhaustive),
    pytest.param(1, 0, "adamw", marks=pytest.mark.exhaustive),
    pytest.param(1, 3, "muon", marks=pytest.mark.exhaustive),
    pytest.param(2, 0, "muon", marks=pytest.mark.exhaustive),
    pytest.param(2, 1, "muon", marks=pytest.mark.exhaustive),
    pytest.param(2, 3, "adamw", marks=pytest.mark.exhaustive),
    pytest.param(4, 1, "muon", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("ranks", "stage", "name"), RESUMED)
def test_a_run_stopped_and_continued_is_bitwise_the_same(base, ranks, stage, name):
    run = f"{ranks}_{stage}_{name}"
    common = [f"optimizer={name}", f"parallelism=zero{stage}", "precision=bf16" if stage == 2 else "precision=fp32"]
    train(
        base,
        ranks,
        {
            f"whole_{run}": common,
            f"halves_{run}": [*common, "train.stop_at_step=4"],
        },
    )
    train(base, ranks, {f"halves_{run}": common})  # another process, the same name: continues
    for key in ("loss", "grad_norm", "max_violation"):
        assert losses(base, f"halves_{run}", key) == losses(base, f"whole_{run}", key)
    assert checkpoint_digests(base, f"halves_{run}", STEPS) == checkpoint_digests(base, f"whole_{run}", STEPS)


@pytest.mark.exhaustive
def test_a_run_continues_on_another_layout(base):
    """Saved by 2 ranks with ZeRO 3, continued by 1 rank with ZeRO 1 and recomputation: as if nothing had happened."""
    for ranks, how in (
        (2, ["parallelism=zero3", "train.stop_at_step=5"]),
        (1, ["parallelism=zero1", "train.recompute=block"]),
    ):
        train(base, ranks, {f"moved_{name}": [f"optimizer={name}", *how] for name in OPTIMIZERS})
    for name in OPTIMIZERS:
        expected = losses(base, f"reference_{name}")
        assert losses(base, f"moved_{name}") == pytest.approx(expected, abs=TOLERANCE[name], rel=0)
