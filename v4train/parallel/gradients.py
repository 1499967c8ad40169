"""Raw averaged gradients between the backward pass and the step, in every ZeRO stage of DeepSpeed 0.19.8.

Each class knows where one kind of engine keeps them. They answer four things: the norms of what AdamW and Muon hold,
before Muon touches it; scale what AdamW holds; let a step do nothing; leave groups of parameters out of it all.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Gradients(Protocol):
    def freeze(self, groups: frozenset[str]) -> None:
        """From now on drop the gradients of these optimizer groups, by name, before anything reads them."""

    def square_sums(self) -> tuple[float, float]:
        """Sum of the squares of all raw averaged gradients that (AdamW, Muon) holds; the same on every rank."""

    def scale_adamw(self, factor: float) -> None:
        """Multiply the gradients that AdamW holds."""

    @contextmanager
    def discarded(self) -> Iterator[None]:
        """Inside, the engine's step changes no weight and no optimizer state."""

    def clear(self) -> None:
        """Forget the gradients after a step."""


def _sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """0-dim float64, inf where float32 cannot hold it. Accumulated in float64: ZeRO 3 keeps one flat buffer, over
    which float32 loses the sixth digit, and the clipping factor would depend on the stage."""
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    total = torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square().sum()
    return torch.where(total > torch.finfo(torch.float32).max, torch.inf, total)


class WholeGradients:
    """Stage 0: `param.grad` is whole and equal on every rank."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = optimizer.param_groups
        self._frozen: frozenset[str] = frozenset()

    def freeze(self, groups: frozenset[str]) -> None:
        self._frozen = groups

    def _tensors(self, use_muon: bool) -> list[Tensor]:
        groups = [g["params"] for g in self._groups if g["use_muon"] == use_muon and g["name"] not in self._frozen]
        return [parameter.grad for parameters in groups for parameter in parameters]

    def square_sums(self) -> tuple[float, float]:
        return _sum_of_squares(self._tensors(False)).item(), _sum_of_squares(self._tensors(True)).item()

    def scale_adamw(self, factor: float) -> None:
        torch._foreach_mul_(self._tensors(False), factor)

    @contextmanager
    def discarded(self) -> Iterator[None]:
        for group in self._groups:
            for parameter in group["params"]:
                parameter.grad = None  # both optimizers skip a parameter without gradient
        yield

    def clear(self) -> None:
        """DeepSpeed does."""


class _ShardedGradients:
    """What ZeRO 1-3 have in common: `averaged_gradients[i]` are this rank's pieces of group i, without overlap."""

    def __init__(self, zero: object, groups: list[dict]) -> None:
        """groups: what each of `averaged_gradients` belongs to."""
        self._zero, self._names = zero, [group["name"] for group in groups]
        self._use_muon = [bool(group["use_muon"]) for group in groups]
        self._frozen: set[int] = set()

    def freeze(self, groups: frozenset[str]) -> None:
        self._frozen = {i for i, name in enumerate(self._names) if name in groups}

    def _pieces(self, use_muon: bool) -> list[Tensor]:
        groups = [i for i, muon in enumerate(self._use_muon) if muon == use_muon]
        return [piece for i in groups for piece in self._zero.averaged_gradients[i]]

    def _muon_square_sum(self) -> Tensor:
        return _sum_of_squares(self._pieces(True))

    def square_sums(self) -> tuple[float, float]:
        for i in self._frozen:  # DeepSpeed's own norm, which may drop a step, shall not see them either
            torch._foreach_zero_(self._zero.averaged_gradients[i])
        device = self._zero.averaged_gradients[0][0].device
        sums = torch.stack([_sum_of_squares(self._pieces(False)).to(device), self._muon_square_sum().to(device)])
        dist.all_reduce(sums, group=self._zero.dp_process_group)
        adamw, muon = sums.tolist()
        return adamw, muon

    def scale_adamw(self, factor: float) -> None:
        torch._foreach_mul_(self._pieces(False), factor)

    @contextmanager
    def discarded(self) -> Iterator[None]:
        # DeepSpeed drops a step whose norm is not finite. Its norm is taken after Muon, ours before, so make sure.
        for pieces in self._zero.averaged_gradients.values():
            pieces[0].fill_(torch.nan)
        yield

    def clear(self) -> None:
        """DeepSpeed does."""


