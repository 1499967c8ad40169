"""What DeepSpeed's engine and a second rank cost: training steps side by side, as JSON.

    python tools/benchmark_engine.py
    python tools/benchmark_engine.py --stages 0 1 --ranks 2 --shape 4x512 --rounds 7 model=benchmark

Anything that is not an option is an override of conf/. The cases take turns, each in processes of its own: a plain
PyTorch loop and the engine in each ZeRO stage, on one rank with all threads; and `--ranks` ranks, with an equal share
of threads and of the batch. A step is forward, backward, clipping and AdamW. `cost` is a stage's time over the plain
loop's, less one; `efficiency` the speed of the ranks over that of one process in the same stage. Both are medians over
the turns of ratios within a turn, because a machine's speed drifts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from v4train.config import Settings, load, settings
from v4train.data import Batch
from v4train.errors import ConfigError
from v4train.model import Transformer, build_model
from v4train.parallel.layout import Layout
from v4train.parallel.topology import start_distributed, stop_distributed
from v4train.train.allocator import keep_freed_memory, tuned_environment

WARM_UP = 2  # steps before those that count
MARK = "measured: "  # of a rank's line among others


def main(arguments: list[str]) -> int:
    options, overrides = parser().parse_known_intermixed_args(arguments)
    batch, _, length = options.shape.partition("x")
    common = ["model=benchmark", "optimizer=adamw", f"train.sequence_length={length}", "device=cpu"]
    common += [f"train.global_batch_size={batch}", f"train.max_steps={options.rounds}", *overrides]
    try:
        if options.measure:
            measure(options.measure, options.rounds, overrides)
            return 0
        load(common)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cases = [("plain", 1, "zero0"), *((f"zero{stage}", 1, f"zero{stage}") for stage in options.stages)]
    cases += [(f"zero{stage}", options.ranks, f"zero{stage}") for stage in options.stages]
    turns: list[dict[str, float]] = []
    for _ in range(options.turns):
        turn = {}
        for what, ranks, preset in cases:
            print(f"{what}, {ranks} rank(s)", file=sys.stderr, flush=True)
            seconds = start(what, ranks, options.rounds, [*common, f"parallelism={preset}"])
            turn[f"{what}_{ranks}"] = statistics.median(seconds)
        turns.append(turn)
    figures = compared(turns, options.stages, options.ranks)
    result = {"shape": options.shape, "threads": torch.get_num_threads(), **figures}
    print(json.dumps(result, indent=1))
    return 0


def compared(turns: list[dict[str, float]], stages: list[int], ranks: int) -> dict[str, dict[str, float]]:
    """Seconds of a step by case, and the two ratios by stage: each the median over the turns of a ratio within one."""

    def median(of: Callable[[dict[str, float]], float], digits: int = 3) -> float:
        return round(statistics.median(map(of, turns)), digits)

    return {
        "seconds": {case: median(lambda turn, case=case: turn[case], 4) for case in turns[0]},
        "cost": {f"zero{s}": median(lambda turn, s=s: turn[f"zero{s}_1"] / turn["plain_1"] - 1) for s in stages},
        "efficiency": {
            f"zero{s}": median(lambda turn, s=s: turn[f"zero{s}_1"] / turn[f"zero{s}_{ranks}"]) for s in stages
        },
    }


def parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=[0, 1], type=int, choices=range(4), help="of ZeRO")
    parser.add_argument("--ranks", default=2, type=int, help="ranks that share threads and batch")
    parser.add_argument("--shape", default="4x512", help="rows x tokens of a step, over all ranks")
    parser.add_argument("--rounds", default=3, type=int, help="steps of a turn that count, by their median")
    parser.add_argument("--turns", default=5, type=int, help="how often the cases take turns")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def start(what: str, ranks: int, rounds: int, overrides: list[str]) -> list[float]:
    """Seconds of each step that counts, in fresh processes."""
    program = [__file__, "--measure", what, "--rounds", str(rounds), *overrides]
    command = [sys.executable, *program]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *torchrun, *program]
    threads = str(max(1, torch.get_num_threads() // ranks))
    environment = tuned_environment(os.environ | {"OMP_NUM_THREADS": threads})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not lines:
        raise SystemExit(f"error: {what} on {ranks} rank(s) ended with exit code {done.returncode}\n{done.stderr}")
    return json.loads(lines[0])


def measure(what: str, rounds: int, overrides: list[str]) -> None:
    """One rank's part of a case; rank 0 prints."""
    keep_freed_memory()
    made = settings(load(overrides))
    train, topology = made.train, made.topology
    rows = train.global_batch_size // topology.sizes.data
    generator = torch.Generator().manual_seed(topology.index("data"))
    tokens = torch.randint(made.model.vocab_size, (rows, train.sequence_length + 1), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), torch.zeros_like(tokens[:, 1:]), tokens[:, 1:].contiguous())
    step = plain_step(made, batch) if what == "plain" else engine_step(made, batch)
    seconds = []
    for _ in range(WARM_UP + rounds):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    if topology.rank == 0:
        print(f"{MARK}{json.dumps(seconds[WARM_UP:])}", flush=True)
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
    sys.exit(main(sys.argv[1:]))
