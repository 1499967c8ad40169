"""Small sums over all ranks, in one collective each."""

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Sum of each value over the ranks (fp64); every rank gives the same names."""
    vector = torch.stack([torch.as_tensor(value).double().cpu() for value in values.values()])
    if dist.get_world_size() > 1:
        vector = _reduced(vector, device)
    return dict(zip(values, vector.tolist(), strict=True))


def all_sum_tensor(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _reduced(vector: Tensor, device: torch.device) -> Tensor:
    vector = vector.to(device)
    dist.all_reduce(vector)
    return vector.cpu()
