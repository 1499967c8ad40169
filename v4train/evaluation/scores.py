"""The losses of every target of a batch, from which all that is measured on our own rows is summed up."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from v4train.data import Batch
from v4train.data.packing import IGNORED_TARGET
from v4train.model import Transformer


class Scores(NamedTuple):
    """[B, S] each, of the targets of whole rows: loss in nats, whether it is the likeliest token, and which of them are
    this rank's to count (none where a target is -100)."""

    nats: Tensor
    likeliest: Tensor
    counted: Tensor


Scorer = Callable[[Batch], Scores]


def scorer(model: Transformer, device: torch.device | str) -> Scorer:
    """Of a whole model in this process, in eval mode."""

    @torch.no_grad()
    def scores(batch: Batch) -> Scores:
        batch = batch.shard(0, 1, torch.device(device))
        with model.losses.each_token() as found:
            model(batch.input_ids, batch.document_ids, batch.targets)
        return Scores(*(values.cpu() for values in found[0]), batch.targets.cpu() != IGNORED_TARGET)

    return scores
