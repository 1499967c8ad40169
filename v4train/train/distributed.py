"""Small sums over all ranks, in one collective each."""

from collections.abc import Hashable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(
    values: Mapping[Hashable, Tensor | float], device: torch.device, same_names: bool = True
) -> dict[Any, float]:
    """Sum of each value over the ranks that have it (fp64). same_names: every rank has all of them."""
    vector = torch.stack([torch.as_tensor(value).double().cpu() for value in values.values()])
    if dist.get_world_size() > 1 and same_names:
        vector = _reduced(vector, device)
    own = dict(zip(values, vector.tolist(), strict=True))
    if same_names:
        return own
    everyones: list[dict[Any, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return {name: sum(of.get(name, 0.0) for of in everyones) for name in dict.fromkeys(chain(*everyones))}


def all_max(value: float, device: torch.device) -> float:
    """The largest of all ranks'."""
    if dist.get_world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def all_sum_tensor(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(value: Any) -> list[Any]:
    """Every rank's value (picklable), by rank."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def _reduced(vector: Tensor, device: torch.device) -> Tensor:
    vector = vector.to(device)
    dist.all_reduce(vector)
    return vector.cpu()
