"""Routed experts as stacked matrices, multiplied by `grouped_mm` over tokens sorted by expert.

On the CPU several experts at a time, with as many rows as a cache holds: what lies between two products never leaves
it. In fp32 backward makes the first product of a large micro-batch again there; it is kept in bf16, where it takes half
the memory, and elsewhere.

Shapes: T tokens, K experts per token, R >= T K rows sorted by expert, E experts, M hidden, I inner width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from v4train.model.cached import CACHED
from v4train.model.config import ModelConfig
from v4train.model.ffn import ACTIVATIONS, Activation
from v4train.model.precision import full, product_dtype
from v4train.model.recompute import memory_counts
from v4train.model.seams import Seams

# Rows of an expert are a multiple of this in bf16 on the CPU: oneDNN prepares a product for each number of rows that it
# has not met, which takes longer than a small product itself (torch 2.13).
PREPARED = 64


class Groups(NamedTuple):
    """Rows sorted by expert, one for each expert of each token, and perhaps rows of no token behind each expert's."""

    expert: Tensor  # [R] int64, ascending
    token: Tensor  # [R] int64, whose row it is; T - 1 where it is no one's
    order: Tensor  # [R] int64, its place in the flattened [T, K]; T K where there is none
    row: Tensor  # [T, K] int64, the inverse
    ends: Tensor  # [E] int32, one past each expert's last row


