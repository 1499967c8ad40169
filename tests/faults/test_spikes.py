"""What breaks a run from within: gradients that are not finite, poisoned rows, a weight that is blown up.

Each ends in recovery, with the validation loss of the undisturbed run up to what another seed changes; what comes back
every time ends the run, in one line. The faults are made here, by patches in the process that trains.
"""

import contextlib
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from tests.faults.lives import Life
from tests.phases import PHASES, in_phases
from tests.runs import losses, tiny
from v4train.train import checkpoint
from v4train.train.metrics import read_metrics
from v4train.train.signals import SPIKED

pytestmark = pytest.mark.faults

STEPS, AT = 100, 60
FAST = ["parallelism=zero0", "train.layers_every=0"]
LONG = [*FAST, "guard.anticipation_after=20", f"train.max_steps={STEPS}"]
SHORT = [*FAST, "train.max_steps=16", "guard.min_history=8", "guard.snapshot_every=5", "guard.anticipation_steps=2"]
SEEDS = (1, 2, 3)
EXPERT, FACTOR = 3, 1000.0


def before_steps(steps: range, fault: Callable, times: int) -> None:
    """Let `fault(trainer)`, a context, be around these steps, the first so many times that each is taken."""
    from v4train.train.trainer import Trainer

    train_step, taken = Trainer.train_step, dict.fromkeys(steps, 0)

    def train(trainer: Trainer, stop: object) -> object:
        number = trainer.step + 1
        if number not in taken or taken[number] == times:
            return train_step(trainer, stop)
        taken[number] += 1
        with fault(trainer):
            return train_step(trainer, stop)

    Trainer.train_step = train


@contextlib.contextmanager
def gradient_not_finite(trainer, of="embedding.lookup.weight"):
    weight = next(weight for name, weight in trainer.model.named_parameters() if of in name)
    hook = weight.register_hook(lambda gradient: gradient * torch.nan)
    yield
    hook.remove()


@contextlib.contextmanager
def blown_up_head(trainer):
    with torch.no_grad():
        trainer.model.head.lm_head.weight.mul_(FACTOR)
    yield


@contextlib.contextmanager
def blown_up(trainer):
    with torch.no_grad():
        trainer.model.blocks[1].ffn.experts.down[EXPERT].mul_(FACTOR)
    yield


def poisoned_rows(rows: range) -> None:
    """Rows of random tokens, each time they are read."""
    from v4train.data.loader import Loader

    step_of = Loader._step

    def poisoned(loader: Loader, first: int) -> object:
        step = step_of(loader, first)
        for batch in step.batches if first in rows else ():
            generator = torch.Generator().manual_seed(first)
            batch.input_ids = torch.randint(0, 320, batch.input_ids.shape, generator=generator)
            batch.targets = batch.input_ids.roll(-1, 1)
        return step

    Loader._step = poisoned


def poisoned_gradients(firsts: list[int]) -> None:
    """A gradient that is not finite, each time that a step begins with one of these rows."""
    from v4train.train.trainer import Trainer

    train_step = Trainer.train_step

    def train(trainer: Trainer, stop: object) -> object:
        loader = trainer.loader
        factor = lambda: torch.nan if loader.progress.rows - loader.batch.total in firsts else 1.0  # noqa: E731
        hook = trainer.model.embedding.lookup.weight.register_hook(lambda gradient: gradient * factor())
        try:
            return train_step(trainer, stop)
        finally:
            hook.remove()

    Trainer.train_step = train


def counted_choices(path) -> None:
    """Write how many steps' experts are chosen at each step, after and before it was looked ahead."""
    from v4train.train.anticipation import Anticipation

    look_ahead = Anticipation.look_ahead

    def look(own: Anticipation, steps: int) -> None:
        before = own.steps
        look_ahead(own, steps)
        with path.open("a") as file:
            file.write(f"{before} {own.steps}\n")

    Anticipation.look_ahead = look


class Fault(NamedTuple):
    """What is injected, and what the run does: times it goes back, seen at a step, to a step, past steps' rows.

    Attributes:
        options: thresholds other than the shipped ones.
    """

    inject: Callable[[], None]
    back: list[tuple[int, int, range]]
    options: list[str] = []
    skips: int = 0


def rows_of(steps: range) -> range:
    """Of an undisturbed run."""
    return range(4 * (steps.start - 1), 4 * (steps.stop - 1))


