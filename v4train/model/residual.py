"""Residual connections between sub-layers: plain, hyper-connections (HC), and manifold-constrained ones (mHC).

Sources: V4 report section 2.2, mHC paper arXiv 2512.24880, V4.md 2.1 (orientation: trap 3); HC paper arXiv 2409.19606.

Shapes: B batch, S sequence, C streams, M hidden. Streams are [B, S, C, M]; a plain residual has C = 1.
A residual module collapses the streams to a sub-layer's input and returns with it the streams and the coefficients that
`merge` needs to put the sub-layer's output back.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from v4train.model.config import ModelConfig
from v4train.model.norm import rms_norm
from v4train.model.precision import full, full_precision


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Approximately doubly stochastic matrices from logits [C, C, ...]: (source, destination, any), same shape.

    The released code's order (V4.md trap 3): softmax over destinations, divide by the sums over sources, then
    `iterations - 1` times both. On B = transpose this is 20 x RowNorm(ColNorm(.)) of report eq. 8.
    The stream dimensions come first so that sums over them are vectorised over tokens.
    """
    return _Normalise.apply(logits.softmax(dim=1) + eps, iterations, eps)


class _Normalise(torch.autograd.Function):
    """The divisions of `sinkhorn`, on one factor a row and one a column: matrix [i, j] = x[i, j] rows[i] columns[j].

    Dividing by sums changes the factors only, 2 C numbers a token and not C^2. Only the denominators are saved:
    backward multiplies its way to each iterate.
    """

    @staticmethod
    def forward(ctx, x: Tensor, iterations: int, eps: float) -> Tensor:
        turns = [1, *[0, 1] * (iterations - 1)]  # which factor changes: 1 the columns' (sums over sources), 0 the rows'
        factors, denominators = [torch.ones_like(x[:, 0]), torch.ones_like(x[0])], []
        for turn in turns:
            denominators.append(_weighted_sums(x, factors[1 - turn], turn).mul_(factors[turn]).add_(eps))
            factors[turn] = factors[turn] / denominators[-1]
        ctx.turns, ctx.eps = turns, eps
        ctx.save_for_backward(x, *factors, *denominators)
        return x * factors[0][:, None] * factors[1][None]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, rows, columns, *denominators = ctx.saved_tensors
        factors = [rows, columns]
        change, weighted = gradient * rows[:, None] * columns[None], gradient * x
        gradients = [_weighted_sums(weighted, columns, 0), _weighted_sums(weighted, rows, 1)]
        for turn, denominator in zip(reversed(ctx.turns), reversed(denominators), strict=True):
            # new = own / denominator, denominator = own * sums + eps, sums = x weighted by the other factor
            other, own_gradient = factors[1 - turn], gradients[turn]
            sums_gradient = factors[turn].square().mul_(own_gradient).neg_()
            gradients[turn] = own_gradient / denominator.square() * ctx.eps
            factors[turn] = factors[turn] * denominator
            if turn == 0:
                change.addcmul_(sums_gradient[:, None], other[None])
            else:
                change.addcmul_(other[:, None], sums_gradient[None])
            gradients[1 - turn] = _weighted_sums(x, sums_gradient, 1 - turn).add_(gradients[1 - turn])
        return change, None, None


def _weighted_sums(x: Tensor, weights: Tensor, turn: int) -> Tensor:
    """For the columns (turn 1) sum_i x[i, j] weights[i], for the rows (0) sum_j x[i, j] weights[j]: [C, ...]."""
    parts = x.unbind(1 - turn)
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(part, weight)
    return total