class FlatGradients(_ShardedGradients):
    """ZeRO 1-2: at the last backward pass Muon has already replaced the gradients of its groups by updates.

    Their squares are therefore taken just before, in `get_flat_partition`, over the slice of each whole gradient that
    this rank owns. The momentum is not at risk: ZeRO commits it in `step`, unless the step is dropped. A frozen group
    doesn't come that far: it gets no update, and no momentum to commit.
    """

    def __init__(self, zero: object, groups: list[dict]) -> None:
        super().__init__(zero, groups)
        self._squares: dict[int, Tensor] = {}
        self._original = zero.get_flat_partition
        zero.get_flat_partition = self._get_flat_partition

    def freeze(self, groups: frozenset[str]) -> None:
        super().freeze(groups)
        for group in self._frozen:
            self._squares.pop(group, None)
            self._zero._muon_pending_momentum.pop(group, None)  # of a dropped step, say: `step` would commit it

    def _get_flat_partition(self, tensor_list: list[Tensor], *args: object, **kwargs: object) -> object:
        group = kwargs["param_group_idx"]
        if group in self._frozen:
            return self._original([], *args, **kwargs)  # zeros, as for a rank that holds none of the group
        if self._use_muon[group]:
            self._squares[group] = _sum_of_squares(self._owned(group, tensor_list))
        return self._original(tensor_list, *args, **kwargs)

    def _owned(self, group: int, parameters: list[Tensor]) -> Iterator[Tensor]:
        zero = self._zero
        partition = dist.get_rank(group=zero.real_dp_process_group[group])
        for parameter, gradient in zip(parameters, zero.all_grad_tensors[group], strict=True):
            index = zero.get_param_id(parameter)
            start = int(zero.grad_start_offset[group][partition][index])
            room = int(zero.partition_size[group]) - int(zero.grad_partition_insertion_offset[group][partition][index])
            yield gradient.reshape(-1)[start : start + room]

    def _muon_square_sum(self) -> Tensor:
        squares = [self._squares[i] for i, muon in enumerate(self._use_muon) if muon and i not in self._frozen]
        return torch.stack(squares).sum() if squares else _sum_of_squares([])


class PartitionedGradients(_ShardedGradients):
    """ZeRO 3: `averaged_gradients` is per sub-group and raw until `step`, where Muon runs."""

    def freeze(self, groups: frozenset[str]) -> None:
        super().freeze(groups)
        if self._zero.use_muon:
            muon = enumerate(self._use_muon)
            self._zero.sub_groups_using_muon = [uses and i not in self._frozen for i, uses in muon]

    @contextmanager
    def discarded(self) -> Iterator[None]:
        # Muon would advance its momentum before the step is dropped.
        before, self._zero.use_muon = self._zero.use_muon, False
        with super().discarded():
            yield
        self._zero.use_muon = before

    def clear(self) -> None:
        # 0.19.8 never clears the buffer: a parameter that the next backward pass does not reach would be stepped by
        # this step's gradient again (by its Muon update, even).
        self._zero.grad_partitions_flat_buffer.zero_()


def gradients_of(stage: int, optimizer: torch.optim.Optimizer, zero: object) -> Gradients:
    """`optimizer` is ours, `zero` is what `deepspeed.initialize` made of it."""
    if stage == 0:
        return WholeGradients(optimizer)
    groups = optimizer.param_groups
    if stage == 3:
        return PartitionedGradients(zero, [groups[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp16_groups))])
    return FlatGradients(zero, groups)
