"""Time what a checkpoint costs a run, and print JSON.

    python tools/benchmark_checkpoint.py
    python tools/benchmark_checkpoint.py model=dense_small optimizer=adamw rounds=10

In turns: a checkpoint that training waits for (`waited`), and one that is written while it goes on, of which training
waits for the copy alone (`stall`). `share` is the median of their ratio within a turn; `slower` how much longer steps
take beside the writing. Everything but `rounds` is an override of conf/.
"""

import json
import statistics
import sys
import tempfile
import time

from v4train.config import load, settings
from v4train.errors import ConfigError, refusing_bad_input
from v4train.structured import wants_help
from v4train.train.allocator import restart_tuned


def main(arguments: list[str]) -> None:
    if wants_help(arguments):
        return print(__doc__)
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith("rounds="))
    rounds = given.get("rounds", "7")
    if not rounds.isdecimal() or int(rounds) == 0:
        raise ConfigError("rounds", rounds, "it must be a whole number above 0", "for example rounds=7")
    overrides = [argument for argument in arguments if not argument.startswith("rounds=")]
    with tempfile.TemporaryDirectory() as folder:
        made = settings(load([*overrides, f"run.dir={folder}/run", "tracking.mode=disabled", "checkpoint.keep=1"]))
        print(json.dumps(benchmark(made, int(rounds)), indent=1))


def benchmark(made, rounds: int) -> dict:
    from v4train.parallel.topology import start_distributed, stop_distributed
    from v4train.train import checkpoint
    from v4train.train.evaluation import find_data
    from v4train.train.heartbeat import Heartbeat
    from v4train.train.pretrain import make_trainer
    from v4train.train.run_directory import RunDirectory
    from v4train.train.signals import StopRequest

    start_distributed(made.topology)
    directory = RunDirectory(made.run.dir)
    directory.prepare(False, made.resolved)
    heartbeat = Heartbeat(directory.heartbeat, 0, 1)
    trainer, turns = make_trainer(made, find_data(made), directory, None, heartbeat, None), []

    def step() -> float:
        started = time.perf_counter()
        trainer.train_step(StopRequest())
        return time.perf_counter() - started

    for number in range(rounds + 1):
        alone = statistics.median(step() for _ in range(3))
        started = time.perf_counter()
        trainer.save()
        trainer.saving.writer.settle()
        waited = time.perf_counter() - started
        started = time.perf_counter()
        trainer.save()
        stall = time.perf_counter() - started
        beside = []
        while trainer.saving.writer.busy:
            beside.append(step())
        trainer.saving.writer.settle()
        if number:  # the first one's memory is new
            turns.append((waited, stall, stall / waited, sum(beside) / len(beside) / alone - 1 if beside else 0.0))
    path = checkpoint.newest(trainer.directory.checkpoints)
    size = sum(file.stat().st_size for file in path.iterdir())
    stop_distributed()
    waited, stall, share, slower = (statistics.median(column) for column in zip(*turns, strict=True))
    return {
        "checkpoint_mib": round(size / 2**20, 1),
        "waited_seconds": round(waited, 3),
        "stall_seconds": round(stall, 4),
        "share": round(share, 3),
        "slower": round(slower, 3),
    }


if __name__ == "__main__":
    restart_tuned()
    with refusing_bad_input():
        main(sys.argv[1:])