def stream_projection(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm (no weight) over all C*M values of a token, then a linear map: [B, S, C, M] -> fp32 [R, B, S].

    Also returns the streams: whoever uses them further takes these, so that all gradients are summed in one place.
    The norm's scalar is applied after the product, which is the same and saves a pass over the streams.
    """
    with full_precision(streams.device.type):
        return _StreamProjection.apply(streams, weight, eps)


class _StreamProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        flat = full(streams).flatten(2)
        scale = torch.linalg.vector_norm(flat, dim=-1).square_().div_(flat.shape[-1]).add_(eps).rsqrt_()
        projected = F.linear(flat, full(weight)).movedim(-1, 0) * scale
        ctx.save_for_backward(streams, weight, projected, scale)
        return projected, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, streams_gradient: Tensor):
        streams, weight, projected, scale = ctx.saved_tensors
        flat = full(streams).flatten(2).flatten(0, 1)
        # p = s W x, s = (mean(x^2) + eps)^-1/2: dx = s W^T dp - x s^2 mean(p . dp)
        along = ((gradient * projected).sum(0) * scale.square() / -flat.shape[-1]).flatten()
        change = (gradient * scale).flatten(1)
        total = torch.addmm(full(streams_gradient).flatten(2).flatten(0, 1), change.mT, full(weight))
        total.addcmul_(flat, along[:, None])
        return total.view_as(streams).to(streams.dtype), torch.mm(change, flat).to(weight.dtype), None


class PlainResidual(nn.Module):
    """x + f(x), one stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, None]:
        """The only stream, [B, S, 1, M] -> [B, S, M]; the streams; no coefficients."""
        return streams[:, :, 0], streams, None

    def merge(self, streams: Tensor, output: Tensor, coefficients: None) -> Tensor:
        """streams + output."""
        return streams + output[:, :, None]


class HyperConnection(nn.Module):
    """mHC: X <- B X + C f(A X), with A, B, C functions of the token's own streams (V4 report eqs. 1-8)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.options, self.norm_eps = config.residual, config.norm_eps
        count = self.options.num_streams
        rows = (count, count, count * count)  # pre, post, mixing
        self.projection = nn.Parameter(torch.empty(sum(rows), count * config.hidden_size))
        self.projection.independent_rows = rows  # three matrices to the optimizer
        self.static_bias = nn.Parameter(torch.empty(sum(rows)))
        self.gates = nn.Parameter(torch.empty(3))

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Collapsed input [B, S, M], streams, (mixing [source, destination, B, S], post [destination, B, S]), fp32."""
        count, eps = self.options.num_streams, self.options.eps
        sizes = [count, count, count * count]
        projected, streams = stream_projection(streams, self.projection, self.norm_eps)
        gate = torch.cat([gate.expand(size) for gate, size in zip(self.gates, sizes, strict=True)])
        logits = projected * gate[:, None, None] + self.static_bias[:, None, None]
        pre, post, mixing = logits.split(sizes)
        pre, post = torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post)
        mixing = sinkhorn(mixing.unflatten(0, (count, count)), self.options.sinkhorn_iterations, eps)
        return *collapse(streams, pre), (mixing, post)

    def merge(self, streams: Tensor, output: Tensor, coefficients: tuple[Tensor, Tensor]) -> Tensor:
        """As `merge_streams`."""
        return merge_streams(streams, output, *coefficients)


class UnconstrainedHyperConnection(nn.Module):
    """HC: X <- B X + C f(A X), with A, B, C static plus a bounded function of each stream (mHC paper eq. 5).

    A_j = gate * tanh(theta_A . x_j) + bias, C alike, B[i, j] = gate * tanh(theta_B[i] . x_j) + bias, x_j normalised.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.count, self.norm_eps = config.residual.num_streams, config.norm_eps
        rows = (1, 1, self.count)  # pre, post, mixing
        self.projection = nn.Parameter(torch.empty(sum(rows), config.hidden_size))
        self.projection.independent_rows = rows
        self.static_bias = nn.Parameter(torch.empty(2 * self.count + self.count**2))
        self.gates = nn.Parameter(torch.empty(3))

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Collapsed input [B, S, M], streams, (mixing [source, destination, B, S], post [destination, B, S]), fp32."""
        count = self.count
        with full_precision(streams.device.type):
            normalised = rms_norm(full(streams), self.norm_eps)
            projected = (
                F.linear(normalised, full(self.projection)).tanh().movedim((-1, -2), (0, 1))
            )  # [row, source, ..]
        pre, post, mixing = projected.split([1, 1, count])
        gates, biases = self.gates, self.static_bias.split([count, count, count * count])
        pre = pre[0] * gates[0] + biases[0][:, None, None]
        post = post[0] * gates[1] + biases[1][:, None, None]
        mixing = mixing.transpose(0, 1) * gates[2] + biases[2].view(count, count, 1, 1)
        return *collapse(streams, pre), (mixing, post)

    def merge(self, streams: Tensor, output: Tensor, coefficients: tuple[Tensor, Tensor]) -> Tensor:
        """As `merge_streams`."""
        return merge_streams(streams, output, *coefficients)


