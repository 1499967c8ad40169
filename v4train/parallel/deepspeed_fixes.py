"""Every place where DeepSpeed 0.19.8 is changed from outside, except for the shards of its optimizers.

Imports DeepSpeed inside the functions: which accelerator it takes is decided on import, from variables that
`start_distributed` sets first. tests/distributed/test_engine.py holds each of these to a number.
"""

import logging
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from v4train.model.recompute import passes_on
from v4train.optim.config import OptimizerConfig
from v4train.optim.muon import Matrices, muon_update
from v4train.optim.param_groups import ParameterGroup
from v4train.parallel.groups import Groups
from v4train.parallel.sizes import REDUCED


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


def install_muon(groups: list[ParameterGroup], matrices: list[Matrices], config: OptimizerConfig) -> None:
    """Make DeepSpeed's ZeRO 3 call our Muon update: its own has other steps and scales, not configurable.

    There the optimizer sees only flat shards, so ZeRO itself gathers each tensor and calls `muon_update`, on one rank.
    The call site hands over `param.muon_num_heads` untouched, which carries what of the tensor is a matrix. ZeRO 1-2
    know by `param.use_muon` which groups are Muon's; the updates are made in gradients.py.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for group, of in zip(groups, matrices, strict=True):
        for parameter in group.parameters.values():
            parameter.use_muon = group.use_muon
            parameter.muon_num_heads = of

    def update(
        grad: Tensor,
        momentum: Tensor,
        beta: float = config.momentum,
        ns_steps: int = 0,
        nesterov: bool = True,
        ns_method: str = "",
        is_expert_group: bool = False,
        num_heads: Matrices | None = None,
    ) -> Tensor:
        return muon_update(grad, momentum, matrices=num_heads, **muon_settings(config))

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


def reduce_in_pieces(engine: object) -> None:
    """Have ZeRO 0 reduce REDUCED numbers at a time: deepspeed 0.19.8 copies 500 million into one tensor, and no key
    says otherwise."""
    reduce = engine.buffered_allreduce_fallback

    def in_pieces(grads: list[Tensor] | None = None, elements_per_buffer: int = REDUCED) -> None:
        reduce(grads, min(elements_per_buffer, REDUCED))

    engine.buffered_allreduce_fallback = in_pieces


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

    def __init__(self, model: nn.Module, experts: nn.Module | None = None) -> None:
        """experts: from `share_out_experts`."""
        super().__init__()
        self.model, self.experts = model, experts

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor | None, object]:
        output = self.model(*args, **kwargs)
        return output.loss, output


def share_out_experts(parameter_groups: list[ParameterGroup], groups: Groups) -> nn.Module | None:
    """Tell DeepSpeed 0.19.8 of experts that ranks share out; returns a module without parameters that it looks for.

    It knows its own MoE layer only, by class. The ranks that the parameters of one are reduced among it knows by name:
    the parameter's and, in ZeRO 1-2, the optimizer group's. ZeRO 3 would take only what its own AutoEP has placed.
    """
    shared_out = [group for group in parameter_groups if group.is_part("expert")]
    if not shared_out:
        return None
    from deepspeed.moe.layer import MoE
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups as of_deepspeed

    for name in ("experts", *(group.name for group in shared_out)):
        of_deepspeed._EXPERT_PARALLEL_GROUP[name] = groups["expert"]
        of_deepspeed._EXPERT_DATA_PARALLEL_GROUP[name] = groups["expert_replica"]
    for group in shared_out:
        for parameter in group.parameters.values():
            parameter.allreduce, parameter.group_name = False, "experts"
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = "experts"
    DeepSpeedEngine._validate_zero3_moe_compatibility = lambda self: None

    class SharedOutExperts(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, *_: object) -> None:
            """The groups exist."""

    return SharedOutExperts()


class Mpu:
    """The groups of tensor parallelism, as deepspeed 0.19.8 asks for them."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["tensor"]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._groups["tensor"])

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups["tensor"])

    def get_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self._groups["tensor"], 0)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_src_rank = get_model_parallel_src_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["replica"]

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._groups["replica"])

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups["replica"])

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups["replica"])
