"""DeepSpeed's engine with one behaviour in every ZeRO stage: the same gradient norm, clipping, Muon and state."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from v4train.data import Batch
from v4train.model.cross_entropy import TokenLosses
from v4train.model.losses import Recorded
from v4train.optim.config import OptimizerConfig
from v4train.optim.param_groups import (
    ParameterGroup,
    is_muon_parameter,
    local_parameters,
    param_groups,
    parameter_counts,
)
from v4train.parallel.deepspeed_config import deepspeed_config
from v4train.parallel.deepspeed_fixes import (
    LossFirst,
    Mpu,
    muon_settings,
    reduce_in_pieces,
    share_out_experts,
    sum_gradients_by_module,
)
from v4train.parallel.gradients import gradients_of
from v4train.parallel.groups import Groups, process_groups
from v4train.parallel.layout import Layout
from v4train.parallel.optimizer_state import ADAMW_KEYS, MUON_KEYS, STEP, WEIGHT, adamw_state, state_access
from v4train.parallel.sizes import ParallelismConfig, reduce_bucket_size
from v4train.parallel.slices import Box, Slice
from v4train.parallel.topology import Topology

EngineSnapshot = list[tuple[Tensor, dict[str, Tensor]]]  # what holds weights, and the optimizer's state of it


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global L2 norm of all raw averaged gradients, before Muon and before clipping; frozen ones excluded.

    finite: False if that norm is inf or NaN; then weights and optimizer state are as before the step.
    """

    grad_norm: float
    finite: bool