def merge_streams(streams: Tensor, output: Tensor, mixing: Tensor, post: Tensor) -> Tensor:
    """new_k = sum_j mixing[j, k] x_j + post_k * output, in the streams' dtype: [B, S, C, M], [B, S, M] -> [B, S, C, M].

    mixing: [source, destination, B, S]; post: [destination, B, S].
    """
    # Contiguous, or bmm copies matrix by matrix
    mixing = mixing.permute(2, 3, 1, 0).flatten(0, 1).contiguous().to(streams.dtype)
    post = post.movedim(0, -1).flatten(0, 1)[:, :, None].contiguous().to(streams.dtype)
    return _Merge.apply(streams, output.to(streams.dtype), mixing, post)


class _Merge(torch.autograd.Function):
    """Products token by token: mixing [T, destination, source], post [T, destination, 1]."""

    @staticmethod
    def forward(ctx, streams: Tensor, output: Tensor, mixing: Tensor, post: Tensor) -> Tensor:
        ctx.save_for_backward(streams, output, mixing, post)
        with full_precision(streams.device.type):
            merged = torch.bmm(post, output.flatten(0, 1)[:, None])
            return torch.baddbmm(merged, mixing, streams.flatten(0, 1), out=merged).view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        streams, output, mixing, post = ctx.saved_tensors
        with full_precision(streams.device.type):
            gradient, output = gradient.flatten(0, 1), output.flatten(0, 1)
            streams_gradient = torch.bmm(mixing.mT, gradient).view_as(streams)
            output_gradient = torch.bmm(post.mT, gradient).view(*streams.shape[:2], -1)
            mixing_gradient = torch.bmm(gradient, streams.flatten(0, 1).mT)
            return streams_gradient, output_gradient, mixing_gradient, torch.bmm(gradient, output[:, :, None])


def collapse(streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i pre_i x_i: [B, S, C, M], [C, B, S] -> [B, S, M]; and the streams, as `stream_projection` returns them."""
    pre = pre.movedim(0, -1).flatten(0, 1)[:, None].contiguous().to(streams.dtype)
    return _Collapse.apply(streams, pre)


class _Collapse(torch.autograd.Function):
    """pre: [T, 1, C]."""

    @staticmethod
    def forward(ctx, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(streams, pre)
        with full_precision(streams.device.type):
            collapsed = torch.bmm(pre, streams.flatten(0, 1))[:, 0].unflatten(0, streams.shape[:2])
        return collapsed, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, streams_gradient: Tensor):
        streams, pre = ctx.saved_tensors
        with full_precision(streams.device.type):
            gradient = gradient.flatten(0, 1)[:, None]
            total = torch.baddbmm(streams_gradient.flatten(0, 1), pre.mT, gradient)
            return total.view_as(streams), torch.bmm(gradient, streams.flatten(0, 1).mT)


class StreamCollapse(nn.Module):
    """Streams to one at the end of the network: u = sum_i (sigmoid(.) + eps) x_i (V4.md 2.1, head)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count = config.residual.num_streams
        self.norm_eps, self.eps = config.norm_eps, config.residual.eps
        self.projection = nn.Parameter(torch.empty(count, count * config.hidden_size))
        self.static_bias = nn.Parameter(torch.empty(count))
        self.gates = nn.Parameter(torch.empty(1))

    def forward(self, streams: Tensor) -> Tensor:
        """[B, S, C, M] -> [B, S, M]."""
        projected, streams = stream_projection(streams, self.projection, self.norm_eps)
        logits = projected * self.gates + self.static_bias[:, None, None]
        return collapse(streams, torch.sigmoid(logits) + self.eps)[0]


class SingleStream(nn.Module):
    """The collapse of a plain residual: its only stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, streams: Tensor) -> Tensor:
        """[B, S, 1, M] -> [B, S, M]."""
        return streams[:, :, 0]


class StreamSum(nn.Module):
    """The collapse of HC: the sum of the streams (arXiv 2409.19606 section 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, streams: Tensor) -> Tensor:
        """[B, S, C, M] -> [B, S, M]."""
        return streams.sum(2)


RESIDUALS = {"plain": PlainResidual, "hc": UnconstrainedHyperConnection, "mhc": HyperConnection}
COLLAPSES = {"plain": SingleStream, "hc": StreamSum, "mhc": StreamCollapse}
