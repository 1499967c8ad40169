"""Which source a row comes from: exact shares, phases, sources that are dry, and errors."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4train.data.mixture import Mixture
from v4train.errors import ConfigError

NAMES = ["web", "code", "notes"]


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any),
    st.integers(0, 10**12),
    st.integers(1, 2000),
    st.sampled_from([1, 2, 4, 16]),
)
def test_shares_are_exact_to_a_few_rows(weights, first, count, lanes):
    """Also of one lane's rows."""
    mixture = Mixture(NAMES, dict(zip(NAMES, weights, strict=True)))
    found = Counter(mixture.choose(first + i * lanes, 0) for i in range(count))
    for name, weight in zip(NAMES, weights, strict=True):
        assert abs(found[name] - count * weight / sum(weights)) < 8
        assert weight or not found[name]


def test_without_weights_all_are_alike():
    mixture = Mixture(NAMES, None)
    found = Counter(mixture.choose(i, 0) for i in range(3000))
    assert all(abs(found[name] - 1000) < 4 for name in NAMES)
    assert [mixture.choose(i, 0) for i in range(7)] == [Mixture(NAMES, None).choose(i, 9**9) for i in range(7)]


def test_weights_change_at_from_tokens():
    phases = [{"from_tokens": 0, "web": 1}, {"from_tokens": 1000, "code": 2}, {"from_tokens": 1500, "notes": 0.1}]
    mixture = Mixture(NAMES, phases)
    places = [(0, "web"), (999, "web"), (1000, "code"), (1499, "code"), (1500, "notes"), (10**12, "notes")]
    for tokens, name in places:
        assert {mixture.choose(number, tokens) for number in range(50)} == {name}
    assert phases[0] == {"from_tokens": 0, "web": 1}  # left as they were


def test_dry_sources_give_their_rows_to_the_others():
    mixture = Mixture(NAMES, {"web": 2, "code": 1, "notes": 1})
    found = Counter(mixture.choose(i, 0, frozenset(["web"])) for i in range(1000))
    assert found["web"] == 0 and abs(found["code"] - 500) < 4
    assert mixture.choose(0, 0, frozenset(NAMES)) is None
    assert Mixture(NAMES, {"web": 1}).choose(0, 0, frozenset(["web"])) is None  # the others have no weight


def test_every_point_belongs_to_a_source():
    mixture = Mixture(NAMES, {"web": 0.1, "code": 0.2, "notes": 0})
    inverse = pow(0x9E3779B97F4A7C15, -1, 1 << 64)
    for point in (0, 1, (1 << 64) - 1, 1 << 63):  # the last ones round to 1.0
        number = (point - (1 << 63)) * inverse % (1 << 64)
        assert mixture.choose(number, 0) == ("web" if point < 2 else "code")


@pytest.mark.parametrize(
    "weights, value",
    [
        ({"books": 1}, "books"),
        ({"web": -1}, "web=-1"),
        ({"web": "much"}, "web=much"),
        ({"web": True}, "web=True"),
        ({"web": float("nan")}, "web=nan"),
        ({"web": float("inf")}, "web=inf"),
        ({"web": 0}, "{'web': 0}"),
        ({}, "{}"),
        ([], "[]"),
        ("web", "web"),
        (3, "3"),
        ([{"web": 1}], "{'web': 1}"),
        (["web"], "web"),
        ([{"from_tokens": 5, "web": 1}], "from_tokens=5"),
        ([{"from_tokens": 0, "web": 1}, {"from_tokens": 0, "code": 1}], "from_tokens=0"),
        ([{"from_tokens": 0, "web": 1}, {"from_tokens": 1.5, "code": 1}], "from_tokens=1.5"),
    ],
)
def test_weights_that_break_a_rule(weights, value):
    with pytest.raises(ConfigError) as error:
        Mixture(NAMES, weights)
    assert error.value.key == "data.weights" and error.value.value == value
    assert error.value.rule and error.value.remedy and "\n" not in str(error.value)
