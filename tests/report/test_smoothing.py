import math

import numpy as np
import pytest

from v4train.report.smoothing import smooth


@pytest.mark.parametrize("time_constant", [0, 0.5, 7.0])
def test_smoothing_is_a_weighted_mean_around_each_value(time_constant):
    values = np.random.default_rng(0).normal(size=40)
    decay = math.exp(-1 / time_constant) if time_constant else 0.0
    positions = np.arange(len(values))
    expected = [np.average(values, weights=decay ** np.abs(positions - t)) for t in positions]
    np.testing.assert_allclose(smooth(values, time_constant), expected, rtol=1e-12)


def test_no_values_stay_none():
    assert smooth(np.zeros(0), 3.0).shape == (0,)
