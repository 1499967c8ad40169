"""A smooth line through noisy values."""

import numpy as np

SMOOTHING_SHARE = 0.01  # of the run's steps: the time constant of the smoothed curve


def smooth(values: np.ndarray, time_constant: float) -> np.ndarray:
    """Centred exponential mean y_t = sum_i d^|t-i| x_i / sum_i d^|t-i|, which has no lag, unlike a running mean.

    Args:
        values: [n], float.
        time_constant: steps; d = exp(-1 / time_constant). 0 returns the values.
    """
    decay = np.exp(-1 / time_constant) if time_constant > 0 else 0.0
    table = np.stack([values, np.ones(len(values))])  # the sums above and below the line, together
    past, future = table.copy(), table.copy()
    for i in range(1, len(values)):
        past[:, i] += decay * past[:, i - 1]
        future[:, -1 - i] += decay * future[:, -i]
    above, below = past + future - table
    return above / below
