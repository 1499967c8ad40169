"""Where full precision is kept under autocast: norms, router, mHC coefficients, softmax (V4.md 2.1, 2.10)."""

import torch
from torch import Tensor


def full_precision(device_type: str) -> torch.autocast:
    """Context in which autocast is off, so that fp32 inputs are multiplied in fp32."""
    return torch.autocast(device_type, enabled=False)


def full(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is wider (a whole model in fp64 is exact to fp64, for tests)."""
    return x if x.dtype == torch.float64 else x.float()


def full_dtype(x: Tensor) -> torch.dtype:
    """That of `full(x)`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """[N, P, Q] x [N, Q, R], whose sums are not rounded: fp32, or fp64. A GPU takes `a` in the dtype of `b`."""
    if b.device.type == "cpu" or b.dtype == full_dtype(b):  # a CPU has no product of bf16 that it doesn't round
        return torch.bmm(full(a), full(b))
    return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products take x: autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices with instructions of its own, and not number by number."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
