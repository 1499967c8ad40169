"""Raw averaged gradients between the backward pass and the step, in every ZeRO stage of DeepSpeed 0.19.8.

Each class knows where one kind of engine keeps them. They answer four things: the norms of what AdamW and Muon hold,
before Muon touches it; scale what AdamW holds; let a step do nothing; leave groups of parameters out of it all.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from v4train.optim.muon import Matrices, muon_updates
from v4train.parallel.flat_partitions import FlatPartitions, piece


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


def _over_all_ranks(adamw: Tensor, muon: Tensor, device: torch.device) -> tuple[float, float]:
    sums = torch.stack([adamw.to(device), muon.to(device)])
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return tuple(sums.tolist())


class WholeGradients:
    """Stage 0: `param.grad` is whole and equal on every rank that has the parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer, counted: Collection[str]) -> None:
        self._groups, self._counted = optimizer.param_groups, counted
        self._frozen: frozenset[str] = frozenset()

    def freeze(self, groups: frozenset[str]) -> None:
        self._frozen = groups

    def _tensors(self, use_muon: bool, among: Collection[str] | None = None) -> list[Tensor]:
        chosen = [g for g in self._groups if g["use_muon"] == use_muon and g["name"] not in self._frozen]
        groups = [g["params"] for g in chosen if among is None or g["name"] in among]
        return [parameter.grad for parameters in groups for parameter in parameters]

    def square_sums(self) -> tuple[float, float]:
        device = self._groups[0]["params"][0].device
        sums = (_sum_of_squares(self._tensors(muon, self._counted)) for muon in (False, True))
        return _over_all_ranks(*sums, device)

    def scale_adamw(self, factor: float) -> None:
        if tensors := self._tensors(False):
            torch._foreach_mul_(tensors, factor)

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

    def __init__(self, zero: object, groups: list[dict], counted: Collection[str]) -> None:
        """groups: what each of `averaged_gradients` belongs to."""
        self._zero, self._names = zero, [group["name"] for group in groups]
        self._counted = {i for i, name in enumerate(self._names) if name in counted}
        self._use_muon = [bool(group["use_muon"]) for group in groups]
        self._frozen: set[int] = set()

    def freeze(self, groups: frozenset[str]) -> None:
        self._frozen = {i for i, name in enumerate(self._names) if name in groups}

    def _pieces(self, use_muon: bool, among: Collection[int] | None = None) -> list[Tensor]:
        groups = [i for i, muon in enumerate(self._use_muon) if muon == use_muon and (among is None or i in among)]
        return [piece for i in groups for piece in self._zero.averaged_gradients[i]]

    def _muon_square_sum(self) -> Tensor:
        return _sum_of_squares(self._pieces(True, self._counted))

    def square_sums(self) -> tuple[float, float]:
        for i in self._frozen:  # DeepSpeed's own norm, which may drop a step, shall not see them either
            torch._foreach_zero_(self._zero.averaged_gradients[i])
        device = self._zero.averaged_gradients[0][0].device
        adamw = _sum_of_squares(self._pieces(False, self._counted))
        return _over_all_ranks(adamw, self._muon_square_sum(), device)

    def scale_adamw(self, factor: float) -> None:
        if pieces := self._pieces(False):
            torch._foreach_mul_(pieces, factor)

    @contextmanager
    def discarded(self) -> Iterator[None]:
        # DeepSpeed drops a step whose norm is not finite. Its norm is taken after Muon, ours before, so make sure.
        for pieces in self._zero.averaged_gradients.values():
            pieces[0].fill_(torch.nan)
        yield

    def clear(self) -> None:
        """DeepSpeed does."""


