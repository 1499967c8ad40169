"""Time training steps and decoding, alone or beside another implementation, and print JSON.

    python tools/benchmark.py
    python tools/benchmark.py --against transformers --shapes 4x512 1x2048 1x4096 --dtypes fp32 bf16 --plot speed.png
    python tools/benchmark.py --shapes 1x4096 1x32768 --decode 1024 65536
    python tools/benchmark.py --models flash_small dense_small train.recompute=block compile=true

Anything that is not an option is an override of conf/, as in launch/pretrain.py. Each implementation is a process of
its own, so that its peak memory is its own; both have the same weights, tokens and optimizer (AdamW), and take turns
step by step: `speed` is the median of the ratios within a turn, because a machine's speed drifts. v4train keeps freed
memory, as its runs do; the peer does with --same-allocator. A training step is forward, backward and update; decoding
is one row, token by token, after a real prefill. `mfu` is a share of the matrix product rate of its dtype, measured in
the same run, FLOPs being those of `v4train.analysis.flops`. `growth` compares the longest single row with the shortest:
`exponent` is e of time ~ tokens^e, `per_token` the ratio of times per token.
"""

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from v4train.analysis.flops import training_flops_per_token
from v4train.analysis.turns import serve, take_turns
from v4train.config import load
from v4train.errors import ConfigError, refusing_bad_input
from v4train.model import ModelConfig, Transformer, build_model, model_config
from v4train.model.compiled import compile_model
from v4train.train.allocator import keep_freed_memory, tuned_environment

OURS, PEERS = "v4train", ("transformers",)
PREFILL, DECODED = 4096, 64  # tokens at a time; tokens timed after the first ones
WARM_UP = 4  # steps before those that count: in bf16 the first ones prepare a product for each number of rows
PEAK_SECONDS = 0.2  # that a matrix product takes at most when its rate is measured


def main(arguments: list[str]) -> None:
    options, overrides = parser().parse_known_intermixed_args(arguments)
    if options.measure:
        return measure(json.loads(options.measure), overrides)
    shapes = [parsed_shape(text) for text in options.shapes]
    models = {name: model_config(load([f"model={name}", *overrides]).model) for name in options.models}
    result = benchmark(options, overrides, shapes, models)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot(result, Path(options.plot))


def benchmark(
    options: argparse.Namespace, overrides: list[str], shapes: list[tuple[int, int]], models: dict[str, ModelConfig]
) -> dict[str, Any]:
    """All measurements, one process after another."""
    peaks = {dtype: matmul_peak(dtype) for dtype in options.dtypes}
    implementations = [OURS, *([options.against] if options.against else [])]
    training, decode = [], []
    for model, dtype in itertools.product(models, options.dtypes):
        case = {"model": model, "dtype": dtype, "rounds": options.rounds, "warm_up": options.warm_up}
        case["same_allocator"] = options.same_allocator
        for batch, length in shapes:
            of = case | {"kind": "training", "batch": batch, "length": length}
            training += measured(implementations, of, overrides)
        for context in options.decode:
            of = case | {"kind": "decode", "context": context, "rounds": DECODED, "warm_up": WARM_UP}
            decode += measured([OURS], of, overrides)
    for row in training:
        flops = training_flops_per_token(models[row["model"]], row["length"]) * row["tokens_per_second"]
        row["mfu"] = round(flops / peaks[row["dtype"]], 4)
    return {
        "overrides": overrides,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_gflops": {dtype: round(peak / 1e9, 1) for dtype, peak in peaks.items()},
        "training": training,
        "decode": decode,
        "ratios": ratios(training, options.against),
        "growth": growth(training, "length") + growth(decode, "context"),
    }


def parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["benchmark"], help="of conf/model/")
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048", "1x4096"], help="rows x tokens of a step")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--decode", nargs="*", default=[], type=int, help="cached tokens to decode after")
    parser.add_argument("--against", choices=PEERS, help="another implementation of the same model")
    parser.add_argument("--same-allocator", action="store_true", help="the peer keeps freed memory too")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps before those that count")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--out", help="write the JSON there too")
    parser.add_argument("--plot", help="write a picture of tokens/s and memory over length there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def parsed_shape(text: str) -> tuple[int, int]:
    batch, cross, length = text.partition("x")
    if not (cross and batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise ConfigError("--shapes", text, "a shape is rows x tokens", "for example 4x512")
    return int(batch), int(length)


def measured(implementations: list[str], case: dict[str, Any], overrides: list[str]) -> list[dict[str, Any]]:
    """Figures of each implementation; all but the first have the ratios to it, turn by turn."""
    commands = {}
    for implementation in implementations:
        own = case | {"implementation": implementation}
        print(f"{own}", file=sys.stderr, flush=True)
        tuned = tuned_environment(os.environ) if keeps_freed_memory(own) else None
        commands[implementation] = [sys.executable, __file__, "--measure", json.dumps(own), *overrides], tuned
    try:
        seconds, figures = take_turns(commands, case["rounds"], case["warm_up"])
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from error
    ours = seconds[implementations[0]]
    rows = []
    for name, own in seconds.items():
        row = case | {"implementation": name, "seconds": round(statistics.median(own), 6)}
        row |= {"fastest": round(min(own), 6), "slowest": round(max(own), 6)}
        if name != implementations[0]:
            row["times_ours"] = statistics.median(peer / us for peer, us in zip(own, ours, strict=True))
        if case["kind"] == "training":
            row["tokens_per_second"] = round(case["batch"] * case["length"] / row["seconds"], 1)
        rows.append(row | figures[name])
    return rows


def keeps_freed_memory(case: dict[str, Any]) -> bool:
    """Whether the process has the allocator's settings of our runs."""
    return case["implementation"] == OURS or case["same_allocator"]


def measure(case: dict[str, Any], overrides: list[str]) -> None:
    """What one process is for: steps of training or decoding when they are asked for, then what memory they took."""
    if keeps_freed_memory(case):
        keep_freed_memory()
    config = load([f"model={case.pop('model')}", *overrides])
    model = build_model(config.model)
    model.recompute = config.train.recompute
    if config.compile and case["implementation"] == OURS:
        compile_model(model)
    step, figures = training(model, **case) if case["kind"] == "training" else decoding(model, **case)

    def finish() -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
        return figures | {"peak_memory_gib": round(peak * (1 if sys.platform == "darwin" else 1024) / 2**30, 3)}

    serve(step, finish)


def training(
    model: Transformer, implementation: str, batch: int, length: int, dtype: str, **_: Any
) -> tuple[Callable[[], None], dict[str, Any]]:
    """A training step, and the figures that need no timing."""
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss_of, parameters = (own_loss if implementation == OURS else peer_loss)(model.train())
    del model  # the peer has copies of the weights
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, {}


def own_loss(model: Transformer) -> tuple[Callable, Any]:
    """Loss function and parameters of our model."""
    return lambda inputs, targets: model(inputs, targets=targets).loss, model.parameters()


def peer_loss(model: Transformer) -> tuple[Callable, Any]:
    """Loss function and parameters of transformers' model with the same weights."""
    from v4train.hf import to_hf

    peer = to_hf(model).train()
    peer.set_experts_implementation("grouped_mm")  # its fastest

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = peer(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return loss_of, peer.parameters()


def decoding(
    model: Transformer, context: int, dtype: str, rounds: int, warm_up: int, **_: Any
) -> tuple[Callable[[], None], dict[str, Any]]:
    """One token after `context` others, and the figures that need no timing."""
    model.eval()
    tokens = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, context + rounds + warm_up)

    def read(part: torch.Tensor) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            model(part, cache=cache)

    for part in tokens.split(PREFILL, dim=1):
        read(part)
    return lambda: read(tokens[:, :1]), {"cache_bytes": cache.nbytes()}


def timed(step: Callable[[], Any], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of several; a smaller one where the machine is slow in this dtype."""
    size, best = 256, 0.0
    while True:
        matrix = torch.ones(size, size, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
        seconds = min(timed(lambda matrix=matrix: matrix @ matrix, 5 + WARM_UP))
        best = max(best, 2 * size**3 / seconds)
        if size == 2048 or 8 * seconds > PEAK_SECONDS:
            return best
        size *= 2


def ratios(rows: list[dict[str, Any]], against: str | None) -> list[dict[str, Any]]:
    """Speed over the peer's, and memory as a share of its."""
    keys = ("model", "dtype", "batch", "length")
    peers = {tuple(row[key] for key in keys): row for row in rows if row["implementation"] == against}
    results = []
    for row in rows:
        if against and row["implementation"] == OURS:
            peer = peers[tuple(row[key] for key in keys)]
            shape = {"model": row["model"], "dtype": row["dtype"], "shape": f"{row['batch']}x{row['length']}"}
            memory = row["peak_memory_gib"] / peer["peak_memory_gib"]
            results.append(shape | {"speed": round(peer["times_ours"], 2), "memory": round(memory, 3)})
    return results


def growth(rows: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Time over `by`, from the shortest to the longest single row, for each implementation, model and dtype."""
    keys, results = ("kind", "implementation", "model", "dtype"), []
    for own in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        of = [row for row in rows if tuple(row[key] for key in keys) == own and row.get("batch", 1) == 1]
        first, last = (pick(of, key=lambda row: row[by], default=None) for pick in (min, max))
        if not of or first[by] == last[by]:
            continue
        times, lengths = last["seconds"] / first["seconds"], last[by] / first[by]
        figures = {"exponent": round(math.log(times) / math.log(lengths), 3)}
        per_token = times / lengths if by == "length" else times  # decoding is timed by the token
        results.append(
            dict(zip(keys, own, strict=True)) | {by: [first[by], last[by]], **figures, "per_token": round(per_token, 3)}
        )
    return results


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens/s and peak memory over the tokens of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    rows = result["training"]
    keys = ("implementation", "model", "dtype")
    for own in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        of = [row for row in rows if tuple(row[key] for key in keys) == own]
        of.sort(key=lambda row: row["length"])
        for axes, key in ((speed, "tokens_per_second"), (memory, "peak_memory_gib")):
            axes.plot([row["length"] for row in of], [row[key] for row in of], "o-", label=" ".join(own))
    for axes, label in ((speed, "training tokens/s"), (memory, "peak memory (GiB)")):
        axes.set(xscale="log", yscale="log", xlabel="tokens in a row", ylabel=label)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
