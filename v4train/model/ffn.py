"""The dense SwiGLU feed-forward network: whole layers, and the shared expert of an MoE.

Shapes: M hidden, I inner width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from v4train.model.linear import StackedLinear
from v4train.model.seams import Seams

OAI_SLOPE = 1.702  # of the sigmoid in gpt-oss's SwiGLU


class Activation(NamedTuple):
    """g sigmoid(slope g) (u + shift) with g = min(gate, limit), u = clamp(up, -limit, limit); no clamp for None.

    Slope 1 and shift 0 are silu(g) u (V4 report section 4.2.3); gpt-oss has 1.702 and 1 (model card, released code).
    """

    slope: float
    shift: float
    limit: float | None

    def __call__(self, gate_up: Tensor) -> Tensor:
        """Halves [..., 2I] (gate, then up) to [..., I]."""
        unit, up = self.factors(gate_up)
        return unit.mul_(up)

    def factors(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """What the result is the product of, g sigmoid(slope g) and u + shift: [..., I] each."""
        gate, up = gate_up.chunk(2, dim=-1)
        up = up if self.limit is None else up.clamp(-self.limit, self.limit)
        return self._unit(self._clamped(gate)), up + self.shift if self.shift else up

    def backward(self, gate_up: Tensor, gradient: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Gradient [..., 2I] with respect to `gate_up`, of the output's [..., I]; each pass over memory counts."""
        unit, up = factors or self.factors(gate_up)
        result = torch.empty_like(gate_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(gradient, unit, out=up_gradient)
        change, gate = up * gradient, self._clamped(gate_up.chunk(2, dim=-1)[0])
        torch.ops.aten.silu_backward.grad_input(change, self._sloped(gate), grad_input=gate_gradient)
        if self.limit is not None:
            parts, lows = (gate_gradient, up_gradient), (-math.inf, -self.limit)
            for part, inputs, low in zip(parts, gate_up.chunk(2, dim=-1), lows, strict=True):
                torch.ops.aten.hardtanh_backward.grad_input(part, inputs, low, self.limit, grad_input=part)
        return result

    def needed(self, gate_up: Tensor) -> "Activation":
        """Itself, or the same without a limit that nothing reaches: passes over memory saved where asking is cheap."""
        if self.limit is None or gate_up.device.type != "cpu" or not gate_up.numel():
            return self
        low, high = gate_up.aminmax()
        return self._replace(limit=None) if max(-low.item(), high.item()) < self.limit else self

    def _clamped(self, gate: Tensor) -> Tensor:
        return gate if self.limit is None else gate.clamp(max=self.limit)

    def _sloped(self, gate: Tensor) -> Tensor:
        return gate if self.slope == 1 else gate * self.slope

    def _unit(self, gate: Tensor) -> Tensor:
        unit = F.silu(self._sloped(gate))
        return unit if self.slope == 1 else unit.div_(self.slope)


ACTIVATIONS = {"swiglu": (1.0, 0.0), "swiglu_oai": (OAI_SLOPE, 1.0)}  # slope and shift


class _Gated(torch.autograd.Function):
    """An activation that saves nothing but its input."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation.needed(gate_up)
        ctx.save_for_backward(gate_up)
        return ctx.activation(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return ctx.activation.backward(*ctx.saved_tensors, gradient), None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [..., M] -> [..., M]; gate_up [2, I, M], down [M, I]."""

    seams = Seams()

    def __init__(self, hidden_size: int, intermediate_size: int, limit: float | None) -> None:
        super().__init__()
        self.activation = Activation(*ACTIVATIONS["swiglu"], limit)
        self.gate_up = StackedLinear(2, hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.seams.heads
        return heads.reduce(self.share(heads.copy(x)))

    def share(self, x: Tensor) -> Tensor:
        """What the inner channels at hand add to the output."""
        return self.down(_Gated.apply(self.gate_up(x), self.activation))