ONE, TWO, THREE = (range(AT, AT + n) for n in (1, 2, 3))
SECOND = range(AT + 1, AT + 2)
FAULTS = {
    "a gradient": Fault(partial(before_steps, ONE, gradient_not_finite, 1), [], skips=1),
    "gradients": Fault(partial(before_steps, THREE, gradient_not_finite, 1), [(AT + 2, 50, THREE)], skips=3),
    "one batch": Fault(partial(poisoned_rows, rows_of(ONE)), [(AT, 50, ONE)]),
    # Each is far enough out alone; the second, which comes at the same step then, leads to the older snapshot
    "two batches": Fault(partial(poisoned_rows, rows_of(TWO)), [(AT, 50, ONE), (AT, 25, SECOND)]),
    "two batches, one spike": Fault(
        partial(poisoned_rows, rows_of(TWO)), [(AT + 1, 50, TWO)], options=["guard.severe=1e9"]
    ),
    "an expert": Fault(partial(before_steps, ONE, blown_up, 1), [(AT, 50, ONE)]),
}


def events_of(base, name):
    path = base / name / "events.jsonl"
    return [(event["event"], event["seen_at"], event["step"]) for event in read_metrics(path)] if path.exists() else []


def final_loss(base, name):
    return next(r["val_loss"] for r in reversed(read_metrics(base / name / "metrics.jsonl")) if "val_loss" in r)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Validation losses of undisturbed runs, by seed, and where they lie."""
    base, found = tmp_path_factory.mktemp("spikes"), {}
    for seed in SEEDS:
        life = Life(tiny(base, f"clean_{seed}", *LONG, f"seed={seed}"), base / f"clean_{seed}.log")
        assert life.end() == 0, life.log.read_text()
        assert events_of(base, f"clean_{seed}") == []  # nor does the guard see what isn't there
        found[seed] = final_loss(base, f"clean_{seed}")
    return base, found


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FAULTS)
def test_a_run_recovers(clean, name):
    base, of_seeds = clean
    fault, name = FAULTS[name], name.replace(", ", "_").replace(" ", "_")
    life = Life(tiny(base, name, *LONG, *fault.options), base / f"{name}.log", fault.inject)
    assert life.end() == 0, life.log.read_text()
    expected = [("update skipped", AT + i, AT + i) for i in range(fault.skips)]
    expected += [("went back", seen_at, target) for seen_at, target, _ in fault.back]
    if fault.back:
        expected += [("anticipation ended", fault.back[-1][0] + 20, fault.back[-1][0] + 20)]
    assert [event for event in events_of(base, name) if event[0] != "outlier"] == expected
    manifest = checkpoint.read_manifest(checkpoint.newest(base / name / "checkpoints"))
    passed = [rows_of(steps) for _, _, steps in fault.back]
    assert manifest["state"]["loader"]["gaps"] == [[rows.start, rows.stop] for rows in passed]
    noise = statistics.stdev(of_seeds.values())
    print(f"{name}: {final_loss(base, name):.4f}, of seeds {of_seeds}, their spread {noise:.4f}")
    assert abs(final_loss(base, name) - of_seeds[1]) < 2 * noise
    assert len(losses(base, name)) == STEPS


@pytest.mark.exhaustive
def test_without_the_guard_it_would_not(clean):
    base, of_seeds = clean
    life = Life(
        tiny(base, "unguarded", *LONG, "guard.enabled=false"), base / "unguarded.log", FAULTS["an expert"].inject
    )
    assert life.end() == 0, life.log.read_text()
    assert final_loss(base, "unguarded") > of_seeds[1] + 2 * statistics.stdev(of_seeds.values())


def test_what_comes_back_every_time_ends_the_run(tmp_path):
    """After so many times, in one line and with a code of its own; from the checkpoint it leaves the run goes on."""
    log, forever = tmp_path / "log", partial(before_steps, range(12, 15), gradient_not_finite, 99)
    arguments = tiny(tmp_path, "run", *SHORT, "guard.max_rollbacks=2", "guard.skip_data=false")
    assert Life(arguments, log, forever).end() == SPIKED, log.read_text()
    skipped = [("update skipped", step, step) for step in (12, 13, 14)]
    # The older snapshot the second time: what spikes again may have been broken already
    # And then the newer one, which has been trained anew
    back = [("went back", 14, 10), ("went back", 14, 5), ("gave up", 14, 10)]
    assert events_of(tmp_path, "run") == [event for end in back for event in [*skipped, end]]
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert "3 updates in a row were skipped" in error and "after going back 2 times" in error
    assert "run.name=run" in error  # a changed command would begin another run
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint.read_manifest(newest)["state"]["guard"]["rollbacks"] == 0  # whoever starts it again may try again
    assert newest.name == "step_00000010" and len(losses(tmp_path, "run")) == 10
    assert Life(arguments, log).end() == 0, log.read_text()
    assert len(losses(tmp_path, "run")) == 16 and losses(tmp_path, "run", "skipped") == [False] * 16


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_rows_that_spiked_are_passed_over_and_a_restart_knows(tmp_path, place):
    """Stopped while routing is anticipatory, before the rows that are left out, or behind them: it goes on bitwise."""
    fault = partial(before_steps, range(12, 15), gradient_not_finite, 1)
    arguments = [*SHORT, "guard.max_skipped=3", f"guard.snapshot={place}", "checkpoint.every=5"]
    names = ["whole", "stopped_11", "stopped_13"]
    for name in names:
        life = Life(tiny(tmp_path, name, *arguments), tmp_path / f"{name}.log", partial(stopping, name, fault))
        assert life.end() in (0, 75), life.log.read_text()
        if name != "whole":
            assert len(losses(tmp_path, name)) == int(name[-2:])
            life = Life(tiny(tmp_path, name, *arguments), tmp_path / f"{name}.log")
            assert life.end() == 0, life.log.read_text()
    for name in names:
        assert events_of(tmp_path, name)[-1] == ("went back", 14, 10)
        for key in ("loss", "grad_norm", "data_hash", "tokens", "max_violation"):
            assert losses(tmp_path, name, key) == losses(tmp_path, "whole", key), (name, key)
    plain = Life(tiny(tmp_path, "plain", *arguments), tmp_path / "plain.log")
    assert plain.end() == 0
    assert losses(tmp_path, "whole", "anticipatory") == [False] * 10 + [True] * 6
    hashes, expected = losses(tmp_path, "whole", "data_hash"), losses(tmp_path, "plain", "data_hash")
    assert hashes[:11] == expected[:11] and hashes[11] != expected[11]
    assert losses(tmp_path, "whole", "tokens") == losses(tmp_path, "plain", "tokens")


TWICE = [44, 60]  # the rows that steps 12 and 16 begin with


@pytest.mark.parametrize("place", ["memory", pytest.param("disk", marks=pytest.mark.exhaustive)])
def test_rows_that_were_passed_over_stay_so(tmp_path, place):
    """Two places that are poisoned whenever they are read, of which the second leads to before the first.

    Between them anticipatory routing ends.
    """
    options = [f"guard.snapshot={place}", "checkpoint.every=5", "guard.anticipation_after=2"]
    arguments = tiny(tmp_path, "run", *SHORT, "guard.max_skipped=1", *options)
    log, poison = tmp_path / "log", partial(poisoned_gradients, TWICE)
    assert Life(arguments, log, poison).end() == 0, log.read_text()
    events = [event for event in events_of(tmp_path, "run") if event[0] != "update skipped"]
    assert events == [("went back", 12, 10), ("anticipation ended", 14, 14), ("went back", 15, 5)]
    assert losses(tmp_path, "run", "skipped") == [False] * 16
    manifest = checkpoint.read_manifest(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    assert manifest["state"]["loader"]["gaps"] == [[44, 48], [60, 64]]
    assert manifest["state"]["loader"]["progress"]["rows"] == 4 * 18


@pytest.mark.exhaustive
def test_the_same_command_goes_on_past_the_rows_that_ended_a_run(tmp_path):
    arguments = tiny(tmp_path, "run", *SHORT, "guard.max_skipped=1", "guard.max_rollbacks=1")
    log, poison = tmp_path / "log", partial(poisoned_gradients, TWICE)
    assert Life(arguments, log, poison).end() == SPIKED, log.read_text()
    assert events_of(tmp_path, "run")[-1] == ("gave up", 15, 5)
    assert Life(arguments, log, poison).end() == 0, log.read_text()
    assert losses(tmp_path, "run", "skipped") == [False] * 16
    assert events_of(tmp_path, "run")[-1] == ("gave up", 15, 5)


@pytest.mark.exhaustive
def test_where_copies_in_memory_are_used_up_a_checkpoint_is_taken(tmp_path):
    """Of step 0, the only copy, which the first time leads to; the second time it leads no further."""
    options = ["guard.skip_data=false", "guard.snapshot_every=99", "checkpoint.every=5", "checkpoint.keep=9"]
    arguments = tiny(tmp_path, "run", *SHORT, "guard.max_skipped=1", *options)
    log, fault = tmp_path / "log", partial(before_steps, range(12, 13), gradient_not_finite, 2)
    assert Life(arguments, log, fault).end() == 0, log.read_text()
    back = [event for event in events_of(tmp_path, "run") if event[0] == "went back"]
    assert back == [("went back", 12, 0), ("went back", 12, 10)]
    assert losses(tmp_path, "run", "skipped") == [False] * 16


LONE = [("1", [("went back", 12, 10)]), pytest.param("1e9", [("outlier", 12, 12)], marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize(("severe", "expected"), LONE)
def test_one_poisoned_batch_is_gone_back_from_or_leaves_a_mark(tmp_path, severe, expected):
    """Of a model that has hardly begun to learn, so that random tokens are little worse: the limits are narrow."""
    sensitive = ["guard.window=8", "guard.loss_threshold=1", "guard.loss_margin=0.05", "guard.patience=9"]
    arguments = tiny(tmp_path, "run", *SHORT, *sensitive, f"guard.severe={severe}")
    life = Life(arguments, tmp_path / "log", partial(poisoned_rows, range(4 * 11, 4 * 12)))
    assert life.end() == 0, life.log.read_text()
    assert events_of(tmp_path, "run") == expected
    assert losses(tmp_path, "run", "outliers") == ([0] * 10 + [1] * 6 if severe == "1" else [0] * 11 + [1] * 5)


@pytest.mark.exhaustive
def test_what_begins_with_the_last_step_of_a_phase_is_gone_back_from(tmp_path):
    """The next phase has another loss, which couldn't confirm it."""
    sensitive = ["guard.window=3", "guard.min_history=2", "guard.snapshot_every=3", "guard.severe=1e9"]
    arguments = in_phases(tiny(tmp_path, "run", *FAST, *sensitive))
    log, fault = tmp_path / "log", partial(before_steps, range(5, 6), blown_up_head, 1)
    assert Life(arguments, log, fault).end() == 0, log.read_text()
    assert [event for event in events_of(tmp_path, "run") if event[0] == "went back"] == [("went back", 5, 3)]


