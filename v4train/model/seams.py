"""Where the maths of a model needs other ranks: small objects whose default is one process (DESIGN, the map).

A module that may need them has `seams = Seams()`; `v4train.parallel` puts others in their place, so that no attention
or MoE code exists twice. What flows through an operation that other ranks take part in has the gradient of the mean of
all ranks' losses: that is what data parallelism makes of the gradients of each.

Shapes: B batch, S tokens at hand, T tokens, M hidden, K experts a token.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Sequence:
    """The tokens at hand are all of each row, or one of `count` shards of it, all as long (context parallelism)."""

    count = 1

    def begin(self, length: int) -> int:
        """Tokens of the row in the shards before this one, which has `length`."""
        return 0

    def whole(self, document_ids: Tensor) -> Tensor:
        """Documents of the whole row, from those at hand [B, S]."""
        return document_ids

    def before(self, x: Tensor, count: int | None, dim: int) -> Tensor:
        """x with tokens of earlier shards in front along `dim`: `count`, or as many as there are; None is all."""
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """x of all shards, one after another along `dim`; x has the same shape on each."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum over the shards."""
        return x


class Heads:
    """Heads and inner channels at hand are all there are, or a share of them (tensor parallelism)."""

    index, count = 0, 1  # which share of how many

    def copy(self, x: Tensor) -> Tensor:
        """What every share reads: its gradient is the sum of theirs."""
        return x

    def reduce(self, x: Tensor) -> Tensor:
        """Sum of what each share gives; the gradient of the sum is everyone's."""
        return x


class Vocabulary(Heads):
    """Rows of the embedding and of the output matrix at hand are all there are, or a share of them."""

    def join(self, log_sum_exp: Tensor) -> Tensor:
        """log of the sum over the shares of exp(.), without gradient."""
        return log_sum_exp

    def gather(self, logits: Tensor) -> Tensor:
        """Logits of all shares along the last dimension, without gradient."""
        return logits


class Rows(NamedTuple):
    """What the experts at hand compute: sum_k weights[t, k] E_chosen[t, k](x[t])."""

    x: Tensor  # [T, M]
    chosen: Tensor  # [T, K] int64, numbers of experts at hand
    weights: Tensor  # [T, K]


class Dispatched:
    """Rows on their way to the experts at hand, and back."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def arrived(self) -> Rows:
        """Rows for the experts at hand, when they are here: what was computed meanwhile has overlapped with that."""
        return self.rows

    def back(self, results: Tensor) -> Tensor:
        """Results of those rows, summed for the tokens [T, M] that were dispatched here."""
        return results


class Experts:
    """The experts at hand are all there are, or a share of them (expert parallelism)."""

    def dispatch(self, rows: Rows, num_experts: int) -> Dispatched:
        """Send rows that chose among all `num_experts` to where these are."""
        return Dispatched(rows)


@dataclass
class Seams:
    """All of them."""

    sequence: Sequence = field(default_factory=Sequence)
    heads: Heads = field(default_factory=Heads)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    experts: Experts = field(default_factory=Experts)


def put_seams(model: torch.nn.Module, seams: Seams) -> None:
    """Let all modules of a model use these seams."""
    for module in model.modules():
        if hasattr(type(module), "seams"):
            module.seams = seams
