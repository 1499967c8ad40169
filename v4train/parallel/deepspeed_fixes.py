"""Every place where DeepSpeed 0.19.8 is changed from outside, except for the shards of its optimizers.

Imports DeepSpeed inside the functions: which accelerator it takes is decided on import, from variables that
`start_distributed` sets first. tests/distributed/test_engine.py holds each of these to a number.
"""

import logging
import warnings
from datetime import timedelta

import torch
from torch import Tensor, nn

from v4train.model.recompute import passes_on
from v4train.optim.muon import muon_update
from v4train.optim.param_groups import OptimizerConfig, ParameterGroup


def quiet() -> None:
    """Silence deepspeed 0.19.8's chatter: hundreds of FutureWarnings of two renamed collectives, INFO and WARNING logs.

    The warnings it logs are about choices made here on purpose (an optimizer object that it did not test, autocast).
    """
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*is deprecated", category=DeprecationWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def init_distributed(device: torch.device, timeout: timedelta) -> None:
    """Start torch.distributed through DeepSpeed."""
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import sets WARNING
    # On CPU it compiles deepspeed_shm_comm (5-40 s at every start) for inference only; this says it cannot.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def install_muon(groups: list[ParameterGroup], config: OptimizerConfig) -> None:
    """Make DeepSpeed's ZeRO optimizers call our Muon update: theirs has other steps and scales, not configurable.

    In ZeRO 1-3 the optimizer sees only flat shards, so ZeRO itself gathers each matrix and calls `muon_update`. The
    call sites hand over `param.muon_num_heads` untouched, which carries the sizes of the stacked matrices.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for group in groups:
        for parameter in group.parameters.values():
            parameter.use_muon = group.use_muon
            parameter.muon_num_heads = group.independent_rows

    def update(
        grad: Tensor,
        momentum: Tensor,
        beta: float = config.momentum,
        ns_steps: int = 0,
        nesterov: bool = True,
        ns_method: str = "",
        is_expert_group: bool = False,
        num_heads: tuple[int, ...] | None = None,
    ) -> Tensor:
        return muon_update(grad, momentum, independent_rows=num_heads, **muon_settings(config))

    original_muon.muon_update = update
    muon_optimizer.muon_update = update


def muon_settings(config: OptimizerConfig) -> dict:
    """Keyword arguments of `muon_update` that are the same for every matrix."""
    return {
        "beta": config.momentum,
        "update_rms": config.update_rms,
        "steps": config.newton_schulz_steps,
        "dtype": getattr(torch, config.newton_schulz_dtype),
    }


def sum_gradients_by_module(model: nn.Module) -> None:
    """Give ZeRO 0-2 the order of gradient sums that ZeRO 3 has; call it in those stages only.

    ZeRO 3 passes every input of every module through an autograd node. A module that reads its input several times
    then sums those gradients before the ones from outside are added, and sums of three floats depend on their order.
    AdamW turns the difference into whole learning rates where a gradient is nothing but rounding (mHC at the start).
    """

    @passes_on
    def through_a_node(module: nn.Module, inputs: tuple) -> tuple:
        return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)

    for module in model.modules():
        module.register_forward_pre_hook(through_a_node)


class LossFirst(nn.Module):
    """Returns (loss, output): DeepSpeed 0.19.8 finds the tensors it must hook in tuples and dicts, not in dataclasses.

    Without that hook the ZeRO optimizers miss the start of the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor | None, object]:
        output = self.model(*args, **kwargs)
        return output.loss, output
