"""Which parts of a model are on which pipeline stage: runs of consecutive ones, as equal in FLOPs as can be."""

import itertools
from collections.abc import Sequence
from functools import lru_cache

from v4train.analysis.flops import part_flops
from v4train.model.config import ModelConfig


def stage_bounds(config: ModelConfig, sequence_length: int, count: int) -> list[int]:
    """First unit of each of `count` stages, and one past the last.

    A unit is a part of `Transformer.parts`: embedding, blocks, head; MTP, which calls the head, is one unit with it.
    """
    flops = part_flops(config, sequence_length)
    together = config.num_layers + 1
    return balanced([*flops[:together], sum(flops[together:])], count)


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Bounds of `count` runs of consecutive costs, none empty, whose dearest is as cheap as can be."""
    return list(_balanced(tuple(costs), count))


@lru_cache(maxsize=64)
def _balanced(costs: tuple[float, ...], count: int) -> tuple[int, ...]:
    sums = {(a, b): sum(costs[a:b]) for a, b in itertools.combinations(range(len(costs) + 1), 2)}
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, (0,))}]
    for run in range(1, count + 1):
        before, here = best[-1], {}
        for stop in range(run, len(costs) + 1):
            choices = (
                (max(before[start][0], sums[start, stop]), (*before[start][1], stop))
                for start in range(run - 1, stop)
                if start in before
            )
            here[stop] = min(choices)
        best.append(here)
    return best[count][len(costs)][1]
