"""How much the residual streams' mixing matrices amplify, one after another (mHC paper arXiv 2512.24880, section 3.1).

Shapes: L sites in order (two a block), T tokens, C streams.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from v4train.model import Transformer
from v4train.model.losses import in_backward
from v4train.model.residual import Coefficients

SAMPLED_TOKENS = 128  # of a micro-batch, evenly spread: the gain of 64 sites of 4 streams is 8 MFLOP


def composite_gains(mixing: Tensor) -> tuple[Tensor, Tensor]:
    """Gains of the products of mixing matrices B [L, T, destination, source], both [L, T].

    Forward, of site l: largest absolute row sum of B_l ... B_1, by which the largest stream can have grown since the
    embedding. Backward: largest absolute column sum of B_L ... B_l, by which a gradient can grow from the end down to
    the site's input. Both are 1 for doubly stochastic matrices, and for a plain residual.
    """
    identity = torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device).expand_as(mixing[0])
    forward, backward, product = [], [], identity
    for matrix in mixing:
        product = matrix @ product
        forward.append(product.abs().sum(-1).amax(-1))
    product = identity
    for matrix in mixing.flip(0):
        product = product @ matrix
        backward.append(product.abs().sum(-2).amax(-1))
    return torch.stack(forward), torch.stack(backward[::-1])


class MixingGain:
    """Collects the mixing matrices of a model's blocks while its hooks are there. Nothing of a plain residual, nor of a
    pipeline, in which no rank has all of them."""

    def __init__(self, model: Transformer) -> None:
        blocks = model.blocks
        whole = model.config.residual.kind != "plain" and not any(p.is_meta for p in blocks.parameters())
        self._sites = [site for b in blocks for site in (b.attention_residual, b.ffn_residual)] if whole else []
        self._mixing: dict[int, list[Tensor]] = defaultdict(list)  # by site, of each micro-batch [T, C, C]

    def hook(self) -> list[torch.utils.hooks.RemovableHandle]:
        return [site.register_forward_hook(self._record(number)) for number, site in enumerate(self._sites)]

    def take(self) -> dict[str, tuple[float, float]]:
        """{layer: (forward gain behind it, backward gain in front of it)}, means over tokens; forgets the matrices."""
        if not self._mixing:
            return {}
        mixing = torch.stack([torch.cat(self._mixing[number]) for number in range(len(self._sites))]).double()
        self._mixing.clear()
        forward, backward = (gains.mean(1).tolist() for gains in composite_gains(mixing))
        return {f"blocks.{i}": (forward[2 * i + 1], backward[2 * i]) for i in range(len(forward) // 2)}

    def _record(self, number: int) -> Callable:
        def record(site: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor, Coefficients]) -> None:
            if site.training and not in_backward():  # where it is a recomputation
                mixing = outputs[2].mixing.detach()
                self._mixing[number].append(mixing[:: -(-len(mixing) // SAMPLED_TOKENS)].float())

        return record
