"""Recall by distance: how often a model's likeliest token is the value that it was told so many tokens before."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v4train.data import Batch
from v4train.data.loader import stack_rows
from v4train.data.recall import RecallRow, RecallTask
from v4train.data.validation import padding_row
from v4train.evaluation.scores import Scorer


def recall_batches(
    task: RecallTask, rows: int, batch_size: int, rank: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Batch, Tensor]]:
    """This rank's rows, and the distances [B, S] of their recalled targets; row i is rank i % ranks's.

    Every rank gets the same number of batches, filled up with padding, since a forward may hold collectives.
    """
    number, ranks = rank
    padding = padding_row(task.length, task.tokenizer.pad_id)
    empty = RecallRow(padding, np.zeros(task.length, np.int64))
    for first in range(number, -(-rows // ranks) * ranks, batch_size * ranks):
        numbers = range(first, first + batch_size * ranks, ranks)
        made = [task.row(own) if own < rows else empty for own in numbers]
        yield stack_rows(one.row for one in made), torch.from_numpy(np.stack([one.distances for one in made]))


def recall_sums(
    task: RecallTask, scores_of: Scorer, rows: int, batch_size: int, rank: tuple[int, int] = (0, 1)
) -> Tensor:
    """Sums of this rank's recalled targets by distance, float64 [distances, 3]: right ones, nats, targets."""
    sums = torch.zeros(len(task.config.distances), 3, dtype=torch.float64)
    for batch, distances in recall_batches(task, rows, batch_size, rank):
        scores = scores_of(batch)
        for own, distance in zip(sums, task.config.distances, strict=True):
            here = (distances == distance) & scores.counted
            own += torch.stack([scores.likeliest[here].sum(), scores.nats[here].double().sum(), here.sum()]).double()
    return sums


def recall_figures(sums: Tensor, task: RecallTask) -> list[dict[str, Any]]:
    """What the sums of all ranks say, in plain values, by distance; `chance` is a guess among the values."""
    figures = []
    for distance, (right, nats, targets) in zip(task.config.distances, sums.tolist(), strict=True):
        means = {"accuracy": right / targets, "loss": nats / targets} if targets else {"accuracy": None, "loss": None}
        figures.append({"distance": distance, **means, "pairs": int(targets), "chance": 1 / task.config.values})
    return figures
