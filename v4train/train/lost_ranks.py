"""What a rank does when another one is gone: say so once, and end.

Nothing can be saved then, since what is missing is on the rank that is gone; the last checkpoint is whole.
"""

import os
import sys
from typing import NoReturn

import torch.distributed as dist

# How gloo and NCCL (torch 2.13) say that the other end is gone
GONE = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "remote process exited",
    "communicator was aborted",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank does not answer any more."""
    return any(words in str(error) for words in GONE)


def give_up(run_dir: str, rank: int, error: BaseException) -> NoReturn:
    """End this process with code 1; the first rank of the job to come here says why."""
    if _is_first():
        cause = " ".join(str(error).split())[:200]
        print(
            f"error: rank {rank} lost contact with another rank, which was killed or is out of reach: the job ends; "
            f"the same command continues from the last checkpoint in {run_dir} ({cause})",
            file=sys.stderr,
            flush=True,
        )
    sys.stdout.flush()
    os._exit(1)  # leaving the process group would wait for the rank that is gone


def _is_first() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add("v4train/lost", 1) == 1
    except RuntimeError:  # the rank that is gone kept the store
        return True
