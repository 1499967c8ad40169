"""The optimizer objects given to DeepSpeed. Import it only after `start_distributed`: it imports DeepSpeed."""

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

from v4train.optim.config import OptimizerConfig
from v4train.optim.muon import Matrices, muon_updates
from v4train.optim.param_groups import ParameterGroup
from v4train.parallel.collectives import gathered
from v4train.parallel.deepspeed_fixes import install_muon, muon_settings


class MuonWithAdamW(MuonWithAuxAdam):
    """V4's Muon on groups with `use_muon`, torch's AdamW on the others.

    ZeRO 3 (deepspeed 0.19.8) recognises Muon by the base class, ZeRO 1-2 by "muon" in the class's name. The step is
    ours because the base's passes no stack of matrices at stage 0 and steps parameters that have no gradient.
    """

    def __init__(self, groups: list[dict], config: OptimizerConfig) -> None:
        super().__init__(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=_adamw_settings(config))
        self._muon_settings = muon_settings(config)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. ZeRO calls this once per group, with only that group in `param_groups`."""
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon_step(group)
        if self.aux_optimizer is None:  # a model of matrices only
            return
        self.aux_optimizer.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self.aux_optimizer.state = self.state
        self.aux_optimizer.step()

    def _muon_step(self, group: dict) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        updates = [parameter.grad for parameter in parameters]
        # Stage 0; a flat shard of ZeRO 1-3 carries an update that is already orthogonalised
        if parameters and parameters[0].ndim >= 2:
            momenta = [self._momentum(parameter) for parameter in parameters]
            updates = muon_updates(updates, momenta, [group["matrices"]] * len(parameters), **self._muon_settings)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def build_optimizer(
    groups: list[ParameterGroup], config: OptimizerConfig, tensor_group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """Muon with AdamW, or AdamW alone. Learning rates start at 0 and are set before each step.

    tensor_group: ranks that have parts of the same matrices.
    """
    matrices = [matrices_of(group, tensor_group) for group in groups]
    settings = [_settings(group, config, of) for group, of in zip(groups, matrices, strict=True)]
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(settings, **_adamw_settings(config))
    else:
        install_muon(groups, matrices, config)
        optimizer = MuonWithAdamW(settings, config)
    optimizer.register_step_pre_hook(_drop_frozen_gradients)
    return optimizer


def matrices_of(group: ParameterGroup, tensor_group: dist.ProcessGroup | None) -> Matrices:
    """What Muon has to gather: parts of a matrix, its last two dimensions, and not parts of a stack or whole heads."""
    dims = [dim for axis, dim in group.parts if axis == "tensor"]
    dims = [-2 if group.joined and dim == -3 else dim for dim in dims]
    dims = [dim for dim in dims if dim == -1 or dim == -2 and not isinstance(group.rows, int)]
    if not dims:
        return Matrices(group.rows, group.joined)
    rank, ranks = dist.get_rank(tensor_group), dist.get_world_size(tensor_group)
    return Matrices(
        group.rows,
        group.joined,
        gather=lambda x: gathered(x, dims[0], tensor_group),
        part=lambda x: x.chunk(ranks, dims[0])[rank].contiguous(),
    )


def _drop_frozen_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Without a gradient a parameter, or a flat shard of parameters, is left alone: no update, no decay, no state."""
    for group in optimizer.param_groups:
        if group["frozen"]:
            for parameter in group["params"]:
                parameter.grad = None


def _settings(group: ParameterGroup, config: OptimizerConfig, matrices: Matrices) -> dict:
    common = {
        "params": list(group.parameters.values()),
        "name": group.name,
        "moe": group.is_part("expert"),  # for deepspeed: reduce among ranks that have the same experts
        "use_muon": group.use_muon,
        "frozen": False,  # `Engine.freeze`
        "lr": 0.0,
        "weight_decay": config.weight_decay,
    }
    if group.use_muon:
        return common | {"momentum": config.momentum, "matrices": matrices}
    return common | {"betas": config.betas, "eps": config.eps}


def _adamw_settings(config: OptimizerConfig) -> dict:
    # fused: one pass over the memory, on CPU as on CUDA
    return {
        "lr": 0.0,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
