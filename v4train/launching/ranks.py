"""torchrun on this machine, with the exit code of its ranks: `python -m v4train.launching.ranks RANKS PROGRAM ARGS...`

torchrun itself ends with 1 whatever its ranks end with, so that a run which has saved and wants to be started again
(code 75) looks like one that failed; and it passes signals on by ending the ranks some seconds later, saved or not.
"""

import logging
import os
import signal
import sys
from collections.abc import Mapping

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from v4train.train.signals import REQUEUE, SIGNALS


def main(arguments: list[str]) -> int:
    ranks, *program = arguments
    # torch 2.13 sets its handlers when it starts the ranks, and can't be given none; SIGQUIT it may have
    options = ["--standalone", f"--nproc-per-node={ranks}", "--signals-to-handle=SIGQUIT"]
    for number in SIGNALS:
        signal.signal(number, _pass_on)
    logging.disable(logging.ERROR)  # what it says of a failed rank is said below, in a line
    try:
        torchrun(parse_args([*options, *program]))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if killed := [rank for rank, code in codes.items() if code < 0]:
            name = signal.Signals(-codes[killed[0]]).name
            print(f"error: rank {killed[0]} was ended by {name}", file=sys.stderr)
        return exit_code(codes)
    return 0


def exit_code(codes: Mapping[int, int]) -> int:
    """Of a job whose ranks ended with these: REQUEUE if one did, as all have saved then; else the lowest rank's.

    As shells do, it is 128 + the number of the signal that ended a rank.
    """
    if REQUEUE in codes.values():
        return REQUEUE
    first = codes[min(codes)]
    return first if first > 0 else 128 - first


def _pass_on(number: int, _: object) -> None:
    for rank in psutil.Process(os.getpid()).children():
        rank.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
