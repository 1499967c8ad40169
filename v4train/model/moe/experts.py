"""Routed experts as stacked matrices, multiplied by `grouped_mm` over tokens sorted by expert; no loop over experts.

Shapes: T tokens, K experts per token, R = T K rows sorted by expert, E experts, M hidden, I inner width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from v4train.model.config import ModelConfig
from v4train.model.ffn import ACTIVATIONS, Activation
from v4train.model.precision import full


class Groups(NamedTuple):
    """Rows sorted by expert, one for each expert of each token."""

    token: Tensor  # [R] int64, whose row it is
    order: Tensor  # [R] int64, its place in the flattened [T, K]
    row: Tensor  # [T, K] int64, the inverse
    ends: Tensor  # [E] int32, one past each expert's last row


def groups_of(chosen: Tensor, num_experts: int) -> Groups:
    """Sort the choices [T, K] of all tokens by expert; rows of one expert keep the order of tokens."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0).to(torch.int32)
    return Groups(order // chosen.shape[1], order, row.view(chosen.shape), ends)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of each group times its own matrix: x [R, in] sorted by group, weight [E, out, in] -> [R, out].

    fp64 (for tests), which `grouped_mm` lacks, goes by one product a group (torch 2.13).
    """
    if x.dtype == torch.float64:
        parts = zip(x.split(_sizes(ends)), weight, strict=True)
        return torch.cat([F.linear(part, matrix) for part, matrix in parts])
    outputs, weight = weight.shape[1], _padded(_padded(weight).mT)
    return F.grouped_mm(_padded(x), weight, offs=ends)[:, :outputs]


def grouped_weight_gradient(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Gradient of `grouped_product`'s weight, [E, out, in], from its output's [R, out] and its rows [R, in]."""
    if x.dtype == torch.float64:
        parts = zip(gradient.split(_sizes(ends)), x.split(_sizes(ends)), strict=True)
        return torch.stack([own.mT @ rows for own, rows in parts])
    outputs, inputs = gradient.shape[1], x.shape[1]
    return F.grouped_mm(_padded(gradient).mT, _padded(x), offs=ends)[:, :outputs, :inputs]


def _padded(x: Tensor) -> Tensor:
    """Zeros behind the last dimension, up to the 16 bytes that `grouped_mm` wants of every stride (torch 2.13)."""
    missing = -x.shape[-1] % (16 // x.element_size())
    return F.pad(x, (0, missing)) if missing else x  # padding by nothing would copy


def _sizes(ends: Tensor) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def _sum_of_rows(rows: Tensor, row: Tensor) -> Tensor:
    """Rows [R, M] summed at the places [T, K]: [T, M], in fp32 for fp32 and bf16."""
    return F.embedding_bag(row, rows, mode="sum")


def _dtype(x: Tensor) -> torch.dtype:
    """Of the products: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _GatheredLinear(torch.autograd.Function):
    """Each row its token's x [T, M] times its expert's matrix [E, out, M]. Saves x, not the K copies of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.dtype = _dtype(x)
        ctx.save_for_backward(x, weight, *groups)
        rows = x.to(ctx.dtype).index_select(0, groups.token)
        return grouped_product(rows, weight.to(ctx.dtype), groups.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, *groups = ctx.saved_tensors
        groups, gradient = Groups(*groups), gradient.contiguous()
        rows = x.to(ctx.dtype).index_select(0, groups.token)
        weight_gradient = grouped_weight_gradient(gradient, rows, groups.ends).to(weight.dtype)
        rows = grouped_product(gradient, weight.to(ctx.dtype).mT, groups.ends)
        return _sum_of_rows(rows, groups.row).to(x.dtype), weight_gradient, None


class _CombinedLinear(torch.autograd.Function):
    """sum_k w[t, k] down_e(activation(gate_up row)): gate_up [R, 2I], down [E, M, I], w [T, K] -> [T, M].

    Weights are applied to the narrow side of the product, as the released code does (V4.md 2.5). Saves only inputs.
    """

    @staticmethod
    def forward(ctx, gate_up: Tensor, down: Tensor, weights: Tensor, groups: Groups, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up, down, weights, *groups)
        ctx.activation = activation.needed(gate_up)
        hidden = ctx.activation(gate_up).mul_(_weights_of_rows(weights, groups, gate_up.dtype))
        rows = grouped_product(hidden, down.to(gate_up.dtype), groups.ends)
        return _sum_of_rows(rows, groups.row)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        gate_up, down, weights, *groups = ctx.saved_tensors
        groups, dtype = Groups(*groups), gate_up.dtype
        rows_gradient = gradient.to(dtype).index_select(0, groups.token)
        hidden = ctx.activation(gate_up)
        hidden_gradient = grouped_product(rows_gradient, down.to(dtype).mT, groups.ends)
        weights_gradient = torch.linalg.vecdot(hidden_gradient, hidden).to(weights.dtype)
        weights_gradient = weights_gradient.index_select(0, groups.row.flatten())
        row_weights = _weights_of_rows(weights, groups, dtype)
        down_gradient = grouped_weight_gradient(rows_gradient, hidden.mul_(row_weights), groups.ends)
        del rows_gradient, hidden  # the memory of a step is highest here
        gate_up_gradient = ctx.activation.backward(gate_up, hidden_gradient.mul_(row_weights))
        return gate_up_gradient, down_gradient.to(down.dtype), weights_gradient.view_as(weights), None, None


def _weights_of_rows(weights: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    return weights.flatten().index_select(0, groups.order).to(dtype)[:, None]


class Experts(nn.Module):
    """E SwiGLU experts: gate_up [E, 2, I, M] (gate, up), down [E, M, I]; biases [E, 2, I], [E, M] if configured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        self.activation = Activation(*ACTIVATIONS[moe.activation], moe.swiglu_limit)
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2, moe.intermediate_size, hidden))
        self.down = nn.Parameter(torch.empty(moe.num_experts, hidden, moe.intermediate_size))
        self.gate_up_bias = self.down_bias = None
        if moe.expert_bias:
            self.gate_up_bias = nn.Parameter(torch.empty(moe.num_experts, 2, moe.intermediate_size))
            self.down_bias = nn.Parameter(torch.empty(moe.num_experts, hidden))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """sum_k weights[t, k] * E_chosen[t, k](x[t]): [T, M], [T, K] int64, [T, K] -> [T, M]."""
        groups = groups_of(chosen, self.down.shape[0])
        gate_up = _GatheredLinear.apply(x, self.gate_up.flatten(1, 2), groups)
        if self.gate_up_bias is not None:
            gate_up = gate_up + self.gate_up_bias.flatten(1)[chosen.flatten()[groups.order]]
        output = _CombinedLinear.apply(gate_up, self.down, weights, groups, self.activation)
        if self.down_bias is not None:
            bias = F.embedding_bag(chosen, full(self.down_bias), mode="sum", per_sample_weights=full(weights))
            output = output + bias.to(output.dtype)
        return output
