"""One rank that counts what a training step sends: `python -m tests.distributed.traffic_worker OVERRIDES FOLDER`.

Rank 0 writes FOLDER/traffic.json: what was counted and what the formulas say, in bytes of all ranks, by axis.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.launch import finished
from v4train.analysis.communication import activation_bytes, gradient_bytes, muon_bytes
from v4train.analysis.work import Work
from v4train.config import Settings, load, settings
from v4train.data import Batch
from v4train.model import build_model
from v4train.parallel.engine import Engine
from v4train.parallel.groups import process_groups
from v4train.parallel.layout import Layout
from v4train.parallel.pipeline import PipelineEngine
from v4train.parallel.topology import leave, start_distributed, stop_distributed
from v4train.parallel.traffic import Traffic


def main(overrides: Path, folder: Path) -> None:
    made = settings(load(json.loads(overrides.read_text())))
    start_distributed(made.topology)
    sizes, train = made.topology.sizes, made.train
    with torch.device("meta"):
        model = build_model(made.model)
    layout = Layout(model, made.topology, train.sequence_length)
    layout.materialise(model)
    model.recompute = train.recompute
    rows, accumulation = train.micro_batch_size, train.global_batch_size // (train.micro_batch_size * sizes.data)
    kind = PipelineEngine if sizes.pipeline > 1 else Engine
    numbers = {"micro_batch_size": rows, "accumulation_steps": accumulation}
    numbers |= {"grad_clip": train.grad_clip, "precision": made.precision}
    engine = kind(model.train(), made.optimizer, made.parallelism, made.topology, layout, **numbers)
    batches = [batch_of(made, number) for number in range(accumulation)]
    for _ in range(2):  # a first step has more to tell
        traffic = Traffic(process_groups(made.topology))
        with traffic:
            engine.train(batches)
            engine.step(1e-4)
    expected = expected_bytes(made, engine, accumulation)
    counted = torch.tensor([traffic.sent[axis] for axis in expected], dtype=torch.float64)
    dist.all_reduce(counted)
    if made.topology.rank == 0:
        both = {"counted": dict(zip(expected, counted.tolist(), strict=True)), "expected": expected}
        (folder / "traffic.json").write_text(json.dumps(both))
    finished(folder)
    stop_distributed()
    leave()


def batch_of(made: Settings, number: int) -> Batch:
    """Rows of one document each; this rank's shard of them."""
    generator = torch.Generator().manual_seed(100 * made.topology.index("data") + number)
    shape = (made.train.micro_batch_size, made.train.sequence_length + 1)
    tokens = torch.randint(made.model.vocab_size, shape, generator=generator)
    rows = Batch(tokens[:, :-1].contiguous(), torch.zeros_like(tokens[:, :-1]), tokens[:, 1:].contiguous())
    return rows.shard(made.topology.index("context"), made.topology.sizes.context, made.topology.device)


def expected_bytes(made: Settings, engine: Engine, accumulation: int) -> dict[str, float]:
    """By the formulas; those of parameters are of this rank's, summed over the ranks."""
    sizes, stage = made.topology.sizes, made.parallelism.zero_stage
    axes = {axis: getattr(sizes, axis) for axis in ("pipeline", "data", "context", "tensor", "expert")}
    batch = {"rows": made.train.micro_batch_size, "accumulation": accumulation, "recompute": made.train.recompute}
    work = Work(made.train.sequence_length, **batch, **axes)
    expected = activation_bytes(made.model, work)
    of_gradients = of_muon = 0.0
    for group in engine.groups:
        number = sum(parameter.numel() for parameter in group.parameters.values())
        replicas = sizes.replicas // (sizes.expert if group.is_part("expert") else 1)
        matrices = (number if group.use_muon else 0) if made.optimizer.name == "muon" else None
        of_gradients += gradient_bytes(number, replicas, stage, accumulation, matrices) / replicas
        if group.use_muon and any(axis == "tensor" and dim >= -2 for axis, dim in group.parts):
            whole = muon_bytes(number * sizes.tensor, sizes.tensor, replicas, stage)
            of_muon += whole / (replicas * sizes.tensor)
    sums = torch.tensor([of_gradients, of_muon], dtype=torch.float64)
    dist.all_reduce(sums)
    return expected | {"gradients": sums[0].item(), "tensor": expected["tensor"] + sums[1].item()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
