"""A run that goes back is the run to which nothing has happened: to the last bit, in every layout."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.distributed.rollback_worker import spoilt_at
from tests.distributed.test_layouts import FOUR, SHARD_ALL, TWO
from tests.phases import in_phases
from tests.runs import STEPS, checkpoint_digests, losses, tiny
from v4train.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

GUARD = ["guard.snapshot_every=3", "guard.skip_data=false", "guard.anticipate=never", "model.attention.o_groups=4"]
GUARD += ["model.attention.indexer.num_heads=4"]
BACK_TO = {3: 0, 8: 6}  # where the optimizer has no state yet; and in the middle
PHASES_BACK_TO = {3: 0, 7: 3, 10: 6}  # from among larger batches; from the warm-up into dense; from sparse into that
ALWAYS = ["guard.anticipate=always", "guard.anticipation_steps=2"]
ZERO = {
    f"zero{stage}_{name}": [f"parallelism=zero{stage}", f"optimizer={name}", *([SHARD_ALL] if stage == 3 else [])]
    for stage in range(4)
    for name in ("adamw", "muon")
}
ZERO["zero1_muon"] = [*ZERO["zero1_muon"], *ALWAYS]
ZERO["zero3_adamw"] = [*ZERO["zero3_adamw"], "checkpoint.every=1", "checkpoint.keep=0"]
SAMPLE = ("zero3_adamw", "phases")
ZERO["phases"] = ["parallelism=zero1", *ALWAYS]
IN_PHASES = {f"phases_zero{stage}": ZERO[f"zero{stage}_muon"] for stage in range(4)}
IN_PHASES["phases_adamw"] = ["parallelism=zero2", "optimizer=adamw"]


def cases():
    yield pytest.param((2, {name: ZERO[name] for name in SAMPLE}), id="sample")
    exhaustive = pytest.mark.exhaustive
    for world in (1, 2):
        runs = {name: ZERO[name] for name in ZERO if world == 1 or name not in SAMPLE}
        yield pytest.param((world, runs), id=f"zero_{world}", marks=exhaustive)
    yield pytest.param((2, IN_PHASES), id="phases", marks=exhaustive)
    yield pytest.param((2, {"phases_pipeline": [*TWO["pipeline"], *ALWAYS]}), id="phases_pipeline", marks=exhaustive)
    for world, layouts in ((2, TWO), (4, FOUR)):
        for name, layout in layouts.items():
            runs = {f"{name}_{how}": [*layout, f"optimizer={how}"] for how in ("adamw", "muon")}
            yield pytest.param((world, runs | {f"{name}_always": [*layout, *ALWAYS]}), id=name, marks=exhaustive)


@pytest.fixture(scope="module", params=cases())
def runs(tmp_path_factory, request) -> tuple[Path, list[str]]:
    """Each run twice in one launch: left alone, and spoilt on the way."""
    world, of_layout = request.param
    base = tmp_path_factory.mktemp("rollback")
    jobs = []
    for name, overrides in of_layout.items():
        for how in ("plain", "spoilt"):
            arguments = tiny(base, f"{how}_{name}", *GUARD, *overrides)
            jobs.append(in_phases(arguments, f"train.max_steps={STEPS}") if "phases" in name else arguments)
    (base / "jobs.json").write_text(json.dumps(jobs))
    launch("tests.distributed.rollback_worker", world, [str(base / "jobs.json"), str(base), "even"], base, timeout=240)
    return base, list(of_layout)


def test_it_trains_on_as_if_nothing_had_happened(runs):
    base, names = runs
    for name in names:
        for key in ("loss", "mtp_loss", "grad_norm", "max_violation", "data_hash", "tokens", "lr"):
            assert losses(base, f"spoilt_{name}", key) == losses(base, f"plain_{name}", key), (name, key)
        of_runs = [checkpoint_digests(base, f"{how}_{name}", STEPS) for how in ("plain", "spoilt")]
        assert of_runs[0] == of_runs[1], name


def test_it_says_so(runs):
    base, names = runs
    for name in names:
        events = read_metrics(base / f"spoilt_{name}" / "events.jsonl")
        back_to, counts = BACK_TO, [1] * 6 + [2] * 4
        if "phases" in name:
            back_to, counts = PHASES_BACK_TO, [1] * 3 + [2] * 3 + [3] * 4
        assert {event["seen_at"]: event["step"] for event in events} == back_to
        assert back_to.keys() == spoilt_at(name).keys()
        assert losses(base, f"spoilt_{name}", "rollbacks") == counts
        assert not (base / f"plain_{name}" / "events.jsonl").exists()


def test_experts_are_not_chosen_beforehand_where_routers_dont_learn(runs):
    base, names = runs
    for name in set(names) & {"phases", "phases_zero1", "phases_pipeline"}:
        assert losses(base, f"spoilt_{name}", "anticipatory") == [True] * 5 + [False] * 3 + [True] * 2


def test_checkpoints_of_the_steps_that_were_left_are_left_too(runs):
    base, names = runs
    for name in set(names) & {"zero3_adamw"}:
        kept = {path.name for path in (base / f"spoilt_{name}" / "checkpoints").iterdir()}
        assert kept == {f"step_{step:08d}" for step in range(STEPS + 1)}
