"""What DeepSpeed's engine and a second rank cost: training steps side by side, as JSON.

    python tools/benchmark_engine.py
    python tools/benchmark_engine.py --stages 0 1 --ranks 2 --shape 4x512 --rounds 15 model=benchmark

Anything that is not an option is an override of conf/. The cases take turns step by step, each in processes of its own:
a plain PyTorch loop and the engine in each ZeRO stage, on one rank with all threads; and `--ranks` ranks, with an equal
share of threads and of the batch. A step is forward, backward, clipping and AdamW. `cost` is a stage's time over the
plain loop's, less one; `efficiency` the speed of the ranks over that of one process in the same stage. Both are medians
of ratios within a turn, because a machine's speed drifts.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch

from v4train.analysis.on_ranks import on_ranks
from v4train.analysis.turns import serve, take_turns
from v4train.config import Settings, load, settings
from v4train.data import Batch
from v4train.errors import refusing_bad_input
from v4train.model import Transformer, build_model
from v4train.parallel.layout import Layout
from v4train.parallel.topology import start_distributed, stop_distributed
from v4train.train.allocator import keep_freed_memory
from v4train.train.distributed import all_max

WARM_UP = 3  # steps before those that count


def main(arguments: list[str]) -> None:
    options, overrides = parser().parse_known_intermixed_args(arguments)
    batch, _, length = options.shape.partition("x")
    common = ["model=benchmark", "optimizer=adamw", f"train.sequence_length={length}", "device=cpu"]
    common += [f"train.global_batch_size={batch}", f"train.max_steps={options.rounds}", *overrides]
    if options.measure:
        return measure(options.measure, overrides)
    load(common)
    cases = [("plain", 1, "zero0"), *((f"zero{stage}", 1, f"zero{stage}") for stage in options.stages)]
    cases += [(f"zero{stage}", options.ranks, f"zero{stage}") for stage in options.stages]
    commands = {}
    for what, ranks, preset in cases:
        program = [__file__, "--measure", what, *common, f"parallelism={preset}"]
        commands[f"{what}_{ranks}"] = on_ranks(program, ranks)
    try:
        seconds, _ = take_turns(commands, options.rounds, WARM_UP)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from error
    figures = compared(seconds, options.stages, options.ranks)
    result = {"shape": options.shape, "threads": torch.get_num_threads(), **figures}
    print(json.dumps(result, indent=1))


def compared(seconds: dict[str, list[float]], stages: list[int], ranks: int) -> dict[str, dict[str, float]]:
    """Seconds of a step by case, and the two ratios by stage: medians over the turns of a ratio within one."""

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))

    return {
        "seconds": {case: round(statistics.median(of), 4) for case, of in seconds.items()},
        "cost": {f"zero{s}": round(ratio(f"zero{s}_1", "plain_1") - 1, 3) for s in stages},
        "efficiency": {f"zero{s}": round(ratio(f"zero{s}_1", f"zero{s}_{ranks}"), 3) for s in stages},
    }


def parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=[0, 1], type=int, choices=range(4), help="of ZeRO")
    parser.add_argument("--ranks", default=2, type=int, help="ranks that share threads and batch")
    parser.add_argument("--shape", default="4x512", help="rows x tokens of a step, over all ranks")
    parser.add_argument("--rounds", default=15, type=int, help="steps of each case that count")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def measure(what: str, overrides: list[str]) -> None:
    """One rank's part of a case; rank 0 answers."""
    keep_freed_memory()
    made = settings(load(overrides))
    train, topology = made.train, made.topology
    rows = train.global_batch_size // topology.sizes.data
    generator = torch.Generator().manual_seed(topology.index("data"))
    tokens = torch.randint(made.model.vocab_size, (rows, train.sequence_length + 1), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), torch.zeros_like(tokens[:, 1:]), tokens[:, 1:].contiguous())
    step = plain_step(made, batch) if what == "plain" else engine_step(made, batch)
    alone = topology.world_size == 1
    serve(step, rank=topology.rank, agree=bool if alone else lambda go: bool(all_max(float(go), topology.device)))
    stop_distributed()


def plain_step(made: Settings, batch: Batch) -> Callable[[], object]:
    model = build_model(made.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(batch.input_ids, batch.document_ids, batch.targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), made.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(made: Settings, batch: Batch) -> Callable[[], object]:
    from v4train.parallel.engine import Engine

    start_distributed(made.topology)
    with torch.device("meta"):
        model: Transformer = build_model(made.model)
    layout = Layout(model, made.topology, made.train.sequence_length)
    layout.materialise(model)
    sizes = {"micro_batch_size": len(batch.input_ids), "accumulation_steps": 1}
    numbers = {"grad_clip": made.train.grad_clip, "precision": made.precision}
    engine = Engine(model.train(), made.optimizer, made.parallelism, made.topology, layout, **sizes, **numbers)

    def step() -> None:
        engine.train([batch])
        engine.step(1e-4)

    return step


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
