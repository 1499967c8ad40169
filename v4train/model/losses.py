"""Losses that arise inside a model, and how they reach the log and the gradients (DESIGN 5, 7).

Router balance and indexer KL arise in the middle of the network. Each is attached to the activation that passes by:
the forward value is unchanged, and backward adds the loss's own gradient, multiplied by `scale`. Nothing between
there and the main loss (recomputation, a pipeline) needs to know of it.

Where the indexers learn alone (`Losses.indexers_only`) nothing passes by that could carry a gradient: their losses are
added to the main loss itself.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from v4train.model.cross_entropy import TokenLosses


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (loss,) = ctx.saved_tensors
        return gradient, torch.full_like(loss, ctx.scale), None


class Recorded(NamedTuple):
    """What forward passes recorded: a value's mean is its sum over its count, a share the ratio of its two sums."""

    sums: dict[str, Tensor]
    counts: dict[str, int]
    shares: dict[str, tuple[Tensor, Tensor]]


class Losses:
    """Loss values of one model's forward pass, and the normalisation that the trainer gives them.

    Attributes:
        scale: multiplies the gradient of attached losses. 1 for a plain `loss.backward()`; with an engine that
            divides the main loss by the accumulation steps, their inverse.
        denominators: count that a loss named so is divided by (see `Transformer.count`). A name that is absent is
            divided by the micro-batch's own count. With D data ranks and A accumulation steps whose gradients are
            averaged, global count / (D * A) makes the average the mean over the global batch.
        mtp_weight, balance_weight: of these losses in the objective; a schedule may change them between steps.
        shares: (part, whole) of each recorded share as last collected, for sums over ranks and micro-batches.
    """

    def __init__(self, mtp_weight: float = 0.0, balance_weight: float = 0.0) -> None:
        self.mtp_weight, self.balance_weight = mtp_weight, balance_weight
        self.scale: float = 1.0
        self.denominators: dict[str, Tensor | float] = {}
        self.shares: dict[str, tuple[Tensor, Tensor]] = {}
        self.tokens: list[TokenLosses] | None = None  # a list inside `each_token`
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._shares: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._silent = False
        self._direct: list[Tensor] | None = None  # a list inside `indexers_only`

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, nothing is recorded or counted, even in training mode: generation."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    @contextmanager
    def each_token(self) -> Iterator[list[TokenLosses]]:
        """Inside, the head also keeps the loss of every target [B, S], in the list that this gives: evaluation."""
        self.tokens = []
        try:
            yield self.tokens
        finally:
            self.tokens = None

    @contextmanager
    def indexers_only(self) -> Iterator[None]:
        """Inside, no gradient is recorded but in `for_indexer`, and `attach` keeps its loss for `with_direct`.

        Activation checkpointing does nothing where gradients are off, so it needs no care: nothing but the indexers'
        own part is kept for backward, and nothing is recomputed.
        """
        self._direct = [] if torch.is_grad_enabled() else None
        try:
            with torch.no_grad():
                yield
        finally:
            self._direct = None

    @contextmanager
    def for_indexer(self) -> Iterator[bool]:
        """The part of an attention that its indexer learns through; True if it learns alone."""
        alone = self._direct is not None
        with torch.set_grad_enabled(alone or torch.is_grad_enabled()):
            yield alone

    def with_direct(self, loss: Tensor) -> Tensor:
        """`loss`, which has no gradient inside `indexers_only`, with that of the losses kept; its value stays."""
        if not self._direct:
            return loss
        with torch.enable_grad():
            total = torch.stack(self._direct).sum()
            return loss + (total - total.detach())

    def mean(self, name: str, total: Tensor, count: Tensor) -> Tensor:
        """`total` over the trainer's denominator for `name`, or over `count` (at least 1)."""
        return total / self.denominators.get(name, count.clamp(min=1))

    @property
    def recording(self) -> bool:
        """False inside backward, where activation checkpointing recomputes what forward has recorded, and if silent."""
        return not self._silent and not in_backward()

    def record(self, name: str, value: Tensor) -> None:
        """Keep a value for the log. Values recorded several times (once a layer) are averaged."""
        if self.recording:
            self._values[name].append(value)

    def last(self, name: str) -> Tensor:
        """The value last recorded, with its gradient."""
        return self._values[name][-1]

    def record_share(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Keep part / whole for the log. Recorded several times it is the ratio of the sums."""
        if self.recording:
            self._shares[name].append((part.detach(), whole.detach()))

    def attach(self, activation: Tensor, name: str, value: Tensor, weight: float) -> Tensor:
        """`activation`, whose backward also trains `weight * value`; the unweighted value is recorded."""
        self.record(name, value.detach())
        if self._direct is not None:  # the engine divides what goes through the main loss: no `scale`
            self._direct += [weight * value] if value.requires_grad else []
            return activation.detach()
        return _Attach.apply(activation, weight * value, self.scale)

    def collect(self) -> dict[str, Tensor]:
        """Recorded values, each averaged over its layers, and shares; forgets them but for `shares`."""
        sums, counts, self.shares = self.take()
        values = {name: total / counts[name] for name, total in sums.items()}
        return values | {name: share(*pair) for name, pair in self.shares.items()}

    def take(self) -> Recorded:
        """All that was recorded since the last call, and forget it."""
        sums = {name: torch.stack(values).sum() for name, values in self._values.items()}
        counts = {name: len(values) for name, values in self._values.items()}
        shares = {name: tuple(map(sum, zip(*pairs, strict=True))) for name, pairs in self._shares.items()}
        self._values.clear()
        self._shares.clear()
        return Recorded(sums, counts, shares)


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: a forward pass that runs now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def share(part: Tensor | float, whole: Tensor | float) -> Tensor:
    """part / whole; 1 where there is nothing to have a part of, or less by rounding."""
    part, whole = torch.as_tensor(part), torch.as_tensor(whole)
    return torch.where(whole <= 0, 1.0, part / whole)
