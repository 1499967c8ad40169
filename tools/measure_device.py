"""What conf/plan.yaml says of a device, measured on this machine's CPU with all ranks at work at once, as JSON.

    python tools/measure_device.py --ranks 4

`flops_*` are those of products as the models have them, so that a run's `efficiency` is what it does besides;
`memory_bandwidth` is that of copies, bytes read and written. `bandwidth` is, by collective, what a rank sends while it
lasts, in the counting of v4train/analysis/communication.py; `latency` is the time of one number. The slowest rank's,
the fastest of all rounds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

from v4train.analysis.on_ranks import collected, report
from v4train.train.allocator import keep_freed_memory

TOKENS, HIDDEN, INNER = 1024, 256, 1024  # of a product
COPIED = 1 << 23  # numbers that are copied at a time: more than caches hold
SENT = 1 << 21  # numbers of a collective
REPEATS = 8  # of a round: ranks that share cores take turns within it


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if options.measure:
        return measure(options.measure, options.seconds)
    print(json.dumps(measured(options.ranks, options.seconds), indent=1))


def measured(ranks: int, seconds: float) -> dict[str, dict[str, float]]:
    """By collective or what else is measured."""
    try:
        results = collected([__file__, "--seconds", str(seconds), "--measure"], ranks)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from error
    slowest = {name: max(result[name] for result in results) for name in results[0]}
    product, copied = 2 * TOKENS * HIDDEN * INNER, 2 * 4 * COPIED
    sent = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "all_to_all": (ranks - 1) / ranks}
    result = {f"flops_{name}": product / slowest[name] for name in ("fp32", "bf16")}
    result |= {"memory_bandwidth": copied / slowest["copy"], "latency": slowest["one_number"]}
    result["bandwidth"] = {name: 4 * SENT * times / slowest[name] for name, times in sent.items()}
    return result


def measure(folder: str, seconds: float) -> None:
    """One rank's part: writes the seconds of everything, by name."""
    import torch
    import torch.distributed as dist

    def fastest(work: Callable[[], object]) -> float:
        """Of rounds that all ranks begin together; as many on each."""
        rounds, found, started = 0, float("inf"), time.perf_counter()
        left = torch.ones(1)
        while left:
            dist.barrier()
            before = time.perf_counter()
            for _ in range(REPEATS):
                work()
            found = min(found, (time.perf_counter() - before) / REPEATS)
            rounds += 1
            left.fill_(time.perf_counter() - started < seconds)
            dist.broadcast(left, 0)
        return found

    keep_freed_memory()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, weights = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(HIDDEN, INNER, dtype=dtype)
        results[name] = fastest(lambda x=x, weights=weights: x @ weights)
    source, target = torch.ones(COPIED), torch.ones(COPIED)
    results["copy"] = fastest(lambda: target.copy_(source))
    one, numbers = torch.ones(1), torch.ones(SENT)
    gathered, received = torch.empty(ranks * SENT), torch.empty(SENT)
    results["one_number"] = fastest(lambda: dist.all_reduce(one))
    results["all_reduce"] = fastest(lambda: dist.all_reduce(numbers))
    results["all_gather"] = fastest(lambda: dist.all_gather_into_tensor(gathered, numbers))
    results["all_to_all"] = fastest(lambda: dist.all_to_all_single(received, numbers))
    report(folder, rank, results)
    dist.barrier()
    dist.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default=4, type=int, help="processes that share this machine")
    parser.add_argument("--seconds", default=2.0, type=float, help="that each figure is measured for, about")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
