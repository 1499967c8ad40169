"""The plan of a run against a step-by-step simulation, closed forms, and the published numbers (V4 report 4.2.2)."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.shipped import shipped
from v4train.config import load, settings
from v4train.errors import ConfigError
from v4train.optim.schedules import ScheduleConfig
from v4train.train.phases import OPTIONAL, PhaseConfig, Plan, RampConfig, Weights, read_phases

WEIGHTS = Weights(mtp=0.3, balance=1e-4, bias_speed=1e-3)
TRILLION = 10**12


def schedule(**overrides) -> ScheduleConfig:
    values = {"learning_rate": 1.0, "warmup_steps": 4, "decay_fraction": 0.25, "phases": []}
    return ScheduleConfig(**shipped("schedule", "cosine") | values | overrides)


def phase(name="a", tokens=1000, length=10, batch=4, mode="sparse", **others) -> PhaseConfig:
    return PhaseConfig(name, tokens, length, batch, mode, **dict.fromkeys(OPTIONAL) | others)


# 40 tokens a step, then 80 and 120 from 500 and 1000 of its tokens on; 60; 80
PHASES = [
    phase("dense", 3000, 10, RampConfig(4, 12, 4, 1000), "dense"),
    phase("warmup", 500, 20, 3, "indexer_warmup", learning_rate=0.5),
    phase("sparse", 2001, 20, 4, mtp_weight=0.2, balance_weight=0.01, bias_update_speed=0.02),
]


def naive(phases: list[PhaseConfig]) -> list[tuple[int, int, int]]:
    """(phase, batch, tokens before) of each step, by going through them."""
    steps, total = [], 0
    for index, of in enumerate(phases):
        done = 0
        while done < of.tokens:
            ramp = of.global_batch_size
            batch = ramp
            if isinstance(ramp, RampConfig):
                count = (ramp.end - ramp.start) // ramp.increment
                batch = min(ramp.end, ramp.start + ramp.increment * math.floor(done / (ramp.tokens / count)))
            steps.append((index, batch, total))
            done, total = done + batch * of.sequence_length, total + batch * of.sequence_length
    return steps


def test_phases_and_ramp_are_those_of_a_simulation():
    plan, expected = Plan(PHASES, schedule(), WEIGHTS), naive(PHASES)
    assert plan.total_steps == len(expected) == 13 + 6 + 17 + 9 + 26  # 520, 480, 2040; 540; 2080 tokens
    for step, (index, batch, tokens) in enumerate(expected):
        stage = plan.at(step)
        assert (stage.index, stage.name, stage.global_batch_size) == (index, PHASES[index].name, batch), step
        assert (stage.sequence_length, stage.attention_mode) == (
            PHASES[index].sequence_length,
            PHASES[index].attention_mode,
        )
        assert plan.tokens_before(step) == tokens
        assert stage.tokens == plan.tokens_before(step + 1) - tokens
    assert plan.total_tokens == plan.tokens_before(plan.total_steps) == 520 + 480 + 2040 + 540 + 2080
    assert plan.last == plan.at(plan.total_steps - 1)


def test_weights_are_the_phases_or_the_models():
    plan = Plan(PHASES, schedule(decay_fraction=0.0), WEIGHTS)
    dense, sparse = plan.at(0), plan.last
    assert (dense.mtp_weight, dense.balance_weight, dense.bias_update_speed) == (0.3, 1e-4, 1e-3)
    assert (sparse.mtp_weight, sparse.balance_weight, sparse.bias_update_speed) == (0.2, 0.01, 0.02)


def test_the_mtp_weight_falls_with_the_first_step_of_the_decay():
    without = [*PHASES[:2], replace(PHASES[2], mtp_weight=None)]
    for decay_fraction, steps in ((0.25, 18), (0.01, 1)):  # of 80 tokens, of 5660
        plan = Plan(without, schedule(mtp_weight_in_decay=0.1, decay_fraction=decay_fraction), WEIGHTS)
        weights = [plan.at(step).mtp_weight for step in range(plan.total_steps)]
        assert weights == [0.3] * (71 - steps) + [0.1] * steps
        rates = [plan.at(step).learning_rate for step in range(45, plan.total_steps)]
        assert [rate < 1 for rate in rates] == [False] * (26 - steps) + [True] * steps


def test_a_phases_own_mtp_weight_holds_in_the_decay():
    plan = Plan(PHASES, schedule(mtp_weight_in_decay=0.1, decay_fraction=0.6), WEIGHTS)  # of 42 x 80 tokens: from 2300
    weights = [plan.at(step).mtp_weight for step in range(plan.total_steps)]
    assert weights == [0.3] * 29 + [0.1] * 16 + [0.2] * 26


DECAY = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
}


@pytest.mark.parametrize("kind", DECAY)
def test_learning_rate_by_tokens_in_closed_form(kind):
    plan = Plan(PHASES, schedule(kind=kind, decay_fraction=0.6), WEIGHTS)
    length = 80 * round(0.6 * 5660 / 80)  # begins in the dense phase, whose steps have 120 tokens
    for step in range(plan.total_steps):
        stage, done = plan.at(step), max(0, plan.tokens_before(step + 1) - (5660 - length)) / length
        if stage.name == "warmup":
            assert stage.learning_rate == pytest.approx(0.5 * min(1, (step - 36 + 1) / 10)), step
        else:
            expected = min(1, (step + 1) / 4) * (0.1 + 0.9 * DECAY[kind](done))
            assert stage.learning_rate == pytest.approx(expected), step
    assert plan.last.learning_rate == pytest.approx(0.1)


@pytest.mark.parametrize("kind", DECAY)
def test_learning_rate_has_no_jump_where_length_and_batch_change(kind):
    without = [replace(of, learning_rate=None) for of in PHASES]
    plan = Plan(without, schedule(kind=kind, decay_fraction=0.9, warmup_steps=0), WEIGHTS)
    rates = [plan.at(step).learning_rate for step in range(plan.total_steps)]
    begun = next(step for step, rate in enumerate(rates) if rate < 1)
    slopes = [(after - before) / plan.at(step + 1).tokens for step, (before, after) in enumerate(pairwise(rates))]
    assert all(slope <= 0 for slope in slopes)
    steepest = {"cosine": math.pi / 2, "linear": 1.0, "sqrt": math.inf}[kind] * 0.9 / 5120  # 64 steps of 80 tokens
    assert all(-slope <= steepest * (1 + 1e-9) for slope in slopes)
    if kind == "linear":
        assert slopes[begun:] == pytest.approx([-0.9 / 5120] * len(slopes[begun:]))


def today(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The formula by steps, as runs without phases have always had it."""
    steps = config.warmup_steps
    if steps is None:
        steps = max(config.min_warmup_steps, round(config.warmup_fraction * total_steps))
    rises = min(1.0, (step + 1) / steps) if steps else 1.0
    decay_steps = round(config.decay_fraction * total_steps)
    done = (step + 1 - (total_steps - decay_steps)) / decay_steps if decay_steps else 0.0
    done = min(1.0, max(0.0, done))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.kind == "cosine" else 1.0 - done
    return config.learning_rate * rises * (config.final_ratio + (1.0 - config.final_ratio) * left)