class Engine:
    """Trains `model` on one rank of a layout. Make it after `start_distributed`; one per process.

    model: float32 parameters on `topology.device`, as `layout` has cut them, or whole and equal on every rank; its
    output has `.loss`, whose gradient is divided by `accumulation_steps` and averaged over data x context, and for
    `train` `.losses`. precision: fp32, or bf16 for float32 parameters
    under bfloat16 autocast with gradients summed in float32. grad_clip: largest norm of the gradients that AdamW holds,
    0 for none; Muon's are never clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_config: OptimizerConfig,
        parallelism: ParallelismConfig,
        topology: Topology,
        layout: Layout | None = None,
        *,
        micro_batch_size: int,
        accumulation_steps: int,
        grad_clip: float,
        precision: str,
    ) -> None:
        import deepspeed  # reads which accelerator to use on import, so only now

        from v4train.parallel.muon_optimizer import build_optimizer

        self.model, self.topology, self.layout = model, topology, layout
        cuts = {} if layout is None else layout.cuts
        dims = {name: parameter.dim() for name, parameter in model.named_parameters()}
        parts = {name: tuple((cut.axis, cut.dim - dims[name]) for cut in of) for name, of in cuts.items()}
        self.groups = param_groups(model, optimizer_config, parts)
        self.parameter_counts = parameter_counts(model, self.groups, optimizer_config)
        if layout is not None:  # of all ranks
            self.parameter_counts = dict.fromkeys(self.parameter_counts, 0)
            for name, parameter in model.named_parameters():
                muon = optimizer_config.name == "muon" and is_muon_parameter(name, parameter)
                self.parameter_counts["muon" if muon else "adamw"] += layout.shapes[name].numel()
        # Before ZeRO 3 empties the parameters
        self._parameters = {name: (parameter, parameter.shape) for name, parameter in local_parameters(model)}
        self._use_muon = {name: group.use_muon for group in self.groups for name in group.parameters}
        self._group_of = {name: group for group in self.groups for name in group.parameters}
        self._zero_stage = parallelism.zero_stage
        self._grad_clip, self.precision = grad_clip, precision
        groups = process_groups(topology)
        self._optimizer = build_optimizer(self.groups, optimizer_config, groups["tensor"])
        if parallelism.zero_stage < 3:
            sum_gradients_by_module(model)
        sizes = [parameter.numel() for parameter, _ in self._parameters.values()]
        config = deepspeed_config(
            parallelism.deepspeed,
            zero_stage=parallelism.zero_stage,
            data_size=topology.sizes.replicas,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            precision=precision,
            use_muon=optimizer_config.name == "muon",
            bucket=reduce_bucket_size(sum(sizes), max(sizes, default=0)) if topology.device.type == "cpu" else None,
        )
        self._engine, zero, _, _ = self._initialize(deepspeed, config, groups)
        if topology.device.type == "cpu":
            reduce_in_pieces(self._engine)
        counted = {group.name for group in self.groups if self._counts(group, parallelism.zero_stage)}
        settings = muon_settings(optimizer_config)
        self._gradients = gradients_of(parallelism.zero_stage, self._optimizer, zero, counted, settings)
        self._state = state_access(parallelism.zero_stage, self._optimizer, zero)
        self._ready = self._begun = False  # the last, the first micro-batch has been through `forward_backward`

    def _initialize(self, deepspeed: ModuleType, config: dict[str, Any], groups: Groups) -> tuple:
        module = LossFirst(self.model, share_out_experts(self.groups, groups))
        return deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=config, mpu=Mpu(groups), dist_init_required=False
        )

    def _counts(self, group: ParameterGroup, stage: int) -> bool:
        """Whether this rank counts the group's gradients in a norm, of all the ranks that have the same ones."""
        topology = self.topology
        if not group.is_part("tensor") and topology.index("tensor"):
            return False  # every rank along the axis has all of it
        copies = "expert_replica" if group.is_part("expert") else "replica"
        return stage > 0 or not topology.index(copies)  # ZeRO has no copies of a gradient

    def time_parts(self, timed: Callable[[str, Callable], Callable]) -> None:
        """Have what a step consists of run as `timed` makes it of (part, function): forward, backward and, of the
        optimizer, Muon's updates, which ZeRO 1-2 make within the last backward pass."""
        from deepspeed.runtime.zero.muon import original_muon

        if any(self._use_muon.values()):
            original_muon.muon_update = timed("optimizer", original_muon.muon_update)
        self._time_passes(timed)

    def _time_passes(self, timed: Callable[[str, Callable], Callable]) -> None:
        for name in ("forward", "backward"):
            setattr(self._engine, name, timed(name, getattr(self._engine, name)))

    def freeze(self, groups: Iterable[str]) -> None:
        """From the next step on, until the next call, leave these groups alone, by `ParameterGroup.name`.

        Neither their weights nor any state of their optimizers changes, and their gradients count in no norm. They may
        have none. What trains is no matter of `requires_grad`: ZeRO fixes that when it starts. Between steps only
        (ZeRO 1-2 run Muon within the last backward pass); RuntimeError otherwise.
        """
        self._check_between_steps("freeze")
        frozen = frozenset(groups)
        self._check_names(frozen)
        for group in self._optimizer.param_groups:
            group["frozen"] = group["name"] in frozen
        self._gradients.freeze(frozen)

    def set_batch(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """From the next step on. Between steps only; RuntimeError otherwise."""
        if self._begun:
            raise RuntimeError("micro-batches of a step are under way: change the batch between steps")
        made = self._engine
        made.set_train_micro_batch_size(micro_batch_size)
        made.set_train_batch_size(micro_batch_size * accumulation_steps * self.topology.sizes.replicas)
        # deepspeed 0.19.8 ends a step where a count since the start is a multiple of the accumulation
        made.micro_steps = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output without gradients, under the engine's precision; the caller sets `model.eval()`."""
        with torch.no_grad():
            return self._engine(*args, **kwargs)[1]

    def forward_backward(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch: the model's output, its loss already back-propagated.

        After `accumulation_steps` calls `step` must follow; RuntimeError otherwise.
        """
        if self._ready:
            raise RuntimeError("all micro-batches of this step are done: call step() first")
        self._begun = True
        loss, output = self._engine(*args, **kwargs)
        self._engine.backward(loss)
        self._ready = self._engine.is_gradient_accumulation_boundary()
        if not self._ready:
            self._engine.step()  # DeepSpeed counts micro-batches here and changes nothing
        return output

    def train(self, batches: Sequence[Batch]) -> Recorded:
        """All micro-batches of a step, back-propagated; what their forward passes recorded, `loss` included."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        shares: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in batches:
            output = self.forward_backward(batch.input_ids, batch.document_ids, batch.targets)
            for name, pair in self.model.losses.shares.items():
                shares[name] = tuple(a + b for a, b in zip(shares[name], pair, strict=True)) if name in shares else pair
            for name, value in {"loss": output.loss, **output.losses}.items():
                if name not in self.model.losses.shares:
                    sums[name] = sums.get(name, 0) + value.detach()
                    counts[name] += 1
        return Recorded(sums, counts, shares)

    def validation_loss(self, batch: Batch) -> Tensor:
        """`lm_loss` of a batch, 0-dim; 0 where it is another rank's to know. The caller sets `model.eval()`."""
        return self.forward(batch.input_ids, batch.document_ids, batch.targets).losses["lm_loss"]

    def token_losses(self, batch: Batch) -> TokenLosses | None:
        """Of every target at hand, [B, S]; None where another rank knows them. The caller sets `model.eval()`."""
        with self.model.losses.each_token() as found:
            self.validation_loss(batch)
        return found[0] if found else None

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits [B, S, V] of whole rows, the same on every rank. The caller sets `model.eval()`."""
        with nullcontext() if self.layout is None else self.layout.whole_rows(self.model):
            return self.forward(input_ids).logits

    def step(self, learning_rate: float, learning_rates_by_group: Mapping[str, float] | None = None) -> StepResult:
        """Update the weights once. `learning_rates_by_group` overrides the rate of groups by `ParameterGroup.name`.

        A step whose gradient norm is not finite is dropped: nothing changes, and the result says so.
        """
        if not self._ready:
            raise RuntimeError("micro-batches of this step are missing: call forward_backward() first")
        self._set_learning_rates(learning_rate, learning_rates_by_group or {})
        adamw, muon = self._gradients.square_sums()
        grad_norm = math.sqrt(adamw + muon)
        finite = math.isfinite(grad_norm)
        if finite:
            if self._grad_clip > 0:
                # The same formula as torch.nn.utils.clip_grad_norm_
                factor = self._grad_clip / (math.sqrt(adamw) + 1e-6)
                if factor < 1.0:
                    self._gradients.scale_adamw(factor)
            self._take_step()
        else:
            with self._gradients.discarded():
                self._take_step()
        self._gradients.clear()
        self._ready = self._begun = False
        return StepResult(grad_norm, finite)

    def _take_step(self) -> None:
        self._engine.step()

    def _set_learning_rates(self, learning_rate: float, by_group: Mapping[str, float]) -> None:
        self._check_names(by_group)
        for group in self._optimizer.param_groups:
            group["lr"] = by_group.get(group["name"], learning_rate)

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = set(names) - {group.name for group in self.groups}
        if unknown:
            raise ValueError(f"no parameter group {sorted(unknown)}; there are {[group.name for group in self.groups]}")

    def local_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, key, float32 values on the CPU, as they are now) of all that this rank is to save; no collective.

        Kinds: `weight`; for Muon `momentum_buffer`; for AdamW `exp_avg`, `exp_avg_sq` and the 0-dim `step`. Keys: the
        canonical name for a whole tensor, else that of a `Slice`, flat. All ranks together give each value once.
        """
        copied = _Copies()
        for number, (name, (parameter, shape)) in enumerate(self._parameters.items()):
            if not self._saves(name, number):
                continue
            muon, first, box = self._use_muon[name], False, self._box(name)
            shape = shape if self.layout is None else self.layout.shapes[name]
            size = math.prod(shape)
            for kind in (WEIGHT, *(MUON_KEYS if muon else ADAMW_KEYS)):
                for begin, values in self._state.pieces(parameter, kind):
                    values, first = copied.of(values), first or begin == 0
                    if len(values) == size:
                        yield kind, name, values.view(shape)
                    else:
                        yield kind, Slice(name, box, begin).key(), values
            if first and not muon and not any(side.start for side in box):  # all its parts have the same
                step = self._optimizer.state[self._state.holder(parameter)].get(STEP)
                yield STEP, name, torch.zeros(()) if step is None else step.detach().to("cpu", copy=True)

    def _saves(self, name: str, number: int) -> bool:
        """Whether this rank saves what it holds of the parameter, of all that hold the same; they take turns."""
        topology, group = self.topology, self._group_of[name]
        sizes = topology.sizes
        if sizes.tensor > 1 and not group.is_part("tensor"):
            if self.groups.index(group) % sizes.tensor != topology.index("tensor"):
                return False  # whole groups, since their buffers are copied whole
        if self._zero_stage > 0:  # each has its own range
            return True
        copies = "expert_replica" if group.is_part("expert") else "replica"
        count = sizes.replicas // (sizes.expert if copies == "expert_replica" else 1)
        return number % count == topology.index(copies)

    @torch.no_grad()
    def load_named_state(self, read: Callable[[str, Box], dict[str, Tensor]]) -> None:
        """Put back, to the last bit, what `local_state` gave; call it before the first step, on every rank.

        read: gives the tensors of one canonical name, by kind, each that part of the whole which lies at the box (but
        `step`, which has no dimension). Raises ValueError when they are not those of this model and optimizer, naming
        the parameter.
        """
        for name, (parameter, shape) in self._parameters.items():
            if not self._state.holds(parameter):
                continue
            tensors, muon = read(name, self._box(name)), self._use_muon[name]
            expected = dict.fromkeys((WEIGHT, *(MUON_KEYS if muon else ADAMW_KEYS)), shape)
            expected |= {} if muon else {STEP: torch.Size(())}
            found = {kind: tensor.shape for kind, tensor in tensors.items()}
            if found != expected:
                raise ValueError(f"state of {name} does not fit: expected {_shapes(expected)}, found {_shapes(found)}")
            for kind in (WEIGHT, *(MUON_KEYS if muon else ADAMW_KEYS)):
                self._state.set(parameter, kind, tensors[kind].reshape(-1))
            if not muon:
                # Parameters in one flat buffer share the count; they always have the same.
                adamw_state(self._optimizer, self._state.holder(parameter))[STEP].copy_(tensors[STEP])
        self._state.finish()

    @torch.no_grad()
    def snapshot(self, into: EngineSnapshot = ()) -> EngineSnapshot:
        """Copies in main memory of all weights and optimizer state that this rank holds. Between steps only.

        into: a snapshot of this engine that is needed no more, whose memory is used again.
        """
        self._check_between_steps("take a snapshot")
        found, free = [], iter(into)
        for holder, state in self._held_states():
            weight, then = next(free, (None, {}))
            of_state = {key: _copy(own, then.get(key)) for key, own in state.items()}
            found.append((_copy(holder.data, weight), of_state))
        return found

    def snapshot_bytes(self) -> int:
        """Of a `snapshot`, once the optimizer has its state; a little more where Muon's matrices straddle ranks."""
        held: dict[int, int] = {}
        for name, (parameter, _) in self._parameters.items():
            holder = self._state.holder(parameter)
            kinds = 1 + len(MUON_KEYS if self._use_muon[name] else ADAMW_KEYS)
            held[id(holder)] = kinds * holder.numel() * holder.element_size()
        return sum(held.values())

    @torch.no_grad()
    def roll_back(self, snapshot: EngineSnapshot) -> None:
        """Put back, to the last bit, what `snapshot` gave. Between steps only; collective."""
        self._check_between_steps("roll back")
        for (holder, state), (weight, then) in zip(self._held_states(), snapshot, strict=True):
            holder.data.copy_(weight)
            for key in state.keys() - then.keys():  # made since
                del state[key]
            for key, value in then.items():
                state[key].copy_(value)
        self._state.finish()

    def _held_states(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """What torch's optimizer steps on this rank, parameters or flat buffers, each with its state."""
        holders = (self._state.holder(parameter) for parameter, _ in self._parameters.values())
        for holder in {id(holder): holder for holder in holders}.values():
            yield holder, self._optimizer.state[holder]

    def _check_between_steps(self, what: str) -> None:
        if self._begun:
            raise RuntimeError(f"micro-batches of a step are under way: {what} between steps")

    def _box(self, name: str) -> Box:
        """Where in the whole parameter the part lies that is here."""
        if self.layout is not None:
            return self.layout.box(name)
        return tuple(slice(0, size) for size in self._parameters[name][1])


def _copy(tensor: Tensor, into: Tensor | None) -> Tensor:
    """On the CPU, in the memory of a tensor that is like it, if there is one."""
    if into is None or (into.shape, into.dtype) != (tensor.shape, tensor.dtype):
        return tensor.to("cpu", copy=True)
    return into.copy_(tensor)


class _Copies:
    """Of tensors that lie in few buffers: a buffer is copied at once, which is several times as fast."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[UntypedStorage, Tensor]] = {}  # the storage, lest its address be used again

    def of(self, flat: Tensor) -> Tensor:
        """Copy [n] on the CPU of a contiguous tensor [n]."""
        storage = flat.untyped_storage()
        address = storage.data_ptr()
        if address not in self._buffers:
            whole = torch.empty(0, dtype=flat.dtype, device=flat.device).set_(storage)
            self._buffers[address] = storage, whole.to("cpu", copy=True)
        return self._buffers[address][1].narrow(0, flat.storage_offset(), len(flat))


def _shapes(shapes: Mapping[str, torch.Size]) -> dict[str, list[int]]:
    return {key: list(shape) for key, shape in sorted(shapes.items())}
