"""Time training steps and decoding, alone or beside another implementation, and print JSON.

    python tools/benchmark.py
    python tools/benchmark.py --against transformers --shapes 4x512 1x2048 1x4096 --dtypes fp32 bf16 --plot speed.png
    python tools/benchmark.py --shapes 1x4096 1x32768 --decode 1024 65536 model=flash_small

Anything that is not an option is an override of conf/, as in launch/pretrain.py. Each measurement is a process of its
own, so that its peak memory is its own; both implementations have the same weights, tokens, optimizer (AdamW) and
allocator, and take turns. A training step is forward, backward and update; decoding is one row, token by token, after a
real prefill. `mfu` is a share of the matrix product rate of its dtype, measured in the same run, FLOPs being those of
`v4train.analysis.flops`. `growth` is the exponent e of time ~ tokens^e over the single-row shapes.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from v4train.analysis.flops import training_flops_per_token
from v4train.config import load
from v4train.errors import ConfigError
from v4train.model import Transformer, build_model, model_config
from v4train.model.compiled import compile_model

OURS, PEERS = "v4train", ("transformers",)
PREFILL, DECODED = 4096, 64  # tokens at a time; tokens timed after the first ones
WARM_UP = 1  # steps before those that count


def main(arguments: list[str]) -> int:
    options, overrides = parser().parse_known_intermixed_args(arguments)
    overrides = overrides or ["model=benchmark"]
    try:
        if options.measure:
            print(json.dumps(measure(json.loads(options.measure), overrides)))
            return 0
        config = model_config(load(overrides).model)
        shapes = [parsed_shape(text) for text in options.shapes]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    peaks = {dtype: matmul_peak(dtype) for dtype in ("fp32", "bf16")}
    result: dict[str, Any] = {
        "model": config.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_gflops": {dtype: round(peak / 1e9, 1) for dtype, peak in peaks.items()},
    }
    implementations = [OURS, *([options.against] if options.against else [])]
    result["training"] = [
        row
        for dtype in options.dtypes
        for batch, length in shapes
        for row in take_turns(
            implementations,
            {"kind": "training", "batch": batch, "length": length, "dtype": dtype, "rounds": options.rounds}
            | ({"compiled": True} if options.compile else {}),
            overrides,
        )
    ]
    for row in result["training"]:
        flops = training_flops_per_token(config, row["length"]) * row["tokens_per_second"]
        row["mfu"] = round(flops / peaks[row["dtype"]], 4)
    result["decode"] = [
        row
        for dtype in options.dtypes
        for context in options.decode
        for row in take_turns([OURS], {"kind": "decode", "context": context, "dtype": dtype}, overrides)
    ]
    result["ratios"] = ratios(result["training"], options.against)
    result["growth"] = growth(result["training"])
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot(result, Path(options.plot))
    return 0


def parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048", "1x4096"], help="rows x tokens of a step")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--decode", nargs="*", default=[], type=int, help="cached tokens to decode after")
    parser.add_argument("--against", choices=PEERS, help="another implementation of the same model")
    parser.add_argument("--compile", action="store_true", help="train v4train's model as with compile=true")
    parser.add_argument("--rounds", type=int, default=5, help="steps whose median counts")
    parser.add_argument("--out", help="write the JSON there too")
    parser.add_argument("--plot", help="write a picture of tokens/s and memory over length there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def parsed_shape(text: str) -> tuple[int, int]:
    batch, cross, length = text.partition("x")
    if not (cross and batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise ConfigError("--shapes", text, "a shape is rows x tokens", "for example 4x512")
    return int(batch), int(length)


def take_turns(implementations: list[str], case: dict[str, Any], overrides: list[str]) -> list[dict[str, Any]]:
    """One measurement for each implementation, one process after another."""
    rows = []
    for implementation in implementations:
        case = case | {"implementation": implementation}
        print(f"{case}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--measure", json.dumps(case), *overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: the measurement of {case} ended with exit code {done.returncode}")
        rows.append(case | json.loads(done.stdout.splitlines()[-1]))
    return rows


def measure(case: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """What one process is for."""
    model = build_model(load(overrides).model)
    figures = training(model, **case) if case["kind"] == "training" else decoding(model, **case)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return figures | {"peak_memory_gib": round(peak * (1 if sys.platform == "darwin" else 1024) / 2**30, 3)}


def training(
    model: Transformer,
    implementation: str,
    batch: int,
    length: int,
    dtype: str,
    rounds: int,
    compiled: bool = False,
    **_: Any,
) -> dict[str, Any]:
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model.train()
    if compiled and implementation == OURS:
        compile_model(model)
    loss_of, parameters = (own_loss if implementation == OURS else peer_loss)(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, rounds)
    middle = statistics.median(seconds)
    return {
        "seconds": round(middle, 4),
        "fastest": round(min(seconds), 4),
        "slowest": round(max(seconds), 4),
        "tokens_per_second": round(batch * length / middle, 1),
    }


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


def decoding(model: Transformer, context: int, dtype: str, **_: Any) -> dict[str, Any]:
    model.eval()
    tokens = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, context + DECODED + WARM_UP)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        for part in tokens.split(PREFILL, dim=1):
            model(part, cache=cache)
        seconds = timed(lambda: model(tokens[:, :1], cache=cache), DECODED)
    return {"seconds": round(statistics.median(seconds), 6), "cache_bytes": cache.nbytes()}


def timed(step: Callable[[], Any], rounds: int) -> list[float]:
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = 2048
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    return 2 * size**3 / min(timed(lambda: matrix @ matrix, 8))


def ratios(rows: list[dict[str, Any]], against: str | None) -> list[dict[str, Any]]:
    """Speed over the peer's, and memory as a share of its."""
    found = {(row["implementation"], row["dtype"], row["batch"], row["length"]): row for row in rows}
    return [
        {
            "dtype": dtype,
            "shape": f"{batch}x{length}",
            "speed": round(row["tokens_per_second"] / found[against, dtype, batch, length]["tokens_per_second"], 2),
            "memory": round(row["peak_memory_gib"] / found[against, dtype, batch, length]["peak_memory_gib"], 3),
        }
        for (implementation, dtype, batch, length), row in found.items()
        if against and implementation == OURS
    ]


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponent between the shortest and the longest single row, for each implementation and dtype."""
    results = []
    for implementation, dtype in dict.fromkeys((row["implementation"], row["dtype"]) for row in rows):
        of = [row for row in rows if (row["implementation"], row["dtype"], row["batch"]) == (implementation, dtype, 1)]
        first, last = (pick(of, key=lambda row: row["length"], default=None) for pick in (min, max))
        if of and first["length"] < last["length"]:
            exponent = math.log(last["seconds"] / first["seconds"]) / math.log(last["length"] / first["length"])
            lengths = [first["length"], last["length"]]
            own = {"implementation": implementation, "dtype": dtype}
            results.append(own | {"of": lengths, "exponent": round(exponent, 3)})
    return results


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens/s and peak memory over the tokens of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    rows = result["training"]
    for implementation, dtype in dict.fromkeys((row["implementation"], row["dtype"]) for row in rows):
        of = [row for row in rows if (row["implementation"], row["dtype"]) == (implementation, dtype)]
        of.sort(key=lambda row: row["length"])
        for axes, key in ((speed, "tokens_per_second"), (memory, "peak_memory_gib")):
            axes.plot([row["length"] for row in of], [row[key] for row in of], "o-", label=f"{implementation} {dtype}")
    for axes, label in ((speed, "training tokens/s"), (memory, "peak memory (GiB)")):
        axes.set(xscale="log", yscale="log", xlabel="tokens in a row", ylabel=label)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