@pytest.mark.parametrize("total", [1, 2, 5, 7, 15, 140, 433])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_without_phases_every_rate_keeps_its_bits(total, kind):
    for fraction in (0.0, 0.1, 0.3, 0.5, 1.0):
        config = schedule(kind=kind, learning_rate=2.7e-4, warmup_steps=None, decay_fraction=fraction, phases=None)
        plan = Plan([phase(tokens=total * 3 * 77, length=77, batch=3)], config, WEIGHTS)
        rates = [plan.at(step).learning_rate for step in range(total)]
        assert rates == [today(step, total, config) for step in range(total)]


def test_without_phases_the_plan_is_what_train_says():
    made = settings(load(["train.max_steps=30", "train.max_tokens=10001", "train.micro_batch_size=2"]))
    assert (made.plan.total_steps, made.plan.total_tokens) == (5, 5 * 2048)
    assert made.plan.lines() == [("sparse", "steps 1 to 5: 10,240 tokens, 4 x 512 a step, sparse")]
    stage = made.plan.at(3)
    assert (stage.index, stage.sequence_length, stage.global_batch_size, stage.attention_mode) == (0, 512, 4, "sparse")
    assert (stage.mtp_weight, stage.balance_weight, stage.bias_update_speed) == (0.3, 1e-3, 1e-2)  # of flash_small
    assert made.micro_batch(stage) == made.train.micro_batch_size == 2


def test_a_limit_cuts_the_plan_short_and_changes_no_rate():
    whole = Plan(PHASES, schedule(), WEIGHTS)
    expected = naive(PHASES)
    for tokens in (1, 40, 41, 520, 3040, 3041, 5659, 5660, 10**6):
        cut = Plan(PHASES, schedule(), WEIGHTS, max_tokens=tokens)
        assert cut.total_steps == sum(before < tokens for *_, before in expected), tokens
    cut = Plan(PHASES, schedule(), WEIGHTS, max_steps=44)
    assert cut.total_steps == 44 and cut.total_tokens == whole.tokens_before(44)
    assert [cut.at(step) for step in range(44)] == [whole.at(step) for step in range(44)]
    assert [name for name, _ in cut.lines()] == ["dense", "warmup"]


