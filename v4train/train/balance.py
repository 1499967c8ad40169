"""Loads of the experts over the global batch, and what they do to the routers' selection biases (V4.md 2.5)."""

import torch

from v4train.model import Transformer
from v4train.model.moe.balance import max_violation
from v4train.parallel.topology import Topology
from v4train.train.distributed import all_sum_tensor


class Balance:
    """Of one model, on every rank. Of ranks with the same tokens one `counts`."""

    def __init__(self, model: Transformer, topology: Topology) -> None:
        self._model, self._device = model, topology.device
        self._counts = not topology.index("tensor")

    def update(self, speed: float) -> dict[str, torch.Tensor]:
        """Load [E] of each router by name; each selection bias moves against that of the global batch, by `speed`."""
        routers = self._model.routers()
        if not routers:
            return {}
        loads = torch.zeros(len(routers), self._model.config.moe.num_experts, dtype=torch.long, device=self._device)
        for own, router in zip(loads, routers.values(), strict=True):
            if not router.bias.is_meta:  # or another stage has it
                own += router.take_load() * self._counts
        loads = all_sum_tensor(loads)
        for router, load in zip(routers.values(), loads, strict=True) if speed else ():
            if not router.bias.is_meta:
                router.update_bias(load, speed)
        return dict(zip(routers, loads, strict=True))


def violations(loads: dict[str, torch.Tensor]) -> dict[str, float]:
    """Max violation of each layer, `blocks.3` or `mtp`."""
    return {
        name.removesuffix(".ffn.router").removesuffix(".block"): float(max_violation(load))
        for name, load in loads.items()
    }