def groups_of(chosen: Tensor, num_experts: int, multiple: int = 1) -> Groups:
    """Sort the choices [T, K] of all tokens by expert; rows of one expert keep the order of tokens.

    multiple: of which each expert has a number of rows, filled up with rows of no token.
    """
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=num_experts)
    own = flat.argsort(stable=True)
    if multiple == 1:
        expert, order, place = flat[own], own, torch.arange(own.numel(), device=own.device)
    else:
        rooms = (counts + multiple - 1) // multiple * multiple
        expert = torch.arange(num_experts, device=flat.device).repeat_interleave(rooms)
        filled = (rooms - counts).cumsum(0) - (rooms - counts)  # before each expert's rows
        place = torch.arange(own.numel(), device=own.device) + filled[flat[own]]
        order, counts = torch.full_like(expert, own.numel()).scatter_(0, place, own), rooms
    row = torch.empty_like(own).scatter_(0, own, place).view(chosen.shape)
    token = (order // chosen.shape[1]).clamp_(max=max(0, chosen.shape[0] - 1))
    return Groups(expert, token, order, row, counts.cumsum(0).to(torch.int32))


class ExpertRange(NamedTuple):
    """Consecutive experts and their rows."""

    rows: slice
    experts: slice
    ends: Tensor  # [experts] int32, as `Groups.ends`, of these rows


def ranges_of(groups: Groups, width: int) -> list[ExpertRange]:
    """All rows in blocks of whole experts: on the CPU as many as CACHED of `width` hold, or one."""
    num_rows, num_experts = groups.token.shape[0], groups.ends.shape[0]
    if groups.ends.device.type != "cpu":
        return [ExpertRange(slice(0, num_rows), slice(0, num_experts), groups.ends)]
    ends, blocks, row, expert = groups.ends.tolist(), [], 0, 0
    for after in range(1, num_experts + 1):
        if after == num_experts or (ends[after] - row) * width > CACHED:
            own = slice(expert, after)
            blocks.append(ExpertRange(slice(row, ends[after - 1]), own, groups.ends[own] - row))
            row, expert = ends[after - 1], after
    return blocks


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


def sum_of_rows(rows: Tensor, row: Tensor) -> Tensor:
    """Rows [R, M] summed at the places [T, K]: [T, M], in fp32 for fp32 and bf16."""
    return F.embedding_bag(row, rows, mode="sum")


class _Experts(torch.autograd.Function):
    """sum_k w[t, k] down_e(activation(gate_up_e x[t] + bias_e)), e the k-th expert of token t: [T, M].

    x [T, M], gate_up [E, 2, I, M], bias [E, 2, I] or None, down [E, M, I], w [T, K]. Weights are applied to the narrow
    side of the second product, as the released code does (V4.md 2.5). Parameters are saved as they are, not as views,
    which would keep what ZeRO 3 frees.
    """

    @staticmethod
    def forward(ctx, *arguments):
        x, gate_up, bias, down, weights, groups, activation = arguments
        dtype = product_dtype(x)
        first, second = gate_up.flatten(1, 2).to(dtype), down.to(dtype)
        row_weights, source = _weights_of_rows(weights, groups, dtype), x.to(dtype)
        result, kept = first.new_empty(groups.token.shape[0], x.shape[1]), []
        keeps = x.device.type != "cpu" or dtype == torch.bfloat16 or not memory_counts(x)
        keeps = keeps and any(ctx.needs_input_grad)
        for block in ranges_of(groups, x.shape[1]):
            projected = _first_product(_rows(source, groups, block), first, bias, groups, block)
            if keeps:
                kept.append(projected)
            hidden = activation.needed(projected)(projected).mul_(row_weights[block.rows])
            result[block.rows] = grouped_product(hidden, second[block.experts], block.ends)
        ctx.save_for_backward(x, gate_up, bias, down, weights, *groups, *kept)
        ctx.activation, ctx.dtype = activation, dtype
        return sum_of_rows(result, groups.row)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, gate_up, bias, down, weights, *saved = ctx.saved_tensors
        fields = len(Groups._fields)
        groups, kept, dtype = Groups(*saved[:fields]), saved[fields:], ctx.dtype
        first, second, gradient = gate_up.flatten(1, 2).to(dtype), down.to(dtype), gradient.to(dtype)
        row_weights, sources = _weights_of_rows(weights, groups, dtype), (x.to(dtype), gradient)
        x_gradient, weights_gradient = (
            first.new_empty(len(row_weights), x.shape[1]),
            weights.new_empty(len(row_weights)),
        )
        gate_up_gradient, down_gradient = torch.empty_like(gate_up), torch.empty_like(down)
        bias_gradient = None if bias is None else torch.zeros_like(bias)
        for number, block in enumerate(ranges_of(groups, x.shape[1])):
            here, experts, ends = block
            rows, rows_gradient = (_rows(source, groups, block) for source in sources)
            projected = _first_product(rows, first, bias, groups, block) if not kept else kept[number]
            activation = ctx.activation.needed(projected)
            factors, change = activation.factors(projected), grouped_product(rows_gradient, second[experts].mT, ends)
            hidden = factors[0] * factors[1]
            weights_gradient[here] = torch.linalg.vecdot(change, hidden)
            down_gradient[experts] = grouped_weight_gradient(rows_gradient, hidden.mul_(row_weights[here]), ends)
            change = activation.backward(projected, change.mul_(row_weights[here]), factors)
            gate_up_gradient.flatten(1, 2)[experts] = grouped_weight_gradient(change, rows, ends)
            if bias is not None:
                bias_gradient.flatten(1).index_add_(0, groups.expert[here], change.to(bias.dtype))
            x_gradient[here] = grouped_product(change, first[experts].mT, ends)
        weights_gradient = weights_gradient.index_select(0, groups.row.flatten()).view_as(weights)
        x_gradient = sum_of_rows(x_gradient, groups.row).to(x.dtype)
        return x_gradient, gate_up_gradient, bias_gradient, down_gradient, weights_gradient, None, None


def _rows(x: Tensor, groups: Groups, block: ExpertRange) -> Tensor:
    """The rows of a block, from those of tokens [T, M]."""
    return x.index_select(0, groups.token[block.rows])


def _first_product(rows: Tensor, gate_up: Tensor, bias: Tensor | None, groups: Groups, block: ExpertRange) -> Tensor:
    product = grouped_product(rows, gate_up[block.experts], block.ends)
    return product if bias is None else product.add_(bias.flatten(1).to(product.dtype)[groups.expert[block.rows]])


def _weights_of_rows(weights: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    """[R, 1]; 0 for a row of no token, which therefore changes no gradient."""
    return F.pad(weights.flatten(), (0, 1)).index_select(0, groups.order).to(dtype)[:, None]


class Experts(nn.Module):
    """E SwiGLU experts: gate_up [E, 2, I, M] (gate, up), down [E, M, I]; biases [E, 2, I], [E, M] if configured."""

    seams = Seams()

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
        prepares = x.device.type == "cpu" and product_dtype(x) == torch.bfloat16 and torch.is_grad_enabled()
        groups = groups_of(chosen, self.down.shape[0], multiple=PREPARED if prepares else 1)
        parameters = (self.gate_up, self.gate_up_bias, self.down)
        output = _Experts.apply(x, *parameters, weights, groups, self.activation)
        if self.down_bias is not None:
            bias = F.embedding_bag(chosen, full(self.down_bias), mode="sum", per_sample_weights=full(weights))
            before = self.seams.heads.index * bias.shape[1]  # of its share of the channels, or it would be added often
            bias = F.pad(bias, (before, output.shape[1] - before - bias.shape[1]))
            output = output + bias.to(output.dtype)
        return output
