"""What a CPU's cache holds: several passes over a large tensor are made block by block, so that it is read once."""

from torch import Tensor

CACHED = 2**19  # elements of a tensor at a time


def blocks(x: Tensor) -> list[slice]:
    """Slices of the first dimension, each of at most CACHED elements on the CPU; elsewhere the whole."""
    length = x.shape[0]
    if x.device.type != "cpu" or x.numel() <= CACHED:
        return [slice(0, length)]
    step = max(1, CACHED * length // x.numel())
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]
