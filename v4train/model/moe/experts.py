"""Routed experts as stacked matrices, multiplied by `grouped_mm` over tokens sorted by expert; no loop over experts.

Shapes: T tokens, K experts per token, E experts, M hidden, I inner width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.config import ModelConfig
from v4train.model.ffn import ACTIVATIONS


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of each group times its own matrix: x [R, in] sorted by group, weight [E, out, in] -> [R, out].

    `ends` [E] int32 is one past each group's last row. Inner sizes are padded with zeros to the 16 bytes that
    `grouped_mm` wants of every stride, and fp64 (for tests), which it lacks, goes by one product a group (torch 2.13).
    """
    if x.dtype == torch.float64:
        rows = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(part, matrix) for part, matrix in zip(x.split(rows), weight, strict=True)])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    outputs, unit = weight.shape[1], 16 // x.element_size()
    pad_in, pad_out = -weight.shape[2] % unit, -outputs % unit
    if pad_in or pad_out:
        x, weight = F.pad(x, (0, pad_in)), F.pad(weight, (0, pad_in, 0, pad_out))
    return F.grouped_mm(x, weight.mT, offs=ends)[:, :outputs]


class _Dispatch(torch.autograd.Function):
    """Row x[order // K] for each (token, expert) pair; backward sums a token's K rows by the inverse order."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = order.numel() // x.shape[0]
        return x[order // ctx.top_k]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inverse,) = ctx.saved_tensors
        return gradient[inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _Unsort(torch.autograd.Function):
    """Rows back in (token, expert) order: x[inverse], whose backward is gradient[order]."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[inverse]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (order,) = ctx.saved_tensors
        return gradient[order], None, None


class Experts(nn.Module):
    """E SwiGLU experts: gate_up [E, 2, I, M] (gate, up), down [E, M, I]; biases [E, 2, I], [E, M] if configured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        self.limit, self.activation = moe.swiglu_limit, ACTIVATIONS[moe.activation]
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2, moe.intermediate_size, hidden))
        self.down = nn.Parameter(torch.empty(moe.num_experts, hidden, moe.intermediate_size))
        self.gate_up_bias = self.down_bias = None
        if moe.expert_bias:
            self.gate_up_bias = nn.Parameter(torch.empty(moe.num_experts, 2, moe.intermediate_size))
            self.down_bias = nn.Parameter(torch.empty(moe.num_experts, hidden))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """sum_k weights[t, k] * E_chosen[t, k](x[t]): [T, M], [T, K] int64, [T, K] -> [T, M]."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        ends = torch.bincount(flat, minlength=self.down.shape[0]).cumsum(0).to(torch.int32)
        rows, expert = _Dispatch.apply(x, order, inverse), flat[order]
        gate_up = grouped_linear(rows, self.gate_up.flatten(1, 2), ends)
        if self.gate_up_bias is not None:
            gate_up = gate_up + self.gate_up_bias.flatten(1)[expert]
        rows = self.activation(*gate_up.chunk(2, dim=-1), self.limit)
        rows = grouped_linear(rows, self.down, ends)
        if self.down_bias is not None:
            rows = rows + self.down_bias[expert]
        rows = _Unsort.apply(rows, order, inverse).unflatten(0, chosen.shape)
        return torch.einsum("tkm,tk->tm", rows, weights.to(rows.dtype))
