"""Whether this process is a further start of a job that SLURM or torchrun starts again, with the same arguments."""

import os
import socket
from collections.abc import Mapping


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """Number of this SLURM job, as `ARRAY_INDEX` of an array's: SLURM takes the number of one of these for all."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def launch_name(environ: Mapping[str, str]) -> str | None:
    """What all starts of one job have in common, and no other job has; None for a process that nobody starts again."""
    if job := slurm_job(environ):
        return f"SLURM job {job}"
    if "TORCHELASTIC_RUN_ID" in environ:
        return f"torchrun {socket.gethostname()} {os.getppid()}"
    return None


def restarts(environ: Mapping[str, str]) -> int:
    """How often the job was started before this time."""
    return max(int(environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
