"""Initial values by name (DESIGN 7): each tensor is a function of the seed and its canonical name.

Any rank can compute any tensor, so a layout never changes the start. What the V4 report leaves open is a config key:
`model.init.std`, `model.residual.*_init`.
"""

import hashlib
import re

import torch
from torch import Tensor, nn

from v4train.model.config import ModelConfig
from v4train.model.moe.router import balanced_table


def generator_for(seed: int, name: str) -> torch.Generator:
    """CPU generator seeded by SHA-256 of seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, first_expert: int = 0) -> Tensor:
    """Initial value of one parameter or buffer, on the CPU, fp32 (int64 for a hash table).

    Each expert of a stack `...experts...` [E, ...] is drawn by its own name: `shape` may be that of the stack from
    `first_expert` on.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "table":
        generator = generator_for(config.init.seed, name)
        return balanced_table(config.vocab_size, config.moe.num_experts, config.moe.top_k, generator)
    if name.endswith("norm.weight"):
        return torch.ones(shape, device="cpu")
    if leaf == "gates":
        return torch.full(shape, config.residual.gate_init, device="cpu")
    if leaf == "static_bias":
        return _hc_static_bias(name, config) if config.residual.kind == "hc" else _static_bias(shape[0], config)
    if leaf == "sink" or leaf.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    if ".experts." in name:
        numbers = range(first_expert, first_expert + shape[0])
        return torch.stack([_normal(f"{name}.{expert}", shape[1:], config) for expert in numbers])
    return _normal(name, shape, config)


def _normal(name: str, shape: torch.Size, config: ModelConfig) -> Tensor:
    value = torch.empty(shape, device="cpu", dtype=torch.float32)
    return value.normal_(0.0, config.init.std, generator=generator_for(config.init.seed, name))


def _static_bias(rows: int, config: ModelConfig) -> Tensor:
    """mHC's S: [pre | post | mixing] at a residual site, [pre] at the final collapse."""
    residual, count = config.residual, config.residual.num_streams
    pre = torch.full((count,), residual.pre_bias_init, device="cpu")
    if rows == count:
        return pre
    post = torch.full((count,), residual.post_bias_init, device="cpu")
    mixing = residual.mixing_diagonal_init * torch.eye(count, device="cpu")
    return torch.cat([pre, post, mixing.flatten()])


def _hc_static_bias(name: str, config: ModelConfig) -> Tensor:
    """HC's [pre | post | mixing]: each site reads one stream in turn, writes to all, mixes none (arXiv 2409.19606)."""
    count = config.residual.num_streams
    block = re.match(r"blocks\.(\d+)\.", name)
    site = 2 * (int(block[1]) if block else config.num_layers) + name.endswith("ffn_residual.static_bias")
    identity = torch.eye(count, device="cpu")
    return torch.cat([identity[site % count], torch.ones(count, device="cpu"), identity.flatten()])


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Set every parameter and buffer of a materialised model."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(initial_value(name, tensor.shape, config))
