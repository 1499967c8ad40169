"""Which source a row comes from: a function of the row's number and the weights that hold there."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from v4train.errors import ConfigError

GOLDEN, RANGE = 0x9E3779B97F4A7C15, 1 << 64  # 2^64 over the golden ratio: its multiples spread most evenly


class Mixture:
    """Weights of the sources, by tokens trained on.

    Row n takes the point n / golden ratio modulo 1, which lies in one source's share of [0, 1). Among any N rows, in a
    row or every L-th one, each source has its share to within a few rows.
    """

    def __init__(self, sources: Sequence[str], weights: Any) -> None:
        """
        Args:
            weights: null (all alike), {source: weight}, or a list of such, each with `from_tokens`, the first one's 0.
                Weights are relative; a source that isn't named has none.

        Raises:
            ConfigError: data.weights.
        """
        self.sources = list(sources)
        self._starts, self._shares = [], []
        if weights is None:
            weights = dict.fromkeys(sources, 1.0)
        if isinstance(weights, Mapping):
            weights = [{"from_tokens": 0, **weights}]
        if not isinstance(weights, list) or not weights:
            rule = "a weight for each source, or a list of such"
            raise ConfigError("data.weights", weights, rule, "for example {web: 0.9, code: 0.1}, or null: all alike")
        for phase in weights:
            if not isinstance(phase, Mapping) or "from_tokens" not in phase:
                rule = "each of several weights says from which token on they hold"
                raise ConfigError("data.weights", phase, rule, "for example [{from_tokens: 0, web: 0.9, code: 0.1}]")
            self._add(dict(phase))

    def _add(self, weights: dict[str, Any]) -> None:
        start = weights.pop("from_tokens")
        first = not self._starts
        if type(start) is not int or (start != 0 if first else start <= self._starts[-1]):
            rule = "they begin at 0 and hold from ever later tokens on"
            raise ConfigError(
                "data.weights", f"from_tokens={start}", rule, "order them by from_tokens, the first one 0"
            )
        for name, weight in weights.items():
            if name not in self.sources:
                raise ConfigError("data.weights", name, "no such source", f"one of {', '.join(self.sources)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise ConfigError("data.weights", f"{name}={weight}", "a weight is a number from 0 on", "for example 1")
        if not sum(weights.values()) > 0:
            raise ConfigError("data.weights", weights, "all weights are 0", "give a source one above 0")
        self._starts.append(start)
        self._shares.append([float(weights.get(name, 0)) for name in self.sources])

    def choose(self, number: int, tokens: int, dry: frozenset[str] = frozenset()) -> str | None:
        """The source of row `number`, before which `tokens` tokens were trained on; None where all are dry."""
        shares = self._shares[bisect_right(self._starts, tokens) - 1]
        shares = [0.0 if name in dry else share for name, share in zip(self.sources, shares, strict=True)]
        ends = list(accumulate(shares))
        if not ends[-1] > 0:
            return None
        point = (number * GOLDEN + RANGE // 2) % RANGE / RANGE * ends[-1]
        return self.sources[min(bisect_right(ends, point), max(i for i, share in enumerate(shares) if share))]