def test_a_checkpoint_gone_back_to_is_of_the_phase_before(tmp_path):
    """At the end of the dense phase, which the run goes back to from the next one, no indexer has been trained."""
    arguments = [*FAST, "guard.max_skipped=1", "guard.snapshot_every=1", "checkpoint.every=5", "checkpoint.keep=9"]
    fault = partial(before_steps, range(6, 7), partial(gradient_not_finite, of="indexer"), 1)
    log = tmp_path / "log"
    life = Life(in_phases(tiny(tmp_path, "run", *arguments, "train.stop_at_step=6")), log, fault)
    assert life.end() == 0, log.read_text()
    assert events_of(tmp_path, "run")[-1] == ("went back", 6, 5)
    state = checkpoint.read_manifest(tmp_path / "run" / "checkpoints" / "step_00000005")["state"]
    assert (state["attention_mode"], state["guard"]["kind"]) == ("dense", [48, "dense"])
    assert state["guard"]["rollbacks"] == 1  # written after going back


def test_what_spikes_before_the_first_checkpoint_is_gone_back_from(tmp_path):
    """To a checkpoint of the start; events of the run that this one began from aren't its own."""
    options = ["guard.snapshot=disk", "guard.max_skipped=1", "checkpoint.every=100"]
    for name, start in (("one", "auto"), ("two", tmp_path / "one")):
        last = 4 if name == "one" else 8
        arguments = tiny(tmp_path, name, *FAST, *options, f"checkpoint.resume={start}", f"train.max_steps={last}")
        log, fault = tmp_path / f"{name}.log", partial(before_steps, range(last - 1, last), gradient_not_finite, 1)
        assert Life(arguments, log, fault).end() == 0, log.read_text()
        events = [event for event in events_of(tmp_path, name) if event[0] == "went back"]
        assert events == [("went back", last - 1, last - 4)]
        manifest = checkpoint.read_manifest(checkpoint.newest(tmp_path / name / "checkpoints"))
        guard = manifest["state"]["guard"]
        assert guard["events"] == len(events_of(tmp_path, name)) and guard["rollbacks"] == 1


