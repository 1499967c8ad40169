"""Residual connections between sub-layers: plain, hyper-connections (HC), and manifold-constrained ones (mHC).

Sources: V4 report section 2.2, mHC paper arXiv 2512.24880, V4.md 2.1 (orientation: trap 3); HC paper arXiv 2409.19606.

Shapes: B batch, S sequence, C streams, M hidden. Streams are [B, S, C, M]; a plain residual has C = 1.
A residual module collapses the streams to a sub-layer's input and returns with it the streams and the coefficients that
`merge` needs to put the sub-layer's output back.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from v4train.model.cached import blocks
from v4train.model.config import ModelConfig
from v4train.model.norm import rms_norm
from v4train.model.precision import full, full_precision
from v4train.model.sinkhorn import sinkhorn, sinkhorn_backward


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
        projected, scale = _project(streams, weight, eps)
        ctx.save_for_backward(streams, weight, projected, scale)
        return projected, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, streams_gradient: Tensor):
        streams, weight, projected, scale = ctx.saved_tensors
        return *_projection_gradients(streams_gradient, gradient, streams, weight, projected, scale), None


def _project(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Projected values [R, B, S], and the norm's scalar [B, S]: fp32."""
    flat = full(streams).flatten(2)
    scale = torch.linalg.vector_norm(flat, dim=-1).square_().div_(flat.shape[-1]).add_(eps).rsqrt_()
    return F.linear(flat, full(weight)).movedim(-1, 0) * scale, scale


