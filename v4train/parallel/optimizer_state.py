"""Weights and optimizer state of one parameter at a time, in float32, in and out of every ZeRO stage.

`deepspeed.utils.safe_get_full_*` and `safe_set_full_*` (0.19.8) cannot do it: at stage 0 they have no float32 weight,
in ZeRO 1-2 they know no state before the first step and nothing of Muon's momentum (which holds whole matrices, not
slices), and in ZeRO 3 setting fails on a tensor whose size is no multiple of the ranks. So this file goes to the flat
buffers.

All tensors are flat inside. Each rank gives what it holds itself, so that saving needs no collective.
"""

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from v4train.optim.muon import Matrices
from v4train.parallel.flat_partitions import FlatPartitions, Piece, Place, piece

WEIGHT = "weight"
MUON_KEYS = ("momentum_buffer",)
ADAMW_KEYS = ("exp_avg", "exp_avg_sq")
STEP = "step"  # AdamW's number of updates, 0-dim float32


class StateAccess(Protocol):
    def holder(self, parameter: nn.Parameter) -> Tensor:
        """The tensor that torch's optimizer steps and keys its state by: the parameter or a flat buffer."""

    def pieces(self, parameter: nn.Parameter, key: str) -> list[tuple[int, Tensor]]:
        """(begin, flat float32 values from there on) of what this rank holds of the parameter, alone of its ZeRO group.

        Stage 0 has no such group: all of the parameter. Views where they can be; zeros for a state that does not exist
        yet.
        """

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether any of the parameter is here; `set` does nothing where none is."""

    def set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Put a flat whole tensor back; every rank gives the same."""

    def finish(self) -> None:
        """After the last `set`: let the model see the new weights. Collective."""


def adamw_state(optimizer: torch.optim.Optimizer, holder: Tensor) -> dict[str, Tensor]:
    """The state that torch.optim.AdamW(fused=True) makes at its first step, made now where there is none."""
    state = optimizer.state[holder]
    if not state:
        state[STEP] = torch.zeros((), dtype=torch.float32, device=holder.device)
        for key in ADAMW_KEYS:
            state[key] = torch.zeros_like(holder, requires_grad=False)
    return state


