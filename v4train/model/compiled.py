"""`compile=true`: torch.compile of the parts of a model that are pure and made of many small operators.

These are the norms, the collapse of the streams, and unconstrained hyper-connections. The attention, the experts and
the cross-entropy are autograd functions that choose their own chunks and kernels: they stay as they are. So does mHC's,
which is one function already, and whose gradient torch 2.13's inductor gets wrong (its eager and aot_eager backends do
not).

It saves little on a CPU, for one to three minutes of compiling at the start of the first run (later ones find it in
torch's cache): docs/performance.md.
"""

import os
import shutil
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from v4train.model.norm import LayerNorm, RMSNorm
from v4train.model.residual import StreamCollapse, UnconstrainedHyperConnection

COMPILED = (UnconstrainedHyperConnection, StreamCollapse, RMSNorm, LayerNorm)


def compile_model(model: nn.Module) -> None:
    """Compile, in place and at the first training step, the forward pass of each module of the kinds in `COMPILED`.

    Parameter names stay, and so do hooks, which run around the compiled code. Results are those of before up to
    rounding (1e-5 of the loss). Another sequence length or batch size compiles again.
    """
    # All modules of a kind share one code object, whose compiled versions (by width and shape) are limited to 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, COMPILED):
            module.forward = _compiled_in_training(module)


def _compiled_in_training(module: nn.Module) -> Callable[..., Any]:
    """`module.forward`, compiled for training only: generation has a new length with each token."""
    eager = module.forward
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)

    @wraps(eager)
    def forward(*inputs: Any) -> Any:
        return (compiled if module.training and torch.is_grad_enabled() else eager)(*inputs)

    return forward


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile needs on a CPU: $CXX, g++ or clang++; None where there is none."""
    return next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))), None)