def _projection_gradients(
    streams_gradient: Tensor,
    gradient: Tensor,
    streams: Tensor,
    weight: Tensor,
    projected: Tensor,
    scale: Tensor,
    used: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The streams' gradient, of which `projected`'s adds to `streams_gradient`, and the weight's.

    used: for a site, mixing [T, C, C], read [T, 1, C] and the gradient of what was read [T, 1, M];
    `streams_gradient` is then that of the mixed streams.
    """
    flat = streams.flatten(2).flatten(0, 1)
    given = streams_gradient.flatten(2).flatten(0, 1)
    # p = s W x, s = (mean(x^2) + eps)^-1/2: dx = s W^T dp - x s^2 mean(p . dp)
    along = ((gradient * projected).sum(0) * scale.square() / -flat.shape[-1]).flatten()[:, None]
    change, full_weight = (gradient * scale).flatten(1), full(weight)
    total, weight_gradient = flat.new_empty(flat.shape), torch.zeros_like(full_weight)
    for block in blocks(flat):
        x, own = full(flat[block]), full(total[block])
        if used is None:
            torch.addcmul(full(given[block]), x, along[block], out=own)
        else:
            mixing, read, gradient_of_read = (full(part[block]) for part in used)
            by_stream = torch.mul(x, along[block], out=own).view(-1, *streams.shape[2:])
            by_stream.baddbmm_(mixing.mT, full(given[block]).view_as(by_stream)).addcmul_(read.mT, gradient_of_read)
        own.addmm_(change[:, block].mT, full_weight)
        if own.dtype != total.dtype:
            total[block] = own
        weight_gradient.addmm_(change[:, block], x)
    return total.view_as(streams), weight_gradient.to(weight.dtype)


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


class Coefficients(NamedTuple):
    """What a site computes for its streams, token by token (T), beside what it reads of them."""

    mixing: Tensor  # [T, destination, source] fp32, no gradient: the unmixed streams have it
    post: Tensor  # [T, destination, 1] fp32
    read: Tensor  # [T, 1, C] in the streams' dtype, no gradient: what `collapse` reads again


class _Connection(nn.Module):
    """What HC and mHC share."""

    def merge(self, unmixed: Tensor, output: Tensor, coefficients: Coefficients, into: Tensor | None = None) -> Tensor:
        """new_k = sum_j mixing[k, j] x_j + post_k output: [B, S, C, M], [B, S, M] -> [B, S, C, M], as the streams are.

        unmixed: the streams that the site has returned. Their gradient is that of the mixed ones: the site makes its
        own of it, together with all others, so that the streams and their gradient are read seldom.
        into: for the result, then without gradient.
        """
        output = output.to(unmixed.dtype)
        if into is not None:
            return _merged(unmixed, output, coefficients.mixing, coefficients.post, into)
        return _Merge.apply(unmixed, output, coefficients.mixing, coefficients.post)

    def collapse(self, streams: Tensor, coefficients: Coefficients, into: Tensor) -> None:
        """The collapsed input [B, S, M] once more, without gradient."""
        _read(streams, coefficients.read, into)


class HyperConnection(_Connection):
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

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Coefficients]:
        """Collapsed input [B, S, M], streams for `merge` and nothing else, coefficients."""
        numbers = (self.options.sinkhorn_iterations, self.options.eps, self.norm_eps)
        with full_precision(streams.device.type):
            collapsed, unmixed, *coefficients = _Site.apply(
                streams, self.projection, self.gates, self.static_bias, *numbers
            )
        return collapsed, unmixed, Coefficients(*coefficients)


class _Site(torch.autograd.Function):
    """What a site computes of its streams, as one function: pre = sigmoid(.) + eps, post = 2 sigmoid(.),
    mixing = sinkhorn(.). The mixed streams stand unmixed among the results: `_Merge` mixes them on its way."""

    @staticmethod
    def forward(ctx, streams: Tensor, weight: Tensor, gates: Tensor, bias: Tensor, iterations: int, *epsilons: float):
        eps, norm_eps = epsilons
        count = streams.shape[2]
        projected, scale = _project(streams, weight, norm_eps)
        logits = projected * _by_row(full(gates), count) + full(bias)[:, None, None]
        pre, post, mixing = logits.split([count, count, count * count])
        pre, post = torch.sigmoid(pre), 2 * torch.sigmoid(post)
        mixing, *state = sinkhorn(mixing.unflatten(0, (count, count)), iterations, eps)
        mixing, read = _matrices(mixing), _token_first(pre + eps)[:, None].to(streams.dtype)
        ctx.save_for_backward(streams, weight, gates, projected, scale, pre, post, mixing, read, *state)
        ctx.eps = eps
        ctx.mark_non_differentiable(mixing, read)
        unmixed = streams.view_as(streams)
        return _read(streams, read), unmixed, mixing, _token_first(post)[:, :, None], read

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, mixed_gradient: Tensor, _, post_gradient: Tensor, __):
        streams, weight, gates, projected, scale, pre, post, mixing, read, *state = ctx.saved_tensors
        count, gradient = streams.shape[2], gradient.flatten(0, 1)[:, None]
        with full_precision(streams.device.type):
            mixing_gradient, pre_gradient = _coefficient_gradients(streams, mixed_gradient, gradient)
            post_gradient = post_gradient.view(*post.shape[1:], count).movedim(-1, 0)
            logits_gradient = torch.cat(
                [
                    pre_gradient * pre * (1 - pre),
                    post_gradient * post * (1 - post / 2),
                    sinkhorn_backward(mixing_gradient, ctx.eps, *state).flatten(0, 1),
                ]
            )
            parts = (logits_gradient * projected).sum((1, 2)).split([count, count, count * count])
            gates_gradient = torch.stack([part.sum() for part in parts])
            projected_gradient = logits_gradient * _by_row(full(gates), count)
            given = (streams, weight, projected, scale, (mixing, read, gradient))
            results = _projection_gradients(mixed_gradient, projected_gradient, *given)
        bias_gradient = logits_gradient.sum((1, 2))
        return *results, gates_gradient.to(gates.dtype), bias_gradient.to(gates.dtype), None, None, None


def _coefficient_gradients(streams: Tensor, mixed_gradient: Tensor, read_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of mixing [source, destination, B, S] and of what is read with [C, B, S]: fp32.

    mixed_gradient: of the mixed streams [B, S, C, M]; read_gradient: of the read ones [T, 1, M].
    """
    shape, tokens, mixed = streams.shape, streams.flatten(0, 1), mixed_gradient.flatten(0, 1)
    mixing, read = tokens.new_empty(len(tokens), shape[2], shape[2]), tokens.new_empty(len(tokens), 1, shape[2])
    for block in blocks(tokens):
        torch.bmm(mixed[block], tokens[block].mT, out=mixing[block])
        torch.bmm(read_gradient[block], tokens[block].mT, out=read[block])
    mixing = full(mixing).unflatten(0, shape[:2]).permute(3, 2, 0, 1)
    return mixing, full(read)[:, 0].unflatten(0, shape[:2]).movedim(-1, 0)


def _by_row(gates: Tensor, count: int) -> Tensor:
    """The gates of pre, post and mixing [3], one for each row of the projection: [R, 1, 1]."""
    sizes = (count, count, count * count)
    return torch.cat([gate.expand(size) for gate, size in zip(gates, sizes, strict=True)])[:, None, None]


def _read(streams: Tensor, read: Tensor, into: Tensor | None = None) -> Tensor:
    """read [T, 1, C] times streams [B, S, C, M]: [B, S, M]."""
    result = streams.new_empty(*streams.shape[:2], streams.shape[-1]) if into is None else into
    with full_precision(streams.device.type):
        torch.bmm(read, streams.flatten(0, 1), out=result.flatten(0, 1)[:, None])
    return result


def _token_first(x: Tensor) -> Tensor:
    """[C, B, S] as [T, C], contiguous, or products would copy matrix by matrix."""
    return x.movedim(0, -1).flatten(0, 1).contiguous()


def _matrices(mixing: Tensor) -> Tensor:
    """[source, destination, B, S] as [T, destination, source], contiguous."""
    return mixing.permute(2, 3, 1, 0).flatten(0, 1).contiguous()


class UnconstrainedHyperConnection(_Connection):
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

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Coefficients]:
        """Collapsed input [B, S, M], streams for `merge` and nothing else, coefficients."""
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
        mixing, post, read = _matrices(mixing), _token_first(post)[:, :, None], _token_first(pre)[:, None]
        read = read.to(streams.dtype)
        collapsed, streams = _Collapse.apply(streams, read)
        return collapsed, _Mix.apply(streams, mixing), Coefficients(mixing.detach(), post, read.detach())