def test_history_tells_what_was_trained_on():
    plan = Plan(PHASES, schedule(), WEIGHTS)
    assert plan.history(0) == []
    assert plan.history(14) == [[13, 10, 4, "dense"], [1, 10, 8, "dense"]]
    assert plan.history(71)[2:] == [[17, 10, 12, "dense"], [9, 20, 3, "indexer_warmup"], [26, 20, 4, "sparse"]]
    longer = Plan([*PHASES[:2], replace(PHASES[2], tokens=4000)], schedule(), WEIGHTS)
    longer.check_continues(45, plan.history(45))  # not begun: free to change
    longer.check_continues(50, plan.history(50))
    longer.check_continues(50, None)
    shorter = Plan([replace(PHASES[0], tokens=2000), *PHASES[1:]], schedule(), WEIGHTS)
    shorter.check_continues(20, plan.history(20))
    with pytest.raises(ConfigError, match="schedule.phases=.*checkpoint's 45 steps"):
        shorter.check_continues(45, plan.history(45))
    Plan([phase(batch=8)], schedule(phases=None), WEIGHTS).check_continues(45, plan.history(45))


GOOD = {"name": "a", "tokens": 1000, "sequence_length": 10, "global_batch_size": 4, "attention_mode": "sparse"}
RAMP = {"start": 4, "end": 8, "increment": 2, "tokens": 100}
BAD = [
    ({"tokens": 39}, "phases.0.tokens=39.*less than the 40 of one step"),
    ({"tokens": -1}, "phases.0.tokens=-1"),
    ({"tokens": "many"}, "phases.0.tokens=many"),
    ({"sequence_length": 0}, "phases.0.sequence_length=0"),
    ({"micro_batch_size": 0}, "phases.0.micro_batch_size=0"),
    ({"attention_mode": "full"}, "phases.0.attention_mode=full.*dense, indexer_warmup, sparse"),
    ({"learning_rate": -1.0}, "phases.0.learning_rate=-1.0"),
    ({"mtp_weight": float("nan")}, "phases.0.mtp_weight=nan"),
    ({"balance_weight": -0.1}, "phases.0.balance_weight=-0.1"),
    ({"global_batch_size": 0}, "phases.0.global_batch_size=0"),
    ({"global_batch_size": "all"}, "phases.0.global_batch_size=all"),
    ({"global_batch_size": RAMP | {"start": 8}}, "phases.0.global_batch_size.start=8"),
    ({"global_batch_size": RAMP | {"increment": 3}}, "phases.0.global_batch_size.increment=3.*end - start = 4"),
    ({"global_batch_size": RAMP | {"tokens": 1001}}, "phases.0.global_batch_size.tokens=1001"),
    ({"global_batch_size": RAMP | {"step": 1}}, "phases.0.global_batch_size.step=1: unknown key"),
    ({"lenght": 3}, "phases.0.lenght=3: unknown key"),
    ({"learning_rate": float("inf")}, "phases.0.learning_rate=inf: it must be a finite number"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_phases_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        read_phases([GOOD | change])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "schedule.phases=.*list of phases"),
        ("all", "schedule.phases=all"),
        (["dense"], "schedule.phases.0=dense: a phase is a group of keys"),
        ([{"name": "a"}], "schedule.phases.0.tokens=missing"),
        ([GOOD, GOOD], "schedule.phases.1.name=a: another phase has it"),
    ],
)
def test_what_is_no_list_of_phases_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        read_phases(values)


