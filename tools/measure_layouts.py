"""Peak memory and time of a step in several layouts on this machine's CPU, beside what the formulas say, as JSON.

    python tools/measure_layouts.py
    python tools/measure_layouts.py --ranks 4 --layouts "pipeline=2" "tensor=2 expert=2" --steps 5 model=flash_small

Each layout is a list of keys of `parallelism`; anything else that is no option is an override of conf/. Memory is how
much higher the largest rank's resident size gets than that of the same layout with a tiny model, which stands for the
process itself (libraries, their caches, connections), formula and measurement alike; time is the fastest step's.
`pairs` is the share of the pairs of layouts whose order by time the formula has right, of those that differ by a tenth
or more.
"""

import argparse
import itertools
import json
import resource
import sys
import time

from v4train.analysis.memory import GIB, peak_memory
from v4train.analysis.on_ranks import collected, report
from v4train.analysis.step_time import Device, Use, step_time
from v4train.errors import refusing_bad_input
from v4train.estimation import read_works
from v4train.model.config import model_config
from v4train.overrides import composed
from v4train.structured import structured
from v4train.train.allocator import keep_freed_memory

LAYOUTS = ["zero_stage=0", "zero_stage=2", "tensor=2", "context=2", "pipeline=2", "expert=4"]
TINY = ["model.hidden_size=32", "model.vocab_size=512", "model.moe.intermediate_size=16", "train.sequence_length=128"]
TINY += ["tokenizer.vocab_size=300"]
CLOSE = 1.1  # ratio of times below which an order means nothing


def main(arguments: list[str]) -> None:
    options, overrides = parser().parse_known_intermixed_args(arguments)
    common = ["model=benchmark", "train.global_batch_size=8", "train.sequence_length=512", "device=cpu", *overrides]
    if options.measure:
        return measure(options.measure, options.steps, overrides)
    plan = composed("plan", ["hardware=cpu"])
    device, use = structured(Device, plan.devices.cpu, "devices.cpu"), Use(plan.efficiency, plan.overlap)
    rows = [compared(layout, options, common, device, use) for layout in options.layouts]
    result = {"ranks": options.ranks, "layouts": rows, "pairs": right_pairs(rows)}
    print(json.dumps(result, indent=1))


def compared(
    layout: str, options: argparse.Namespace, common: list[str], device: Device, use: Use
) -> dict[str, object]:
    """Measured and formula of one layout."""
    ranks, steps = options.ranks, options.steps
    overrides = [*common, *(f"parallelism.{key}" for key in layout.split())]
    config = composed("pretrain", overrides)
    model = model_config(config.model)
    (work,) = read_works(config, model, ranks)
    seconds, memory = run(overrides, ranks, steps)
    _, of_process = run([*overrides, *TINY], ranks, 2)
    tiny = composed("pretrain", [*overrides, *TINY])
    small = model_config(tiny.model)
    (small_work,) = read_works(tiny, small, ranks)
    memory -= of_process
    expected = peak_memory(model, work).total - peak_memory(small, small_work).total
    return {
        "layout": layout,
        "gib": round(memory / GIB, 3),
        "formula_gib": round(expected / GIB, 3),
        "memory_ratio": round(expected / memory, 3),
        "seconds": round(seconds, 3),
        "formula_seconds": round(step_time(model, work, device, use).total, 3),
    }


def right_pairs(rows: list[dict]) -> float | None:
    """See above; None where all take as long."""
    pairs = [(a, b) if a["seconds"] < b["seconds"] else (b, a) for a, b in itertools.combinations(rows, 2)]
    pairs = [(a, b) for a, b in pairs if b["seconds"] >= CLOSE * a["seconds"]]
    right = [a["formula_seconds"] < b["formula_seconds"] for a, b in pairs]
    return round(sum(right) / len(right), 3) if right else None


def run(overrides: list[str], ranks: int, steps: int) -> tuple[float, float]:
    """(seconds of the fastest step, bytes of the largest rank)"""
    try:
        results = collected([__file__, "--steps", str(steps), *overrides, "--measure"], ranks)
    except RuntimeError as error:
        raise SystemExit(f"error: {' '.join(overrides)}: {error}") from error
    return max(seconds for seconds, _ in results), max(memory for _, memory in results)


def measure(folder: str, steps: int, overrides: list[str]) -> None:
    """One rank's part: writes [seconds, bytes]."""
    import torch

    from v4train.config import load, settings
    from v4train.data import Batch
    from v4train.model import build_model
    from v4train.parallel.engine import Engine
    from v4train.parallel.layout import Layout
    from v4train.parallel.pipeline import PipelineEngine
    from v4train.parallel.topology import leave, start_distributed, stop_distributed

    keep_freed_memory()
    made = settings(load(overrides))
    train, topology = made.train, made.topology
    start_distributed(topology)
    with torch.device("meta"):
        model = build_model(made.model)
    layout = Layout(model, topology, train.sequence_length)
    layout.materialise(model)
    model.recompute = train.recompute
    accumulation = train.global_batch_size // (train.micro_batch_size * topology.sizes.data)
    numbers = {"micro_batch_size": train.micro_batch_size, "accumulation_steps": accumulation}
    numbers |= {"grad_clip": train.grad_clip, "precision": made.precision}
    kind = PipelineEngine if topology.sizes.pipeline > 1 else Engine
    engine = kind(model.train(), made.optimizer, made.parallelism, topology, layout, **numbers)
    generator = torch.Generator().manual_seed(topology.index("data"))
    share = slice(
        topology.index("context") * (length := train.sequence_length // topology.sizes.context),
        (topology.index("context") + 1) * length,
    )
    batches = []
    for _ in range(accumulation):
        shape = (train.micro_batch_size, train.sequence_length + 1)
        tokens = torch.randint(made.model.vocab_size, shape, generator=generator)
        ids, targets = tokens[:, :-1][:, share].contiguous(), tokens[:, 1:]
        targets = targets[:, share.start : share.stop + (topology.sizes.context > 1)]
        batches.append(Batch(ids, torch.zeros_like(ids), targets.contiguous()))
    seconds = []
    for _ in range(steps):
        torch.distributed.barrier()
        started = time.perf_counter()
        engine.train(batches)
        engine.step(1e-4)
        seconds.append(time.perf_counter() - started)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report(folder, topology.rank, [min(seconds), peak])
    torch.distributed.barrier()
    stop_distributed()
    leave()


def parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default=4, type=int, help="processes of each layout")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help='e.g. "pipeline=2 zero_stage=1"')
    parser.add_argument("--steps", default=4, type=int, help="steps of each, the fastest counts")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
