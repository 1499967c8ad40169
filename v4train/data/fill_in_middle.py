"""Fill-in-middle: some documents are told out of order, so that a model learns to insert (arXiv 2207.14255).

Prefix, suffix, middle: BOS begin P hole S end M EOS; DeepSeek-V3 does it to a tenth. A document is cut between tokens,
at two places drawn from where it lies in the data, so that shards serve any rate.
"""

from collections.abc import Sequence

import numpy as np

from v4train.data.packing import Window, raw_numbers

_DRAW = 3  # sets these numbers apart from others of a window


class FillInMiddle:
    """A window, each of its documents rearranged with probability `rate`."""

    def __init__(self, window: Window, rate: float, ids: Sequence[int], seed: int) -> None:
        """`ids`: of begin, hole and end. Documents are BOS + body + EOS."""
        self.key, self._window, self._ids = window.key, window, ids
        draws = raw_numbers(3 * len(window.lengths), seed, *window.key, _DRAW).reshape(-1, 3) / 2**64
        self._chosen = draws[:, 0] < rate
        body = window.lengths - 2
        self._cuts = np.sort(np.floor(draws[:, 1:] * (body[:, None] + 1)).astype(np.int64), axis=1)
        self.lengths = window.lengths + len(ids) * self._chosen

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        if not self._chosen[document]:
            return self._window.tokens(document, start, stop)
        (begin, hole, end), last = self._ids, int(self._window.lengths[document]) - 1
        first, second = (1 + self._cuts[document]).tolist()
        parts = [(0, 1), begin, (1, first), hole, (second, last), end, (first, second), (last, last + 1)]
        found, at = [np.zeros(0, np.int64)], 0
        for part in parts:  # of a long document no more is read than asked for
            low, high = part if isinstance(part, tuple) else (0, 1)
            own = max(low, low + start - at), min(high, low + stop - at)
            if own[0] < own[1]:
                found.append(self._window.tokens(document, *own) if isinstance(part, tuple) else [part])
            at += high - low
        return np.concatenate(found)