SMALL = "schedule=v4_small"
REFUSED = [
    ([SMALL, "train.sequence_length=256"], "train.sequence_length=256: the phases"),
    ([SMALL, "train.global_batch_size=4"], "train.global_batch_size=4: the phases"),
    ([SMALL, "train.attention_mode=dense"], "train.attention_mode=dense: the phases"),
    ([SMALL, "train.micro_batch_size=3"], "schedule.phases.0.global_batch_size=4: .*micro_batch_size=3"),
    ([SMALL, "+schedule.phases.2.micro_batch_size=8"], "schedule.phases.2.global_batch_size=4"),
    ([SMALL, "schedule.phases.1.sequence_length=511", "parallelism.context=2"], "phases.1.sequence_length=511"),
    ([SMALL, "schedule.phases.1.attention_mode=warm"], "phases.1.attention_mode=warm"),
    ([SMALL, "model.attention_mix=swa*6"], "phases.1.attention_mode=indexer_warmup: no layer"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_a_run_that_does_not_fit_its_phases_is_refused(overrides, message, monkeypatch):
    if "parallelism.context=2" in overrides:
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
            monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=message):
        load(overrides)


def experiment(folder, **train) -> list[str]:
    """Overrides that choose an experiment with phases and these values of `train`."""
    (folder / "experiment").mkdir()
    values = json.dumps({"defaults": [{"override /schedule": "v4_small"}], "train": train})
    (folder / "experiment" / "own.yaml").write_text(f"# @package _global_\n{values}\n")
    return [f"hydra.searchpath=[file://{folder}]", "experiment=own"]


@pytest.mark.parametrize(
    "given", [{"sequence_length": 256}, {"global_batch_size": 8}, {"attention_mode": "dense"}], ids=str
)
def test_what_phases_decide_is_refused_of_an_experiment_too(given, tmp_path):
    ((key, value),) = given.items()
    with pytest.raises(ConfigError, match=f"train.{key}={value}: the phases"):
        load(experiment(tmp_path, **given))


@pytest.mark.parametrize("steps", [100, 140])  # 140 is also what a run without phases has
def test_an_experiments_limit_cuts_the_phases_short(steps, tmp_path):
    assert settings(load([SMALL])).plan.total_steps == 152
    assert settings(load(experiment(tmp_path, max_steps=steps))).plan.total_steps == steps
    assert settings(load([SMALL, f"train.max_steps={steps}"])).plan.total_steps == steps


def test_phases_decide_and_limits_cut():
    config = load([SMALL])
    assert (config.train.max_steps, config.train.sequence_length, config.train.global_batch_size) == (None, 512, 4)
    assert config.train.attention_mode == "sparse"
    assert settings(load([SMALL, "train.max_steps=50"])).plan.total_steps == 50
    assert settings(load([SMALL, "train.max_tokens=2000"])).plan.total_steps == 2
    changed = settings(load([SMALL, "schedule.phases.0.tokens=61440"])).plan
    assert changed.total_tokens == settings(config).plan.total_tokens - 61440


def test_v4_small_has_all_of_it():
    plan = settings(load([SMALL])).plan
    stages = [plan.at(step) for step in range(plan.total_steps)]
    assert [of.attention_mode for of in plan.phases] == ["dense", "indexer_warmup", "sparse"]
    assert {of.sequence_length for of in stages} == {256, 512} and {of.global_batch_size for of in stages} == {4, 8}
    assert plan.total_tokens < 300_000


PUBLISHED = {  # tokens, peak and last rate, tokens of a full step
    "flash": (32 * TRILLION, 2.7e-4, 2.7e-5, 72 * 2**20),
    "pro": (33 * TRILLION, 2.0e-4, 2.0e-5, 90 * 2**20),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_schedules(name):
    tokens, peak, final, step_tokens = PUBLISHED[name]
    plan = settings(load([f"model={name}", f"schedule=v4_{name}"])).plan
    assert tokens <= plan.total_tokens < tokens + 5 * step_tokens
    assert plan.at(1999).learning_rate == plan.at(2000).learning_rate == peak
    assert plan.at(999).learning_rate == pytest.approx(peak / 2)
    assert plan.last.learning_rate == pytest.approx(final)
    assert [of.sequence_length for of in plan.phases] == [4096, 16384, 65536, 65536, 2**20]
    full = [of.step_tokens for of in plan.stretches if plan.phases[of.phase].attention_mode != "indexer_warmup"]
    assert full == sorted(full) and set(full[5:]) == {step_tokens} and len(set(full)) == 6  # the ramp, then full steps
    dense = sum(of.tokens for of in plan.phases if of.attention_mode == "dense")
    assert dense == TRILLION if name == "flash" else dense > TRILLION
    sparse = [of for of in plan.phases if of.attention_mode == "sparse"]
    assert min(of.sequence_length for of in sparse) == 65536
    weights = {plan.at(step).mtp_weight for step in (0, 100_000)}, plan.last.mtp_weight
    assert weights == ({0.3}, 0.1)
    assert (plan.at(0).balance_weight, plan.at(0).bias_update_speed) == (1e-4, 1e-3)
    assert [of.micro_batch_size * of.sequence_length for of in plan.phases] == [2**16] * 4 + [2**20]