class FlatGradients(_ShardedGradients):
    """ZeRO 1-2: at the last backward pass Muon already replaces the gradients of its groups by updates.

    That is done here, in `get_flat_partition`, matrix by matrix (flat_partitions.py; DeepSpeed's own goes by tensors: a
    stack of experts that several ranks have parts of would be all of theirs). Squares are taken just before, over the
    part of each whole gradient that this rank owns. The momentum is not at risk: ZeRO commits it in `step`, unless the
    step is dropped. A frozen group doesn't come that far: it gets no update, and no momentum to commit.
    """

    def __init__(self, zero: object, groups: list[dict], counted: Collection[str], muon_settings: dict) -> None:
        super().__init__(zero, groups, counted)
        self._partitions, self._muon_settings = FlatPartitions(zero), muon_settings
        self._matrices = [group.get("matrices", Matrices()) for group in groups]
        self._squares: dict[int, Tensor] = {}
        self._norm = torch.zeros(())
        # Its own takes a collective for each group, of which pipeline stages have different ones.
        zero.scaled_global_norm = lambda norm_type=2: self._norm
        self._original = zero.get_flat_partition
        zero.get_flat_partition = self._get_flat_partition

    def freeze(self, groups: frozenset[str]) -> None:
        super().freeze(groups)
        for group in self._frozen:
            self._squares.pop(group, None)
            self._zero._muon_pending_momentum.pop(group, None)  # of a dropped step, say: `step` would commit it

    def _get_flat_partition(
        self, tensor_list: list[Tensor], first_offset: int, partition_size: int, *args: object, **kwargs: object
    ) -> object:
        group = kwargs["param_group_idx"]
        frozen = group in self._frozen
        if self._use_muon[group] and not tensor_list:
            self._squares[group] = _sum_of_squares([])
        if frozen or not tensor_list or not self._use_muon[group]:  # no tensors give zeros
            return self._original([] if frozen else tensor_list, first_offset, partition_size, *args, **kwargs)
        updates = self._muon_updates(group, int(partition_size))
        return [updates] if kwargs.get("return_tensor_list") else updates

    def _muon_updates(self, group: int, size: int) -> Tensor:
        """This rank's partition of a group, [size]; takes the squares of its gradients on the way."""
        gradients, matrices = self._zero.all_grad_tensors[group], self._matrices[group]
        own = self._partitions.own(group)
        staged = self._partitions.staged_momentum(group, matrices, gradients[0])
        self._squares[group] = _sum_of_squares(
            gradient.reshape(-1)[place.in_whole] for (_, place), gradient in zip(own, gradients, strict=True)
        )
        pieces = [piece(parameter, place, matrices) for parameter, place in own]
        momenta = [
            flat.view(-1, *of.shape) for of, flat in zip(pieces, staged.split([of.size for of in pieces]), strict=True)
        ]
        whole = [of.of(gradient) for of, gradient in zip(pieces, gradients, strict=True)]
        updates = muon_updates(whole, momenta, [of.matrices for of in pieces], **self._muon_settings)
        partition = gradients[0].new_zeros(size)
        for (_, place), of, update in zip(own, pieces, updates, strict=True):
            first = place.in_whole.start - of.in_whole.start
            partition[place.in_partition] = update.flatten()[first : first + place.size]
        return partition

    def square_sums(self) -> tuple[float, float]:
        sums = super().square_sums()
        self._norm = torch.tensor(sums, dtype=torch.float64).sum().sqrt()
        return sums

    def _muon_square_sum(self) -> Tensor:
        muon = [i for i, uses in enumerate(self._use_muon) if uses and i in self._counted and i not in self._frozen]
        squares = [self._squares[i] for i in muon]
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


def gradients_of(
    stage: int, optimizer: torch.optim.Optimizer, zero: object, counted: Collection[str], muon_settings: dict
) -> Gradients:
    """`optimizer` is ours, `zero` is what `deepspeed.initialize` made of it.

    muon_settings: of `muon_update`. counted: names of the groups whose gradients this rank counts in the norms; the
    ranks together count each once.
    """
    if stage == 0:
        return WholeGradients(optimizer, counted)
    groups = optimizer.param_groups
    if stage == 3:
        of_sub_groups = [groups[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp16_groups))]
        return PartitionedGradients(zero, of_sub_groups, counted)
    return FlatGradients(zero, groups, counted, muon_settings)