@pytest.mark.exhaustive
def test_experts_are_chosen_once_where_only_weights_of_losses_change(tmp_path):
    """A phase of the same steps with another weight, and the decay's; two steps ahead, up to the end."""
    tokens = PHASES[-1]["tokens"]
    phases = [PHASES[-1], PHASES[-1] | {"name": "other", "tokens": tokens, "mtp_weight": 0.1}]
    listed = json.dumps(phases).replace('"', "")
    arguments = [
        *(key for key in in_phases(tiny(tmp_path, "run", *FAST)) if not key.startswith("schedule.phases=")),
        *(f"schedule.phases={listed}", "guard.anticipate=always", "guard.anticipation_steps=2"),
    ]
    log, path = tmp_path / "log", tmp_path / "counts"
    assert Life(arguments, log, partial(counted_choices, path)).end() == 0, log.read_text()
    steps = 2 * tokens // 384
    expected = [(0 if step == 0 else min(2, steps - step), min(3, steps - step)) for step in range(steps)]
    assert [tuple(map(int, line.split())) for line in path.read_text().splitlines()] == expected


def stopping(name: str, fault: Callable) -> None:
    """As by a signal at the end of a step, once the run has gone back."""
    from v4train.train import trainer

    fault()
    if name == "whole":
        return
    requested = trainer.Trainer._over_ranks

    def over_ranks(own: trainer.Trainer, recorded: object, stop: bool) -> object:
        return requested(own, recorded, stop or own.recovery.guard.rollbacks > 0 and own.step == int(name[-2:]))

    trainer.Trainer._over_ranks = over_ranks
