"""Cross-entropy from hidden states without ever holding all logits: gradients are made chunk by chunk in forward."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from v4train.model.config import LOGITS_BYTES
from v4train.model.precision import full, full_dtype
from v4train.model.seams import Vocabulary

WHOLE = Vocabulary()


class TokenLosses(NamedTuple):
    """Of each target: its loss in nats (fp32, 0 where ignored), and whether it is the likeliest token."""

    nats: Tensor
    likeliest: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, vocabulary: Vocabulary) -> Tensor:
        total = full(x.new_zeros(()))
        x_gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # the first chunk writes it
            make = torch.empty_like if len(x) else torch.zeros_like
            weight_gradient = make(weight, dtype=full_dtype(weight))
        x, weight = x.to(dtype), weight.to(dtype)
        rows = max(1, min(x.shape[0], LOGITS_BYTES // (4 * weight.shape[0])))
        buffer = x.new_empty(rows, weight.shape[0])
        for begin in range(0, x.shape[0], rows):
            chunk, target = x[begin : begin + rows], targets[begin : begin + rows]
            logits = full(torch.mm(chunk, weight.mT, out=buffer[: chunk.shape[0]]))
            valid, row = target != -100, target - vocabulary.index * len(weight)
            here = valid & (row >= 0) & (row < len(weight))
            index = torch.where(here, row, 0)[:, None]
            chosen = logits.gather(-1, index)[:, 0]
            top = logits.amax(-1)
            softmax = torch.softmax(logits, -1, out=logits)
            # The largest probability is at least 1/V, so this log-sum-exp is exact
            normaliser = top - softmax.amax(-1).log()
            if vocabulary.count > 1:
                own, normaliser = normaliser, vocabulary.join(normaliser)
                softmax *= torch.exp(own - normaliser)[:, None]
                chosen = vocabulary.reduce(torch.where(here, chosen, 0))
            total += torch.where(valid, normaliser - chosen, 0).sum()
            if x_gradient is None and weight_gradient is None:
                continue
            gradient = softmax.scatter_add_(-1, index, -here.to(softmax.dtype)[:, None]).to(chunk.dtype)
            ignored = ~valid[:, None]
            if x_gradient is not None:
                x_gradient[begin : begin + rows] = (gradient @ weight).masked_fill_(ignored, 0)
            if weight_gradient is not None:
                chunk = chunk.masked_fill(ignored, 0)
                if dtype == weight_gradient.dtype:
                    weight_gradient.addmm_(gradient.mT, chunk, beta=1 if begin else 0)
                elif begin:
                    weight_gradient += gradient.mT @ chunk
                else:
                    weight_gradient.copy_(gradient.mT @ chunk)
        ctx.save_for_backward(x_gradient, weight_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x_gradient, weight_gradient = ctx.saved_tensors
        x_gradient = None if x_gradient is None else x_gradient * gradient  # 0-dim: no rounding of it, no promotion
        weight_gradient = None if weight_gradient is None else weight_gradient * gradient
        return x_gradient, weight_gradient, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Sum of -log softmax(x weight^T)[target] over the targets that are not -100, in nats, fp32.

    Args:
        x: [T, M]; weight: [V, M]; under autocast both are multiplied in its dtype, softmax and sum stay fp32.
        targets: [T] int64, -100 where ignored.
        vocabulary: which rows of the matrix these are; the softmax is over all. The gradient of x is that of these.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if not torch.is_grad_enabled():  # or the function would make gradients of its leaves all the same
        x, weight = x.detach(), weight.detach()
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, dtype, vocabulary)


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary = WHOLE) -> TokenLosses:
    """-log softmax(x weight^T)[target] of each row [T]; arguments as of `linear_cross_entropy`, without gradient."""
    nats, likeliest = full(x.new_zeros(len(x))), torch.zeros_like(targets, dtype=torch.bool)
    rows = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
    for begin in range(0, len(x), rows):
        logits, target = full(x[begin : begin + rows] @ weight.mT), targets[begin : begin + rows]
        valid, row = target != -100, target - vocabulary.index * len(weight)
        here = valid & (row >= 0) & (row < len(weight))
        chosen = logits.gather(-1, torch.where(here, row, 0)[:, None])[:, 0]
        chosen = vocabulary.reduce(torch.where(here, chosen, 0))
        normaliser = vocabulary.join(logits.logsumexp(-1))
        top = vocabulary.gather(logits.amax(-1, keepdim=True)).amax(-1)
        nats[begin : begin + rows] = torch.where(valid, normaliser - chosen, 0)
        likeliest[begin : begin + rows] = valid & (chosen >= top)
    return TokenLosses(nats, likeliest)
