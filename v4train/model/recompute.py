"""Activation checkpointing: what backward computes again instead of keeping it.

`block`: a whole block, so that only its input streams stay alive between forward and backward. `attention`: the
attention sub-layer (norm and attention), for less memory at less recomputation. Whatever the level, `forget` is for
single tensors that are cheap to compute again, once they are large. Results are those of keeping everything, to the
last bit (with `compile=true` up to rounding, because what was forgotten comes back from the code that isn't compiled).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from v4train.model.config import FORGET_FROM


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


def memory_counts(hidden: Tensor) -> bool:
    """Whether hidden states [B, S, M] are so many that memory counts for more than time."""
    return hidden.numel() >= FORGET_FROM


def forget(*tensors: Tensor, again: Callable[..., None], needed_by: Tensor, inside: nn.Module, hidden: Tensor) -> None:
    """Free the memory of `tensors` until backward comes to what made `needed_by`, and then let `again` fill it.

    Where memory counts, in training only, and not where somebody else has a hand in it: a checkpoint around, or hooks
    that may have handed the tensors out (ZeRO 3's, a profiler's, a user's).

    Args:
        tensors: nothing reads them any more but the backward of operations up to `needed_by`, through it.
        again: writes the same values into tensors that it is given, from what is kept anyhow.
        needed_by: the last result that backward needs them for.
        inside: the module within which modules see them.
        hidden: its input or output [B, S, M], which says how much memory this is about.
    """
    if not memory_counts(hidden) or not (inside.training and needed_by.requires_grad):
        return
    if not (_in_checkpoint() or _watched(inside)):
        needed_by.register_hook(_Refill(tensors, again))


class _Refill:
    """A tensor's hook: works once, and then holds nothing that would outlive the backward pass."""

    def __init__(self, tensors: Sequence[Tensor], again: Callable[..., None]) -> None:
        # `.data`, because filling it again is no modification that autograd should see
        self.again, self.tensors = again, [tensor.data for tensor in tensors]
        self.sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)

    def __call__(self, gradient: Tensor) -> None:
        if self.again is None:
            return
        with torch.no_grad():
            for tensor, size in zip(self.tensors, self.sizes, strict=True):
                tensor.untyped_storage().resize_(size)
            self.again(*self.tensors)
        self.tensors = self.again = None


def passes_on(hook: Callable) -> Callable:
    """Marks a hook of a module that keeps and hands out nothing: `forget` need not heed it."""
    hook.passes_on = True
    return hook


def _in_checkpoint() -> bool:
    """Whether others decide how tensors are saved: torch's checkpoint in both of its passes, `save_on_cpu`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _watched(module: nn.Module) -> bool:
    globally = torch.nn.modules.module
    hooks = [globally._global_forward_hooks, globally._global_forward_pre_hooks]
    hooks += [of for part in module.modules() for of in (part._forward_hooks, part._forward_pre_hooks) if of]
    return any(not getattr(hook, "passes_on", False) for of in hooks for hook in of.values())
