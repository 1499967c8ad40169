"""What counts as a spike: closed forms of median and spread, outliers, drifts, phases; where a run goes back to."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from tests.shipped import shipped
from v4train.errors import ConfigError
from v4train.train.spike_guard import CONSISTENT, GuardConfig, SpikeDetector, SpikeGuard, excess, robust

SHIPPED = GuardConfig(**shipped("guard", "default"))
CONFIG = replace(
    SHIPPED,
    window=8,
    min_history=4,
    loss_threshold=5.0,
    loss_margin=0.5,
    gradient_threshold=5.0,
    gradient_margin=1.0,
    patience=2,
    severe=1e9,
    max_skipped=3,
    max_skipped_share=1.0,
)


def detector_after(losses, config=CONFIG, grad_norm=1.0) -> SpikeDetector:
    detector = SpikeDetector(config)
    assert [detector.observe(loss, grad_norm, True) for loss in losses] == [None] * len(losses)
    return detector


@pytest.mark.parametrize("trend", [0.0, -0.01, 0.01])
def test_the_spread_of_normal_noise_is_its_standard_deviation_whatever_the_trend(trend):
    noise = statistics.NormalDist(3.0, 0.25).samples(20001, seed=1)
    middle, spread = robust([value + trend * (i - 10000) for i, value in enumerate(noise)])
    assert spread == pytest.approx(0.25, rel=0.02)
    assert middle == pytest.approx(3.0, abs=0.01) or trend


def test_outliers_hardly_move_the_spread():
    noise = statistics.NormalDist(3.0, 0.25).samples(20000, seed=1)
    spoilt = [1e6 if i % 20 == 0 else value for i, value in enumerate(noise)]
    assert robust(spoilt)[1] == pytest.approx(0.25, rel=0.25)


def test_median_and_spread_by_hand():
    # Changes 2 1 4 1 4, of which 2 is the median; they differ from it by 0 1 2 1 2
    assert robust([1, 3, 4, 8, 9, 13]) == (6, CONSISTENT / math.sqrt(2))


@pytest.mark.parametrize("above", [-1e-6, 1e-6])
def test_an_outlier_is_beyond_both_limits(above):
    history = [1.0, 4.0, 2.0, 5.0, 3.0]  # median 3; changes 3 -2 3 -2, 2.5 from their median
    spread = 2.5 * CONSISTENT / math.sqrt(2)
    assert (excess(3 + 2 * spread + above, history, threshold=2, margin=1) > 1) == (above > 0)
    assert (excess(3 + 9 + above, history, threshold=2, margin=9) > 1) == (above > 0)
    assert excess(3 + 27, history, threshold=2, margin=9) == pytest.approx(3)
    assert excess(-1e9, history, threshold=2, margin=1) < 0  # below is no harm


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_outlier(value):
    assert excess(value, [1.0, 2.0], 1e9, 1e9) == math.inf


def test_a_lone_outlier_is_none_and_does_not_join_the_history():
    detector = detector_after([4.0, 4.1, 3.9, 4.0])
    for _ in range(20):
        assert detector.observe(9.0, 1.0, True) is None
        assert detector.observe(4.0, 1.0, True) is None
    assert set(detector.losses) == {4.0}


def test_outliers_in_a_row_are_a_spike():
    detector = detector_after([4.0, 4.1, 3.9, 4.0])
    assert detector.observe(9.0, 1.0, True) is None
    spike = detector.observe(8.0, 1.0, True)
    assert spike.steps == 2 and spike.why == "the loss is 8 where 4 is usual"


def test_a_gradient_norm_is_judged_by_its_logarithm():
    detector = detector_after([4.0] * 8, grad_norm=0.5)  # no spread: the margin of one e-fold holds
    assert detector.observe(4.0, 0.5 * math.exp(0.99), True) is None and detector.bad == 0
    assert detector.observe(4.0, 0.5 * math.exp(1.01), True) is None and detector.bad == 1
    assert "gradient norm is 5 where 0.5 is usual" in detector.observe(4.0, 5.0, True).why


def test_nothing_is_held_against_too_short_a_history():
    detector = detector_after([4.0, 9.0, 4.0])
    assert detector.bad == 0
    assert detector.observe(math.nan, 1.0, True) is None and detector.bad == 1  # but this is bad anywhere


@pytest.mark.parametrize("known", range(4, 9))
def test_limits_are_wider_while_the_window_is_filling(known):
    """By sqrt(8 / n): no spread, so the margins of 0.5 nats and one e-fold hold."""
    wider = math.sqrt(8 / known)
    for loss, gradient, expected in ((0.499, 0.0, 0), (0.501, 0.0, 1), (0.0, 0.999, 0), (0.0, 1.001, 1)):
        detector = detector_after([4.0] * known)
        detector.observe(4.0 + wider * loss, math.exp(wider * gradient), True)
        assert detector.bad == expected


def test_one_that_lies_far_out_is_a_spike_at_once():
    config = replace(CONFIG, severe=3.0)
    for figures, expected in (((5.49, 1.0), None), ((5.51, 1.0), 1), ((4.0, math.exp(2.99)), None), ((4.0, 20.1), 1)):
        spike = detector_after([4.0] * 8, config).observe(*figures, True)
        assert (spike and spike.steps) == expected
    detector = detector_after([4.0] * 8, config)
    assert detector.observe(math.nan, 1.0, True) is None  # of a loss alone that isn't finite one more is awaited
    assert detector.observe(math.nan, 1.0, True).steps == 2


def after_scales(scales, config=CONFIG) -> SpikeDetector:
    detector = SpikeDetector(config)
    for scale in scales:
        assert detector.observe(3.0, 1.0, True, activations={"blocks.0": 1.0, "blocks.1": scale}) is None
    return detector


@pytest.mark.parametrize(
    ("factor", "seen"), [(4.9, False), (5.0, True), (1000.0, True), (math.inf, True), (math.nan, True)]
)
def test_a_layer_that_grows_at_once_is_broken(factor, seen):
    """Whatever loss and gradient say; with what it had grown to before, over many steps."""
    detector = after_scales([1.15**i for i in range(30)])
    spike = detector.observe(3.0, 1.0, True, activations={"blocks.0": 1.0, "blocks.1": 1.15**29 * factor})
    assert (spike is not None) == seen
    if seen:
        assert spike.steps == 1 and spike.why.startswith("the output of blocks.1 is ")
        assert "after 57.6" in spike.why or not math.isfinite(factor)
        assert detector.scales[-1]["blocks.1"] == pytest.approx(29 * math.log(1.15))  # it isn't held against what comes


def test_no_layer_is_broken_in_the_first_steps_nor_where_the_mode_changes():
    """Nor by what was as large a few steps before, nor where nobody looks."""
    alternating = after_scales([1.0, 4.0, 1.0, 4.0, 1.0])
    assert alternating.observe(3.0, 1.0, True, activations={"blocks.1": 19.0}) is None
    off = after_scales([1.0] * 10, replace(CONFIG, activation_margin=0.0))
    assert off.observe(3.0, 1.0, True, activations={"blocks.1": 99.0}) is None
    assert (
        after_scales([1.0, 10.0, 100.0, 100.0, 100.0]).observe(3.0, 1.0, True, activations={"blocks.1": 101.0}) is None
    )
    assert "is inf" in SpikeDetector(CONFIG).observe(3.0, 1.0, True, activations={"blocks.1": math.inf}).why
    detector = after_scales([1.0] * 10)
    detector.settle()
    assert detector.observe(3.0, 1.0, True, activations={"blocks.1": 99.0}) is None


def test_the_last_step_of_its_kind_needs_no_confirmation():
    detector = detector_after([4.0] * 8)
    assert detector.observe(4.4, 1.0, True, True) is None and detector.bad == 0
    assert detector.observe(4.6, 1.0, True, True).steps == 1


def test_a_drift_is_no_spike_and_a_jump_of_the_same_height_is():
    drift = [4.0 + 0.1 * i for i in range(60)]  # 6 nats in all: the median of 8 lags 0.45 behind
    detector_after(drift)
    detector = detector_after([4.0 + 0.01 * (i % 3) for i in range(12)])
    assert [detector.observe(4.6, 1.0, True) is None for _ in range(2)] == [True, False]


def test_a_fall_is_no_spike_and_hides_none():
    fall = [10 * 0.9**i for i in range(20)]
    detector = detector_after(fall)
    assert [detector.observe(loss, 1.0, True) is None for loss in (4.0, 4.0)] == [True, False]
    detector_after([*fall, *(10 * 0.9**i for i in range(20, 60))])


def test_the_shipped_limits_lie_between_noise_and_random_tokens():
    """The noise is that of model=flash_small with 1024 tokens a step, where random tokens are 3.76 nats worse."""
    detector = SpikeDetector(SHIPPED)
    for loss in statistics.NormalDist(6.3, 0.4).samples(3000, seed=1):
        assert detector.observe(loss, 1.0, True) is None and detector.reasons == []
    assert [detector.observe(6.3 + 3.76, 1.0, True) is None for _ in range(2)] == [True, False]


def test_skipped_updates():
    detector = detector_after([4.0] * 6)
    for _ in range(5):  # not in a row
        assert detector.observe(math.nan, math.nan, False) is None
        assert detector.observe(math.nan, math.inf, False) is None
        assert detector.observe(4.0, 1.0, True) is None
    assert [detector.observe(math.nan, math.nan, False) for _ in range(2)] == [None, None]
    spike = detector.observe(math.nan, math.nan, False)
    assert spike.steps == 3 and spike.why.startswith("3 updates in a row were skipped")


def test_updates_skipped_now_and_then():
    """Every other one: the fifth is more than half of a window of 8."""
    detector = SpikeDetector(replace(CONFIG, max_skipped_share=0.5))
    pattern = [False, True] * 5
    assert [detector.observe(4.0, 1.0, finite) for finite in pattern] == [None] * 10  # 4 of any 8 are not more
    assert detector.observe(4.0, 1.0, False) is None
    spike = detector.observe(4.0, 1.0, False)
    assert spike.steps == 2 and spike.why.startswith("5 of the last 8 updates were skipped")


def test_skipped_updates_go_on_counting_in_another_phase():
    detector = detector_after([4.0] * 6)
    assert [detector.observe(math.nan, math.nan, False) for _ in range(2)] == [None, None]
    detector.settle()
    assert detector.bad == 2 and detector.observe(math.nan, math.nan, False).steps == 3


def test_a_spike_begins_with_the_first_bad_step_whatever_is_wrong_with_it():
    detector = detector_after([4.0] * 6)
    assert detector.observe(math.nan, math.nan, False) is None
    assert detector.observe(9.0, 1.0, True) is None
    assert detector.observe(9.0, 1.0, True).steps == 3


def test_another_phase_is_no_spike_once_the_detector_has_settled():
    """Rows of another length: the loss jumps by a nat, the gradient norm by a factor of 30, and stays."""
    before, after = [4.0, 4.1] * 4, [5.0, 5.1] * 4
    unsettled = detector_after(before)
    assert [unsettled.observe(loss, 30.0, True) for loss in after[:2]][1] is not None
    settled = detector_after(before)
    settled.settle()
    assert [settled.observe(loss, 30.0, True) for loss in after] == [None] * 8 and settled.bad == 0
    assert [settled.observe(9.0, 30.0, True) is None for _ in range(2)] == [True, False]  # and it watches again


def test_a_saved_detector_goes_on_as_if_nothing_had_happened():
    values = [4 + 0.3 * math.sin(7 * i) for i in range(20)] + [9.0, 9.0]
    whole, first = SpikeDetector(CONFIG), SpikeDetector(CONFIG)
    expected = [whole.observe(value, value / 4, True) for value in values]
    got = [first.observe(value, value / 4, True) for value in values[:21]]
    second = SpikeDetector(CONFIG)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [*got, second.observe(9.0, 9 / 4, True)] == expected and expected[-1] is not None


def test_where_to_go_back_to():
    guard = SpikeGuard(CONFIG)
    assert guard.choose([0, 5, 10], first_bad=10) == 5  # the state after step 10 has the first bad update in it
    guard.went_back(seen_at=11, to=5)
    assert guard.choose([0, 5], first_bad=10) == 0  # it was broken already at 5
    guard.went_back(seen_at=11, to=0)
    assert guard.choose([0], first_bad=10) is None  # nor is there an older one
    assert guard.choose([0, 5], first_bad=10) == 5  # which was trained anew
    assert guard.choose([10, 15], first_bad=10) is None


def test_rollbacks_are_bounded_and_forgiven_after_a_calm_stretch():
    guard = SpikeGuard(replace(CONFIG, max_rollbacks=2, calm_steps=10, anticipate="after_spike", anticipation_after=7))
    for seen_at in (20, 22):
        assert not guard.exhausted
        guard.went_back(seen_at, to=18)
    assert guard.exhausted and guard.anticipate_until == 29
    assert [guard.anticipates(step) for step in (18, 28, 29)] == [True, True, False]
    guard.observe(32, 4.0, 1.0, True, 0)
    assert guard.exhausted
    guard.observe(33, 4.0, 1.0, True, 0)
    assert not guard.exhausted and guard.rollbacks == 0


@pytest.mark.parametrize(("anticipate", "expected"), [("always", True), ("never", False)])
def test_anticipation_by_word(anticipate, expected):
    guard = SpikeGuard(replace(CONFIG, anticipate=anticipate))
    guard.went_back(20, 10)
    assert guard.anticipates(0) == guard.anticipates(25) == expected


def test_never_holds_for_a_run_that_went_back_before():
    guard, other = (
        SpikeGuard(replace(CONFIG, anticipate="after_spike")),
        SpikeGuard(replace(CONFIG, anticipate="never")),
    )
    guard.went_back(20, 10)
    other.load_state_dict(guard.state_dict())
    assert guard.anticipates(15) and not other.anticipates(15)


def test_outliers_are_counted_those_of_spikes_too():
    guard = SpikeGuard(CONFIG)
    for step, loss in enumerate([4.0] * 8 + [9.0, 4.0, 9.0, 9.0]):
        guard.observe(step, loss, 1.0, True, 0)
    assert guard.outliers == 3


def test_a_saved_guard_is_the_same_guard():
    guard = SpikeGuard(CONFIG)
    guard.observe(1, 4.0, math.nan, False, 96)
    guard.went_back(20, 10)
    other = SpikeGuard(CONFIG)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict() and (other.skipped, other.first_row) == (1, 96)
    assert other.choose([5, 10], 15) == 5


def test_off_it_counts_skipped_updates_only():
    guard = SpikeGuard(replace(CONFIG, enabled=False))
    assert [guard.observe(i, math.nan, math.nan, False, 0) for i in range(9)] == [None] * 9
    assert guard.skipped == 9


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("snapshot", "tape"),
        ("anticipate", "sometimes"),
        ("patience", 0),
        ("anticipation_steps", 0),
        ("loss_threshold", math.nan),
        ("max_rollbacks", -1),
        ("min_history", 1),
        ("min_history", 65),
        ("severe", 0.5),
        ("max_skipped_share", 0.0),
    ],
)
def test_bad_values_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=f"^guard.{key}="):
        replace(SHIPPED, **{key: value})
