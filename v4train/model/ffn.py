"""The dense SwiGLU feed-forward network: whole layers, and the shared expert of an MoE.

Shapes: M hidden, I inner width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.linear import StackedLinear

OAI_ALPHA = 1.702  # slope of the sigmoid in gpt-oss's SwiGLU


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) (V4 report section 4.2.3); no clamp where `limit` is None."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def swiglu_oai(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """gate * sigmoid(1.702 gate) * (up + 1), clamped like `swiglu` (gpt-oss model card, released code)."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(OAI_ALPHA * gate) * (up + 1)


ACTIVATIONS = {"swiglu": swiglu, "swiglu_oai": swiglu_oai}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [..., M] -> [..., M]; gate_up [2, I, M], down [M, I]."""

    def __init__(self, hidden_size: int, intermediate_size: int, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_up = StackedLinear(2, hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(swiglu(gate, up, self.limit))
