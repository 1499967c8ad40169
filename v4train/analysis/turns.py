"""Time the steps of several programs in turns: each in a process of its own, one at work at a time.

A machine's speed drifts over seconds where others share it, so what is compared must alternate step by step; and peak
memory is a process's, so each program needs its own. `take_turns` asks the programs, `serve` answers in each.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MARK = "turns: "  # of an answer's line among whatever else a program prints
STEP, FINISH = "step\n", "finish\n"


class Program:
    """A process that makes one step whenever it is asked to. It must call `serve`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Returns once it is ready. Raises RuntimeError where it ends before."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(list(command), text=True, env=environment, **pipes)
        self._answer()

    def step(self) -> float:
        """Seconds of one step."""
        return self._ask(STEP)

    def finish(self) -> dict[str, Any]:
        """Its last figures; the process ends."""
        figures = self._ask(FINISH)
        self._process.communicate()
        return figures

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, what: str) -> Any:
        self._process.stdin.write(what)
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        for line in self._process.stdout:
            if MARK in line:
                return json.loads(line.partition(MARK)[2])
        raise RuntimeError(f"{self._process.args} ended with exit code {self._process.wait()}")


def take_turns(
    commands: Mapping[str, tuple[Sequence[str], Mapping[str, str] | None]], rounds: int, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of the steps that count, and last figures, of each program by name.

    Args:
        commands: command and environment of each program.
        rounds: how often each makes a step that counts; every other round in reverse order.
        warm_up: rounds before those.

    Raises:
        RuntimeError: a program ended early; the others are killed.
    """
    programs: dict[str, Program] = {}
    try:
        for name, (command, environment) in commands.items():
            programs[name] = Program(command, environment)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(warm_up + rounds):
            for name in list(programs)[:: -1 if number % 2 else 1]:
                of_step = programs[name].step()
                if number >= warm_up:
                    seconds[name].append(of_step)
        return seconds, {name: program.finish() for name, program in programs.items()}
    except BaseException:
        for program in programs.values():
            program.kill()
        raise


def serve(
    step: Callable[[], object],
    finish: Callable[[], dict[str, Any]] = dict,
    rank: int = 0,
    agree: Callable[[bool], bool] = bool,
) -> None:
    """Make `step` whenever the parent process asks, and answer with its seconds; at last with `finish`.

    Args:
        rank: of this process among those that step together; the first one talks with the parent.
        agree: gives all of them what the first one says.
    """

    def answer(value: Any) -> None:
        if rank == 0:
            print(f"{MARK}{json.dumps(value)}", flush=True)

    answer(None)
    while agree(rank == 0 and sys.stdin.readline() == STEP):
        started = time.perf_counter()
        step()
        answer(time.perf_counter() - started)
    answer(finish())
