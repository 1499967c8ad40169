"""Small mixtures of experts in fp64 for tests: their options, and random weights."""

import torch

from tests.models import tiny_config

EXPERTS, TOP_K, HIDDEN = 5, 2, 6


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def config_of(**changes):
    sizes = {"moe__num_experts": EXPERTS, "moe__top_k": TOP_K, "hidden_size": HIDDEN, "moe__intermediate_size": 3}
    return tiny_config("swa swa", **{**sizes, **changes})


def filled(module, scale=1.0, dtype=torch.float64):
    module = module.to(dtype)
    with torch.no_grad():
        for seed, tensor in enumerate([*module.parameters(), *module.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(scale * random(*tensor.shape, seed=seed + 10))
    return module
