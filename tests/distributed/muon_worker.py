"""A model whose gradients are prescribed, and the program that updates it twice on every rank, for test_muon.py.

torchrun -m tests.distributed.muon_worker '{"folder": "...", "jobs": [{"stage": 1, "accumulation": 4, ...}]}'
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.distributed.engine_worker import Output
from tests.distributed.launch import finished
from tests.distributed.states import whole_state
from v4train.optim.param_groups import OptimizerConfig

ROWS, STEPS, CLIP = 24, 2, 1e-3
# name -> shape; the order is that of the model
SHAPES = {
    "square": (48, 48),
    "tall": (96, 32),
    "wide": (32, 96),
    "gate_up": (6, 2, 24, 40),  # experts
    "down": (6, 40, 24),
    "query_up": (64, 24),  # four heads
    "output_down": (4, 8, 24),  # four groups
    "fused": (24, 16),  # three matrices
    "low_rank": (48, 64),  # rank 3
    "few_tokens": (5, 24, 40),  # ranks 1, 2, 3, 24 and an expert without tokens
    "embed": (30, 16),
    "norm": (40,),
}
NOTES = {"query_up": ("head_rows", 16), "output_down": ("grouped", True), "fused": ("independent_rows", (4, 4, 16))}
RANKS = {"low_rank": (3,), "few_tokens": (1, 2, 3, 24, 0)}
DEFICIENT = tuple(RANKS)


def gradients(name: str, step: int) -> Tensor:
    """Gradient of each row of a step, [ROWS, ...]: float32; their mean is what the optimizer gets.

    Standard normal. Of a rank r: sums of r outer products that are the same in all rows, and in both steps.
    """
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    shape = SHAPES[name]
    size = 1 + 2 * step  # or clipping both steps' gradients to one norm would change no Muon update
    rows = torch.randn((ROWS, *shape), generator=generator) * size
    if name not in RANKS:
        return rows
    parts = []
    for number, rank in enumerate(RANKS[name]):
        always = torch.Generator().manual_seed(number)
        left, right = (torch.randn(size, rank, generator=always) for size in shape[-2:])
        parts.append(torch.einsum("nr,br,mr->bnm", left, torch.randn(ROWS, rank, generator=generator).abs(), right))
    return torch.stack(parts, dim=1).view(ROWS, *shape) * size


class Prescribed(nn.Module):
    """Loss <W, gradient of these rows>. Weights start at zero, so that what they become are the updates alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.zeros(SHAPES[name]))
        if name in NOTES:
            setattr(self.weight, *NOTES[name])

    def forward(self, rows: Tensor, step: int) -> Tensor:
        return (self.weight * gradients(self.name, step)[rows].mean(0)).sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in SHAPES:
            setattr(self, name, Prescribed(name))

    def forward(self, rows: Tensor, step: int) -> Output:
        return Output(rows, sum(part(rows, step) for part in self.children()))


def optimizer_config(per_head: bool = False, per_group: bool = True) -> OptimizerConfig:
    return OptimizerConfig(
        "muon", 1.0, (0.9, 0.95), 1e-20, 0.0, 0.95, 0.18, (8, 2), "float32", per_head=per_head, per_group=per_group
    )


def run_job(job: dict, topology: object) -> dict:
    """`STEPS` updates at a learning rate of 1: stage, accumulation, per_head, per_group; a list of the weights after
    each, what of Newton-Schulz's work and of the momentum was this rank's."""
    from v4train.optim import muon
    from v4train.parallel.engine import Engine
    from v4train.parallel.topology import ParallelismConfig

    work, original = [], muon.newton_schulz

    def counted(x: Tensor, *settings: object) -> Tensor:
        work.append(x.numel() * min(x.shape[-2:]))
        return original(x, *settings)

    muon.newton_schulz = counted
    accumulation, ranks = job["accumulation"], topology.sizes.data
    engine = Engine(
        Model(),
        optimizer_config(job["per_head"], job["per_group"]),
        ParallelismConfig(
            None, 1, 1, 1, 1, job["stage"], {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        ),
        topology,
        micro_batch_size=ROWS // ranks // accumulation,
        accumulation_steps=accumulation,
        grad_clip=CLIP,
        precision="fp32",
    )
    weights = []
    for step in range(STEPS):
        for part in torch.arange(ROWS).chunk(accumulation):
            engine.forward_backward(part.chunk(ranks)[topology.index("data")], step)
        engine.step(1.0)
        weights.append({name: state["weight"] for name, state in whole_state(engine).items()})
    muon.newton_schulz = original
    momenta = [state["momentum_buffer"].numel() for state in engine._optimizer.state.values() if "exp_avg" not in state]
    return {"weights": weights, "work": sum(work), "momentum": sum(momenta)}


def tensor_parts(rank: int, ranks: int) -> dict[str, Tensor]:
    """The parts of this rank's updates where the ranks share each tensor out, by tensor and dimension cut, both ways
    to see matrices; gradients are the mean of step 0."""
    from v4train.optim.muon import muon_update
    from v4train.optim.param_groups import param_groups
    from v4train.parallel.deepspeed_fixes import muon_settings
    from v4train.parallel.muon_optimizer import matrices_of

    found = {}
    for name, dim in TENSOR_CUTS:
        for option in (False, True):
            config = optimizer_config(option, option)
            part = nn.Parameter(gradients(name, 0).mean(0).chunk(ranks, dim)[rank].contiguous())
            part.__dict__.update({NOTES[name][0]: NOTES[name][1]} if name in NOTES else {})
            holder = nn.ParameterDict({name: part})
            (group,) = param_groups(holder, config, {name: (("tensor", dim),)})
            matrices = matrices_of(group, torch.distributed.group.WORLD)
            zeros = torch.zeros_like(part)
            found[f"{name} {dim} {option}"] = muon_update(
                part.detach(), zeros, matrices=matrices, **muon_settings(config)
            )
    return found


TENSOR_CUTS = [("query_up", -2), ("output_down", -3), ("wide", -1), ("tall", -2), ("gate_up", -2), ("down", -1)]


def main() -> None:
    spec = json.loads(sys.argv[1])
    folder = Path(spec["folder"])
    torch.set_num_threads(1)

    from v4train.parallel.topology import ParallelismConfig, leave, make_topology, start_distributed, stop_distributed

    topology = make_topology(ParallelismConfig(None, 1, 1, 1, 1, 1, {}))
    start_distributed(topology)
    results = {
        "jobs": [run_job(job, topology) for job in spec["jobs"]],
        "tensor": tensor_parts(topology.rank, 2) if topology.world_size == 2 else {},
    }
    torch.save(results, folder / f"rank_{topology.rank}.pt")
    finished(folder)
    stop_distributed()
    leave()


if __name__ == "__main__":
    main()
