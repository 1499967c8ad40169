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
        """Load [E] of each router by name, in the model's order; each selection bias moves against that of the global
        batch, by `speed`."""
        scored = self._model.routers()
        routers = self._model.hash_routers() | scored
        if not routers:
            return {}
        loads = torch.zeros(len(routers), self._model.config.moe.num_experts, dtype=torch.long, device=self._device)
        for own, router in zip(loads, routers.values(), strict=True):
            if not next(router.buffers()).is_meta:  # or another stage has it
                own += router.take_load() * self._counts
        found = dict(zip(routers, all_sum_tensor(loads), strict=True))
        for name, router in scored.items() if speed else ():
            if not router.bias.is_meta:
                router.update_bias(found[name], speed)
        return found

    def figures(self, loads: dict[str, torch.Tensor]) -> dict[str, object]:
        """For a step's line of metrics: max violation by layer (`blocks.3`, `mtp`), and the largest of the score-routed
        ones, where there are any: hash-routed layers have the loads that the text gives them."""
        by_layer = {_layer(name): float(max_violation(load)) for name, load in loads.items()}
        balanced = [by_layer[_layer(name)] for name in self._model.routers()]
        return ({"max_violation": max(balanced)} if balanced else {}) | {"max_violation_by_layer": by_layer}


def _layer(router: str) -> str:
    return router.removesuffix(".ffn.router").removesuffix(".block")
