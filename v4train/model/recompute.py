"""Activation checkpointing: what backward computes again instead of keeping it.

`block`: a whole block, so that only its input streams stay alive between forward and backward. `attention`: the
attention sub-layer (norm and attention), for less memory at less recomputation. Whatever the level, `forget` is for
single tensors that are all but free to compute again. Results are those of keeping everything, to the last bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RECOMPUTE_LEVELS = ("none", "block", "attention")


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, of which only the inputs are kept; backward calls it again.

    What it records for the log is recorded once: `Losses.recording` is False inside backward.
    """

    def whole(*again: Tensor) -> Tensor:
        with _nothing_forgotten():
            return _RecomputeFirst.apply(function(*again))

    return checkpoint(
        whole,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in the model draws random numbers
        early_stop=False,  # it would leave modules by an exception, without the hooks that ZeRO 3 frees parameters in
    )


class _RecomputeFirst(torch.autograd.Function):
    """Identity whose backward asks for a saved tensor, which makes `checkpoint` recompute now and not in a node inside.

    There ZeRO 3 (deepspeed 0.19.8) has already gathered the parameters for the backward pass of the first module, and
    recomputing that module would free them again: "The size of tensor a (0) must match".
    """

    @staticmethod
    def forward(ctx, output: Tensor) -> Tensor:
        ctx.save_for_backward(output.new_empty(0))
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        ctx.saved_tensors  # noqa: B018
        return gradient


def forget(*tensors: Tensor, again: Callable[[], Sequence[Tensor]], needed_by: Tensor) -> None:
    """Free the memory of `tensors` until backward comes to what made `needed_by`, and then fill it from `again()`.

    Args:
        tensors: owners of their memory, which nothing reads any more but the backward of operations up to `needed_by`.
        again: the same values, from tensors that are kept anyhow. Parameters it reads through modules alone, which ZeRO
            3 gathers.
        needed_by: the last result that backward needs them for.
    """
    if needed_by.requires_grad and not _keeping:
        needed_by.register_hook(_Refill(tensors, again))


class _Refill:
    """A tensor's hook: works once, and then holds nothing that would outlive the backward pass."""

    def __init__(self, tensors: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]) -> None:
        self.again = again
        self.freed = [(storage, storage.nbytes()) for storage in (tensor.untyped_storage() for tensor in tensors)]
        for storage, _ in self.freed:
            storage.resize_(0)

    def __call__(self, gradient: Tensor) -> None:
        if self.again is None:
            return
        with torch.no_grad():
            for (storage, size), value in zip(self.freed, self.again(), strict=True):
                storage.resize_(size)
                storage.copy_(value.untyped_storage())
        self.freed = self.again = None


_keeping = False


@contextmanager
def _nothing_forgotten() -> Iterator[None]:
    """Inside a recomputed function: it keeps nothing in its first run, and needs all at once in its second."""
    global _keeping
    before, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = before
