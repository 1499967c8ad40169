"""Activation checkpointing: what backward computes again instead of keeping it.

`block`: a whole block, so that only its input streams stay alive between forward and backward. `attention`: the
attention sub-layer (norm and attention), for less memory at less recomputation. Results are those of `none`, to the
last bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RECOMPUTE_LEVELS = ("none", "block", "attention")


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, of which only the inputs are kept; backward calls it again.

    What it records for the log is recorded once: `Losses.recording` is False inside backward.
    """
    return checkpoint(
        lambda *again: _RecomputeFirst.apply(function(*again)),
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
