"""How ZeRO 1-2 of DeepSpeed 0.19.8 lay a group's parameters out: one flat buffer, cut into equal partitions, one a
rank. And whose Muon's matrices are: a rank orthogonalises each matrix, and holds each momentum, that its partition has
a part of. Of a stack of experts that is its own experts, not the stack; only a matrix that straddles two partitions is
two ranks' work.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from v4train.optim.muon import Matrices


class Place(NamedTuple):
    """Where a part of a parameter lies: slices of the flat parameter and of the rank's partition."""

    in_whole: slice
    in_partition: slice

    @property
    def size(self) -> int:
        return self.in_whole.stop - self.in_whole.start


class Piece(NamedTuple):
    """The whole matrices that a partition has a part of: a slice of the flat parameter, their shape, and what they are
    to Muon."""

    in_whole: slice
    shape: tuple[int, ...]
    matrices: Matrices

    @property
    def size(self) -> int:
        return self.in_whole.stop - self.in_whole.start

    def of(self, tensor: Tensor) -> Tensor:
        """[matrices, *shape], a view where it can be."""
        return tensor.reshape(-1)[self.in_whole].view(-1, *self.shape)


class FlatPartitions:
    """Of one ZeRO optimizer."""

    def __init__(self, zero: object) -> None:
        self._zero = zero
        self._own: dict[int, list[tuple[nn.Parameter, Place]]] = {}
        self._place: dict[nn.Parameter, tuple[int, int]] = {}  # group, offset in the group's flat buffer
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                self._place[parameter] = (group, int(offset))

    def group(self, parameter: nn.Parameter) -> int:
        return self._place[parameter][0]

    def processes(self, group: int) -> dist.ProcessGroup:
        """The ranks that have a partition of it each."""
        return self._zero.real_dp_process_group[group]

    def places(self, parameter: nn.Parameter) -> Iterator[tuple[int, Place]]:
        """Each rank that has a part of it, and where."""
        group, offset = self._place[parameter]
        size = int(self._zero.partition_size[group])
        end = offset + parameter.numel()
        for rank in range(offset // size, (end - 1) // size + 1):
            first, last = max(offset, rank * size), min(end, (rank + 1) * size)
            yield rank, Place(slice(first - offset, last - offset), slice(first - rank * size, last - rank * size))

    def own(self, group: int) -> list[tuple[nn.Parameter, Place]]:
        """What this rank's partition of a group consists of, in order."""
        if group not in self._own:
            me = dist.get_rank(group=self.processes(group))
            parameters = self._zero.params_in_partition[group]
            self._own[group] = [(parameter, dict(self.places(parameter))[me]) for parameter in parameters]
        return self._own[group]

    def staged_momentum(self, group: int, matrices: Matrices, like: Tensor) -> Tensor:
        """Flat copy of this rank's momenta of a group, which ZeRO keeps if it does not drop the step."""
        holder = self._zero.single_partition_of_fp32_groups[group]
        self.momentum(group, matrices, like)
        return self._zero._muon_staging_momentum(holder, group)

    def momentum(self, group: int, matrices: Matrices, like: Tensor) -> Tensor:
        """This rank's momenta of a group, one piece after another, of the type of `like`; zeros at first."""
        state = self._zero.optimizer.state[self._zero.single_partition_of_fp32_groups[group]]
        if "momentum_buffer" not in state:
            size = sum(piece(parameter, place, matrices).size for parameter, place in self.own(group))
            state["momentum_buffer"] = torch.zeros(size, dtype=like.dtype, device=like.device)
        return state["momentum_buffer"]


def piece(parameter: nn.Parameter, place: Place, matrices: Matrices) -> Piece:
    """Of the part of a parameter that lies at `place`."""
    shape = tuple(parameter.shape[-3:] if matrices.joined else parameter.shape[-2:])
    if isinstance(matrices.rows, int):  # each head by itself
        shape, matrices = (matrices.rows, shape[-1]), Matrices()
    unit = math.prod(shape)
    first, last = place.in_whole.start // unit, -(-place.in_whole.stop // unit)
    return Piece(slice(first * unit, last * unit), shape, matrices)