class _Mix(torch.autograd.Function):
    """The mixed streams, unmixed as `_Merge` takes them. mixing: [T, destination, source]."""

    @staticmethod
    def forward(ctx, streams: Tensor, mixing: Tensor) -> Tensor:
        ctx.save_for_backward(streams, mixing)
        return streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        streams, mixing = ctx.saved_tensors
        tokens, gradient = streams.flatten(0, 1), gradient.flatten(0, 1)
        with full_precision(streams.device.type):
            streams_gradient = torch.bmm(mixing.to(tokens.dtype).mT, gradient).view_as(streams)
            return streams_gradient, torch.bmm(gradient, tokens.mT).to(mixing.dtype)


def _merged(unmixed: Tensor, output: Tensor, mixing: Tensor, post: Tensor, into: Tensor) -> Tensor:
    """Products token by token: mixing [T, destination, source], post [T, destination, 1]."""
    tokens, output, merged = unmixed.flatten(0, 1), output.flatten(0, 1)[:, None], into.flatten(0, 1)
    mixing, post = mixing.to(tokens.dtype), post.to(tokens.dtype)
    with full_precision(unmixed.device.type):
        for block in blocks(tokens):
            own = torch.mul(post[block], output[block], out=merged[block])
            torch.baddbmm(own, mixing[block], tokens[block], out=own)
    return into


class _Merge(torch.autograd.Function):
    """`_merged` with its gradients, that of the mixed streams for `unmixed`."""

    @staticmethod
    def forward(ctx, unmixed: Tensor, output: Tensor, mixing: Tensor, post: Tensor) -> Tensor:
        ctx.save_for_backward(output, post)
        return _merged(unmixed, output, mixing, post, unmixed.new_empty(unmixed.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        output, post = ctx.saved_tensors
        output_gradient, post_gradient = output.new_empty(output.shape), output.new_empty(post.shape)
        outputs, tokens, factors = output.flatten(0, 1)[:, None], gradient.flatten(0, 1), post.mT.to(output.dtype)
        into = output_gradient.flatten(0, 1)[:, None], post_gradient.mT
        with full_precision(output.device.type):
            for block in blocks(tokens):
                own, (o, p) = tokens[block], (part[block] for part in into)
                torch.bmm(factors[block], own, out=o)
                torch.bmm(outputs[block], own.mT, out=p)
        return gradient, output_gradient, None, post_gradient.to(post.dtype)


def collapse(streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i pre_i x_i: [B, S, C, M], [C, B, S] -> [B, S, M]; and the streams, as `stream_projection` returns them."""
    return _Collapse.apply(streams, _token_first(pre)[:, None].to(streams.dtype))


class _Collapse(torch.autograd.Function):
    """pre: [T, 1, C]."""

    @staticmethod
    def forward(ctx, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(streams, pre)
        return _read(streams, pre), streams.view_as(streams)

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
