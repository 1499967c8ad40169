"""DeepSpeed's engine with one behaviour in every ZeRO stage: the same gradient norm, clipping, Muon and state."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from v4train.optim.param_groups import OptimizerConfig, param_groups, parameter_counts
from v4train.parallel.deepspeed_config import deepspeed_config
from v4train.parallel.deepspeed_fixes import LossFirst, sum_gradients_by_module
from v4train.parallel.gradients import gradients_of
from v4train.parallel.optimizer_state import ADAMW_KEYS, MUON_KEYS, STEP, WEIGHT, adamw_state, state_access
from v4train.parallel.topology import ParallelismConfig, Topology


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global L2 norm of all raw averaged gradients, before Muon and before clipping; frozen ones excluded.

    finite: False if that norm is inf or NaN; then weights and optimizer state are as before the step.
    """

    grad_norm: float
    finite: bool


class Engine:
    """Trains `model` on one data-parallel rank. Make it after `start_distributed`; one per process.

    model: float32 parameters on `topology.device`, equal on every rank; its output has `.loss`, whose gradient is
    divided by `accumulation_steps` and averaged over the data ranks. precision: fp32, or bf16 for float32 parameters
    under bfloat16 autocast with gradients summed in float32. grad_clip: largest norm of the gradients that AdamW holds,
    0 for none; Muon's are never clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_config: OptimizerConfig,
        parallelism: ParallelismConfig,
        topology: Topology,
        *,
        micro_batch_size: int,
        accumulation_steps: int,
        grad_clip: float,
        precision: str,
    ) -> None:
        import deepspeed  # reads which accelerator to use on import, so only now

        from v4train.parallel.muon_optimizer import build_optimizer

        self.model = model
        self.topology = topology
        self.groups = param_groups(model, optimizer_config)
        self.parameter_counts = parameter_counts(model, self.groups, optimizer_config)
        # Before ZeRO 3 empties the parameters
        self._parameters = {name: (parameter, parameter.shape) for name, parameter in model.named_parameters()}
        self._use_muon = {name: group.use_muon for group in self.groups for name in group.parameters}
        self._grad_clip = grad_clip
        self._optimizer = build_optimizer(self.groups, optimizer_config)
        if parallelism.zero_stage < 3:
            sum_gradients_by_module(model)
        self._engine, zero, _, _ = deepspeed.initialize(
            model=LossFirst(model),
            optimizer=self._optimizer,
            config=deepspeed_config(
                parallelism.deepspeed,
                zero_stage=parallelism.zero_stage,
                data_size=topology.data_size,
                micro_batch_size=micro_batch_size,
                accumulation_steps=accumulation_steps,
                precision=precision,
                use_muon=optimizer_config.name == "muon",
            ),
            dist_init_required=False,
        )
        self._gradients = gradients_of(parallelism.zero_stage, self._optimizer, zero)
        self._state = state_access(parallelism.zero_stage, self._optimizer, zero)
        self._ready = self._begun = False  # the last, the first micro-batch has been through `forward_backward`

    def freeze(self, groups: Iterable[str]) -> None:
        """From the next step on, until the next call, leave these groups alone, by `ParameterGroup.name`.

        Neither their weights nor any state of their optimizers changes, and their gradients count in no norm. They may
        have none. What trains is no matter of `requires_grad`: ZeRO fixes that when it starts. Between steps only
        (ZeRO 1-2 run Muon within the last backward pass); RuntimeError otherwise.
        """
        if self._begun:
            raise RuntimeError("micro-batches of a step are under way: freeze between steps")
        frozen = frozenset(groups)
        self._check_names(frozen)
        for group in self._optimizer.param_groups:
            group["frozen"] = group["name"] in frozen
        self._gradients.freeze(frozen)

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
            self._engine.step()
        else:
            with self._gradients.discarded():
                self._engine.step()
        self._gradients.clear()
        self._ready = self._begun = False
        return StepResult(grad_norm, finite)

    def _set_learning_rates(self, learning_rate: float, by_group: Mapping[str, float]) -> None:
        self._check_names(by_group)
        for group in self._optimizer.param_groups:
            group["lr"] = by_group.get(group["name"], learning_rate)

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = set(names) - {group.name for group in self.groups}
        if unknown:
            raise ValueError(f"no parameter group {sorted(unknown)}; there are {[group.name for group in self.groups]}")

    @torch.no_grad()
    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(canonical name, tensors) of every parameter, in the model's order, whole, float32, on the CPU.

        Always `weight`; for Muon `momentum_buffer`; for AdamW `exp_avg`, `exp_avg_sq` and the 0-dim `step`. The same
        whatever the layout. Collective, one tensor at a time: every rank must run it to the end.
        """
        for name, (parameter, shape) in self._parameters.items():
            keys = MUON_KEYS if self._use_muon[name] else ADAMW_KEYS
            tensors = {key: self._state.get(parameter, key).cpu().view(shape).clone() for key in (WEIGHT, *keys)}
            if not self._use_muon[name]:
                step = self._optimizer.state[self._state.holder(parameter)].get(STEP)
                tensors[STEP] = torch.zeros(()) if step is None else step.detach().cpu().clone()
            yield name, tensors

    @torch.no_grad()
    def load_named_state(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Put back, to the last bit, what `named_state` gave; call it before the first step, on every rank.

        read: gives the tensors of one canonical name. Raises ValueError when they are not those of this model and
        optimizer, naming the parameter.
        """
        for name, (parameter, shape) in self._parameters.items():
            tensors = read(name)
            muon = self._use_muon[name]
            expected = dict.fromkeys((WEIGHT, *(MUON_KEYS if muon else ADAMW_KEYS)), shape)
            expected |= {} if muon else {STEP: torch.Size(())}
            found = {key: tensor.shape for key, tensor in tensors.items()}
            if found != expected:
                raise ValueError(f"state of {name} does not fit: expected {_shapes(expected)}, found {_shapes(found)}")
            for key in (WEIGHT, *(MUON_KEYS if muon else ADAMW_KEYS)):
                self._state.set(parameter, key, tensors[key].reshape(-1))
            if not muon:
                # Parameters in one flat buffer share the count; they always have the same.
                adamw_state(self._optimizer, self._state.holder(parameter))[STEP].copy_(tensors[STEP])
        self._state.finish()


def _shapes(shapes: Mapping[str, torch.Size]) -> dict[str, list[int]]:
    return {key: list(shape) for key, shape in sorted(shapes.items())}
