"""Learning rates in closed form."""

import math

import pytest

from tests.schedules import learning_rate
from tests.shipped import shipped
from v4train.errors import ConfigError
from v4train.optim.schedules import ScheduleConfig, decayed

V4 = {"learning_rate": 2.7e-4, "final_ratio": 0.1, "warmup_steps": 20, "decay_fraction": 0.25}


def schedule(**overrides):
    """The shipped YAML with some values changed."""
    return ScheduleConfig(**(shipped("schedule", "cosine") | {"learning_rate": 1.0} | overrides))


def test_the_three_parts_in_closed_form():
    config = schedule(**V4)
    rates = [learning_rate(step, 200, config) for step in range(200)]
    assert rates[:20] == pytest.approx([2.7e-4 * (i + 1) / 20 for i in range(20)])
    assert rates[20:150] == pytest.approx([2.7e-4] * 130)
    expected = [2.7e-5 + (2.7e-4 - 2.7e-5) * (1 + math.cos(math.pi * i / 50)) / 2 for i in range(1, 51)]
    assert rates[150:] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(2.7e-5)
    assert learning_rate(1000, 200, config) == pytest.approx(2.7e-5)


def test_linear_decay():
    config = schedule(**V4, kind="linear")
    assert learning_rate(174, 200, config) == pytest.approx((2.7e-4 + 2.7e-5) / 2)
    assert learning_rate(199, 200, config) == pytest.approx(2.7e-5)


def test_decay_by_the_square_root():
    config = schedule(**V4, kind="sqrt")
    assert learning_rate(161, 200, config) == pytest.approx(2.7e-5 + 0.9 * 2.7e-4 * (1 - math.sqrt(12 / 50)))
    assert learning_rate(199, 200, config) == pytest.approx(2.7e-5)


def test_decay_by_tokens_takes_whole_last_steps():
    config = schedule(decay_fraction=0.25)
    assert decayed(750, 1010, 20, config) == 0.0  # 13 steps of 20: 260 tokens
    assert decayed(880, 1010, 20, config) == pytest.approx(0.5)
    assert decayed(1010, 1010, 20, config) == 1.0


def test_warmup_as_a_share_of_the_run():
    config = schedule(**V4 | {"warmup_steps": None}, warmup_fraction=0.1)
    assert learning_rate(9, 200, config) == pytest.approx(2.7e-4 / 2)
    assert learning_rate(19, 200, config) == pytest.approx(2.7e-4)


def test_without_warmup_and_decay():
    config = schedule(learning_rate=1.0, warmup_steps=0, decay_fraction=0.0)
    assert [learning_rate(step, 5, config) for step in range(7)] == [1.0] * 7


def test_short_runs_multiply_both_factors():
    config = schedule(learning_rate=1.0, final_ratio=0.0, warmup_steps=4, decay_fraction=1.0, kind="linear")
    assert [learning_rate(step, 2, config) for step in range(2)] == pytest.approx([0.25 * 0.5, 0.0])
    assert learning_rate(0, 1, schedule(min_warmup_steps=0)) == 1.0  # both shares round to no step at all


def test_a_share_of_a_short_run_is_no_less_than_the_minimum():
    config = schedule(warmup_fraction=0.1, min_warmup_steps=8, decay_fraction=0.0)
    assert [learning_rate(step, 20, config) for step in (0, 7, 8)] == pytest.approx([1 / 8, 1.0, 1.0])
    assert learning_rate(7, 200, config) == pytest.approx(8 / 20)


@pytest.mark.parametrize(
    "override",
    [
        {"kind": "step"},
        {"final_ratio": 1.5},
        {"warmup_fraction": -0.1},
        {"decay_fraction": 30},
        {"warmup_steps": -1},
        {"min_warmup_steps": -1},
        {"mtp_weight_in_decay": -0.1},
    ],
)
def test_bad_values_are_refused(override):
    with pytest.raises(ConfigError, match=f"schedule.{next(iter(override))}="):
        schedule(**override)
