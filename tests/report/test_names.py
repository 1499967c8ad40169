import pytest

from v4train.report.names import LONGEST, short_names

TAIL = "train.max_steps=100000_train.validation_tokens=96"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["flash_small"], ["small"]),
        (["low", "high"], ["low", "high"]),
        (["a", "a_b"], ["a", "a_b"]),
        (["a_b_c", "a_c"], ["b_c", "c"]),
        ([f"flash_small_seed={n}_{TAIL}" for n in (1, 2)], ["seed=1", "seed=2"]),
        (["x_max_steps=10", "x_max_steps=20"], ["steps=10", "steps=20"]),
        (["same_name", "same_name"], ["name", "name"]),
        ([], []),
    ],
)
def test_what_all_share_at_either_end_goes(names, short):
    assert short_names(names) == short


def test_a_long_difference_keeps_both_of_its_ends():
    """Each differs from another one only at its start, or only at its end."""
    names = [f"m_seed={seed}_{'x' * 60}_lr={rate}_{TAIL}" for seed in (1, 2) for rate in (3, 4)]
    short = short_names(names)
    assert len(set(short)) == 4 and all(len(name) == LONGEST for name in short)
    assert short[0].startswith("seed=1_xx") and short[0].endswith("xx_lr=3")
