"""`train.layers_every`: layer statistics every so many steps: activations, updates, gain of the streams.

A figure is of a whole layer (`blocks.3`) or of what stands beside them (`embedding`, `head`, `mtp`), whatever the
layout. Steps in between cost nothing, and no weight is copied whole.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from v4train.model import Transformer
from v4train.optim.param_groups import local_parameters
from v4train.train.distributed import all_sum
from v4train.train.mixing_gain import MixingGain

SAMPLED = 2**16  # elements of a tensor that its update is measured on, evenly spread: 0.4 % off, for 256 KiB


class LayerStatistics:
    """Measures the steps that it is entered for.

    Args:
        sizes: elements of each whole parameter by canonical name: tensors of a layer count by them.
        counts: whether this rank's gains count: of ranks with the same ones, one does.
    """

    def __init__(self, model: Transformer, sizes: Mapping[str, int], counts: bool, device: torch.device) -> None:
        self._model, self._sizes, self._counts, self._device = model, sizes, counts, device
        self._before: dict[str, Tensor] = {}
        self._gain = MixingGain(model)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the passes and the update of a step."""
        self._before = {name: _sample(parameter).clone() for name, parameter in local_parameters(self._model)}
        handles = self._gain.hook()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, activations: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """{layer: {activation_rms, update_ratio, gain_forward, gain_backward}} of the step measured last.

        activations: `ActivationScales.scales`, the first of these figures. Collective.
        """
        values: dict[tuple[str, str], Tensor | float] = {}
        gains = self._gain.take()
        for name, (forward, backward) in gains.items() if self._counts else ():
            values["forward", name], values["backward", name], values["gains", name] = forward, backward, 1.0
        for name, parameter in local_parameters(self._model):
            after, before = _sample(parameter), self._before[name]
            values["update", name] = (after - before).double().square().sum()
            values["weight", name] = after.double().square().sum()
            values["elements", name] = float(after.numel())
        self._before = {}
        sums: dict[str, dict[str, float]] = defaultdict(dict)
        for (kind, name), total in all_sum(values, self._device, same_names=False).items():
            sums[kind][name] = total
        return self._by_layer(sums, activations)

    def _by_layer(
        self, sums: Mapping[str, Mapping[str, float]], activations: Mapping[str, float]
    ) -> dict[str, dict[str, float]]:
        """A parameter that several ranks have whole is in each of its sums as often, so their ratios are right."""
        updates, weights = defaultdict(float), defaultdict(float)
        for name, elements in sums["elements"].items():
            if elements:
                layer, share = layer_of(name), self._sizes[name] / elements
                updates[layer] += share * sums["update"][name]
                weights[layer] += share * sums["weight"][name]
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for name in sorted({*activations, *weights}, key=_order):
            if name in activations:
                found[name]["activation_rms"] = activations[name]
            found[name]["update_ratio"] = math.sqrt(updates[name] / weights[name]) if weights[name] else 0.0
            for way in ("forward", "backward") if name in sums["gains"] else ():
                found[name][f"gain_{way}"] = sums[way][name] / sums["gains"][name]
        return dict(found)


def layer_of(name: str) -> str:
    """`blocks.3.attention.sink` is of layer `blocks.3`, `head.lm_head.weight` of `head`."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]


def _order(name: str) -> tuple[int, int, str]:
    first = {"embedding": 0, "blocks": 1}.get(name.partition(".")[0], 2)
    return first, int(name.partition(".")[2] or 0), name


def _sample(parameter: nn.Parameter) -> Tensor:
    """Some elements of what this rank has of a parameter, [n]: always the same ones."""
    own = parameter.detach().reshape(-1)
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3 has cut it up, and pads the last piece with whatever was there
        piece, rank = parameter.ds_tensor, dist.get_rank(parameter.ds_process_group)
        own = piece.detach()[: max(0, parameter.ds_numel - rank * piece.ds_numel)]
    return own[:: -(-own.numel() // SAMPLED) or 1]
