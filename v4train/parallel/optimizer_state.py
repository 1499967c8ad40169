"""Weights and optimizer state of one parameter at a time, in float32, in and out of every ZeRO stage.

`deepspeed.utils.safe_get_full_*` and `safe_set_full_*` (0.19.8) cannot do it: at stage 0 they have no float32 weight,
in ZeRO 1-2 they know no state before the first step and nothing of Muon's momentum (which holds whole tensors, not
slices), and in ZeRO 3 setting fails on a tensor whose size is no multiple of the ranks. So this file goes to the flat
buffers.

All tensors are flat inside. Each rank gives what it holds itself, so that saving needs no collective.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

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

    Muon's momentum is the exception: each rank holds whole momenta, one after another, of every tensor that touches its
    partition, so a straddling tensor's momentum exists on several ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, zero: object) -> None:
        self._optimizer, self._zero = optimizer, zero
        self._own: dict[nn.Parameter, tuple[int, slice] | None] = {}  # what `_held` has found
        self._place: dict[nn.Parameter, tuple[int, int]] = {}  # group, offset in the group's flat buffer
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                self._place[parameter] = (group, int(offset))

    def holder(self, parameter: nn.Parameter) -> Tensor:
        return self._zero.single_partition_of_fp32_groups[self._place[parameter][0]]

    def _slices(self, parameter: nn.Parameter) -> Iterator[tuple[int, slice, slice]]:
        """(rank, slice of the whole flat parameter, slice of that rank's partition)"""
        group, offset = self._place[parameter]
        size = int(self._zero.partition_size[group])
        end = offset + parameter.numel()
        for rank in range(offset // size, (end - 1) // size + 1):
            first, last = max(offset, rank * size), min(end, (rank + 1) * size)
            yield rank, slice(first - offset, last - offset), slice(first - rank * size, last - rank * size)

    def _momentum(self, parameter: nn.Parameter, create: bool) -> Tensor | None:
        """This rank's whole momentum of the parameter; None if it holds none."""
        group, _ = self._place[parameter]
        held = self._zero.params_in_partition[group]
        before = [other is parameter for other in held]
        if not any(before):
            return None
        state = self._optimizer.state[self.holder(parameter)]
        if "momentum_buffer" not in state:
            if not create:
                return torch.zeros(parameter.numel(), device=self.holder(parameter).device)
            total = sum(other.numel() for other in held)
            state["momentum_buffer"] = torch.zeros(total, device=self.holder(parameter).device)
        start = sum(other.numel() for other in held[: before.index(True)])
        return state["momentum_buffer"].narrow(0, start, parameter.numel())

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
        begin, in_partition = held
        if key in MUON_KEYS:  # the first that holds a part of it
            return [] if begin else [(0, self._momentum(parameter, create=False))]
        local = self._partition(parameter, key, create=False)
        if local is None:
            return [(begin, torch.zeros(in_partition.stop - in_partition.start, device=self.holder(parameter).device))]
        return [(begin, local[in_partition])]

    def _held(self, parameter: nn.Parameter) -> tuple[int, slice] | None:
        """Where in the flat parameter this rank's range begins, and where it lies in the partition; None for none."""
        if parameter not in self._own:
            me = dist.get_rank(group=self._zero.real_dp_process_group[self._place[parameter][0]])
            own = [(in_whole.start, there) for rank, in_whole, there in self._slices(parameter) if rank == me]
            self._own[parameter] = own[0] if own else None
        return self._own[parameter]

    def holds(self, parameter: nn.Parameter) -> bool:
        return self._held(parameter) is not None

    def set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        group, _ = self._place[parameter]
        me = dist.get_rank(group=self._zero.real_dp_process_group[group])
        if key in MUON_KEYS:
            momentum = self._momentum(parameter, create=True)
            if momentum is not None:
                momentum.copy_(value)
            return
        local = self._partition(parameter, key, create=True)
        for rank, in_whole, in_partition in self._slices(parameter):
            if me == rank:
                local[in_partition] = value[in_whole].to(local)

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