class WholeState:
    """Stage 0: parameters and states are whole tensors on every rank."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def holder(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def _tensor(self, parameter: nn.Parameter, key: str, create: bool) -> Tensor | None:
        if key == WEIGHT:
            return parameter.data
        if create and key in ADAMW_KEYS:
            return adamw_state(self._optimizer, parameter)[key]
        state = self._optimizer.state[parameter]
        if create and key not in state:
            state[key] = torch.zeros_like(parameter, requires_grad=False)
        return state.get(key)

    def pieces(self, parameter: nn.Parameter, key: str) -> list[tuple[int, Tensor]]:
        tensor = self._tensor(parameter, key, create=False)
        if tensor is None:
            tensor = torch.zeros_like(parameter)
        return [(0, tensor.detach().reshape(-1).float())]

    def holds(self, parameter: nn.Parameter) -> bool:
        return True

    def set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        self._tensor(parameter, key, create=True).copy_(value.view(parameter.shape))

    def finish(self) -> None:
        """Nothing is cached."""


class FlatState:
    """ZeRO 1-2: each group is one flat buffer, cut into equal partitions, one a rank; tensors straddle the cuts.

    Muon's momentum is the exception: each rank holds whole matrices, one after another, of all that touch its partition
    (flat_partitions.py), so the momentum of a straddling matrix exists on several ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, zero: object) -> None:
        self._optimizer, self._zero, self._partitions = optimizer, zero, FlatPartitions(zero)
        self._own: dict[nn.Parameter, Place | None] = {}  # what `_held` has found
        self._of_muon: dict[int, dict[nn.Parameter, tuple[Piece, int]]] = {}  # by group, what `_momentum` has

    def holder(self, parameter: nn.Parameter) -> Tensor:
        return self._zero.single_partition_of_fp32_groups[self._partitions.group(parameter)]

    def _matrices(self, group: int) -> Matrices:
        return self._optimizer.param_groups[group]["matrices"]

    def _momentum(self, parameter: nn.Parameter) -> tuple[Piece, Tensor] | None:
        """This rank's matrices of the parameter and their momentum, flat; None if it holds none."""
        group = self._partitions.group(parameter)
        matrices = self._matrices(group)
        if group not in self._of_muon:
            own, first = {}, 0
            for other, place in self._partitions.own(group):
                of = piece(other, place, matrices)
                own[other] = of, first
                first += of.size
            self._of_muon[group] = own
        if parameter not in self._of_muon[group]:
            return None
        of, first = self._of_muon[group][parameter]
        return of, self._partitions.momentum(group, matrices, self.holder(parameter)).narrow(0, first, of.size)

    def _partition(self, parameter: nn.Parameter, key: str, create: bool) -> Tensor | None:
        holder = self.holder(parameter)
        if key == WEIGHT:
            return holder.data
        state = adamw_state(self._optimizer, holder) if create else self._optimizer.state[holder]
        return state.get(key)

    def pieces(self, parameter: nn.Parameter, key: str) -> list[tuple[int, Tensor]]:
        held = self._held(parameter)
        if held is None:
            return []
        if key in MUON_KEYS:
            matrices, values = self._momentum(parameter)
            unit = math.prod(matrices.shape)
            begin = -(-held.in_whole.start // unit) * unit  # a matrix that straddles is the first one's to save
            return [(begin, values[begin - matrices.in_whole.start :])] if begin < matrices.in_whole.stop else []
        local = self._partition(parameter, key, create=False)
        if local is None:
            return [(held.in_whole.start, torch.zeros(held.size, device=self.holder(parameter).device))]
        return [(held.in_whole.start, local[held.in_partition])]

    def _held(self, parameter: nn.Parameter) -> Place | None:
        """This rank's range of the parameter; None for none."""
        if parameter not in self._own:
            me = dist.get_rank(group=self._partitions.processes(self._partitions.group(parameter)))
            self._own[parameter] = dict(self._partitions.places(parameter)).get(me)
        return self._own[parameter]

    def holds(self, parameter: nn.Parameter) -> bool:
        return self._held(parameter) is not None

    def set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if key in MUON_KEYS:
            if (own := self._momentum(parameter)) is not None:
                own[1].copy_(value[own[0].in_whole])
            return
        if (held := self._held(parameter)) is not None:
            local = self._partition(parameter, key, create=True)
            local[held.in_partition] = value[held.in_whole].to(local)

    def finish(self) -> None:
        self._zero.update_lp_params()


class PartitionedState:
    """ZeRO 3: every tensor is cut into equal, padded parts, one a rank; a sub-group's parts are one flat buffer."""

    def __init__(self, optimizer: torch.optim.Optimizer, zero: object) -> None:
        self._optimizer, self._zero = optimizer, zero

    def holder(self, parameter: nn.Parameter) -> Tensor:
        return self._zero.fp32_partitioned_groups_flat[self._position(parameter)[0]]

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """(sub-group, offset and size of this rank's part in its flat buffer)"""
        sub_group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return int(sub_group), int(offset), int(size)

    def _part(self, parameter: nn.Parameter, key: str, create: bool) -> Tensor | None:
        holder = self.holder(parameter)
        _, offset, size = self._position(parameter)
        if key == WEIGHT:
            return holder.data.narrow(0, offset, size)
        if key in MUON_KEYS or not create:  # Muon's buffer exists from the start
            flat = self._optimizer.state[holder].get(key)
        else:
            flat = adamw_state(self._optimizer, holder)[key]
        return None if flat is None else flat.narrow(0, offset, size)

    def pieces(self, parameter: nn.Parameter, key: str) -> list[tuple[int, Tensor]]:
        part = self._part(parameter, key, create=False)
        _, _, size = self._position(parameter)
        if part is None:
            part = torch.zeros(size, device=self.holder(parameter).device)
        begin = size * self._zero._get_param_partition_rank(parameter)
        left = parameter.ds_numel - begin  # the last part is padded
        return [(begin, part[:left])] if left > 0 else []

    def holds(self, parameter: nn.Parameter) -> bool:
        return True

    def set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        part = self._part(parameter, key, create=True)
        start = part.numel() * self._zero._get_param_partition_rank(parameter)
        own = value[start : start + part.numel()]
        part[: own.numel()] = own.to(part)

    def finish(self) -> None:
        # As at the end of DeepSpeed's step: drop gathered copies, refresh the parts, gather the small ones again.
        zero = self._zero
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def state_access(stage: int, optimizer: torch.optim.Optimizer, zero: object) -> StateAccess:
    """`optimizer` is ours, `zero` is what `deepspeed.initialize` made of it."""
    if stage == 0:
        return WholeState(optimizer)
    return PartitionedState(optimizer, zero) if stage == 3 else FlatState(optimizer, zero)
