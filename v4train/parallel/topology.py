"""Which rank this process is, and how the ranks share the work.

The ranks are a box of pipeline x data x context x tensor, the last varying fastest, so that those that exchange most
are neighbours. Experts are spread over data x context: `expert` neighbours among those hold one set of them.

Everything up to `start_distributed` is arithmetic on the configuration and the environment, so an impossible layout
stops a run before anything is allocated.
"""

import logging
import math
import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch

from v4train.errors import ConfigError
from v4train.parallel.deepspeed_config import check_deepspeed_keys

AXES = ("pipeline", "data", "context", "tensor")


@dataclass
class ParallelismConfig:
    """Values and their meaning: conf/parallelism/*.yaml."""

    data: int | None
    expert: int | None
    tensor: int
    pipeline: int
    context: int
    zero_stage: int
    deepspeed: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How many ranks each dimension has. Their product, but for `expert`, is the world."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks over which the gradients of a parameter that is no expert's are averaged: data x context."""
        return self.data * self.context

    def __str__(self) -> str:
        return ", ".join(f"{axis} {getattr(self, axis)}" for axis in (*AXES, "expert"))


@dataclass(frozen=True)
class Topology:
    """This process's place: ranks count from 0; `device` is `cpu` or `cuda:<local_rank>`."""

    rank: int
    local_rank: int
    sizes: Sizes
    device: torch.device

    @property
    def world_size(self) -> int:
        return self.sizes.world

    def index(self, axis: str) -> int:
        """Rank along `pipeline`, `data`, `context`, `tensor`, `replica` (data x context), or another of `groups`."""
        sizes = self.sizes
        place = np.unravel_index(self.rank, [getattr(sizes, name) for name in AXES])
        if axis in AXES:
            return int(place[AXES.index(axis)])
        replica = int(place[AXES.index("data")] * sizes.context + place[AXES.index("context")])
        return {"replica": replica, "expert": replica % sizes.expert, "expert_replica": replica // sizes.expert}[axis]

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ along one axis only, in its order.

        Besides those of `index`: `expert_replica`, ranks that hold the same experts.
        """
        sizes = self.sizes
        box = np.arange(sizes.world).reshape([getattr(sizes, name) for name in AXES])
        if axis in AXES:
            box = np.moveaxis(box, AXES.index(axis), -1)
            return box.reshape(-1, box.shape[-1]).tolist()
        box = box.reshape(sizes.pipeline, sizes.replicas // sizes.expert, sizes.expert, sizes.tensor)
        if axis == "replica":
            box = box.reshape(sizes.pipeline, sizes.replicas, sizes.tensor)
        box = np.moveaxis(box, {"replica": 1, "expert_replica": 1, "expert": 2}[axis], -1)
        return box.reshape(-1, box.shape[-1]).tolist()


def make_topology(config: ParallelismConfig, device: str = "cpu", environ: Mapping[str, str] | None = None) -> Topology:
    """Check the layout against the ranks that were started and say which of them this process is.

    device: `cpu` or `cuda`. environ: of this process if None. Raises ConfigError for a layout that cannot run.
    """
    rank, world_size, local_rank = read_ranks(os.environ if environ is None else environ)
    place = torch.device("cuda", local_rank) if torch.device(device).type == "cuda" else torch.device(device)
    return Topology(rank, local_rank, check_layout(config, world_size), place)


def check_layout(config: ParallelismConfig, world_size: int) -> Sizes:
    """Sizes of every dimension on `world_size` ranks. Raises ConfigError where the layout doesn't fit them."""
    given = {name: getattr(config, name) for name in (*AXES, "expert")}
    for name, size in given.items():
        if size is not None and size < 1:
            raise ConfigError(f"parallelism.{name}", size, "it must be at least 1", f"set parallelism.{name}=1")
    if config.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(
            "parallelism.zero_stage", config.zero_stage, "ZeRO has stages 0 to 3", "use 0, 1, 2 or 3; 1 is the default"
        )
    check_deepspeed_keys(config.deepspeed)
    fixed = math.prod(given[name] or 1 for name in AXES)
    if world_size % fixed or (given["data"] is not None and fixed != world_size):
        _refuse_sizes(given, world_size)
    given["data"] = given["data"] or world_size // fixed
    replicas = given["data"] * given["context"]
    given["expert"] = given["expert"] or replicas
    if replicas % given["expert"]:
        rule = f"experts are spread over data {given['data']} x context {given['context']} ranks: it must divide them"
        fitting = math.gcd(given["expert"], replicas)
        raise ConfigError("parallelism.expert", given["expert"], rule, f"for example parallelism.expert={fitting}")
    if given["pipeline"] > 1 and config.zero_stage > 1:
        rule = "DeepSpeed's pipeline holds whole gradients and parameters"
        raise ConfigError("parallelism.zero_stage", config.zero_stage, rule, "set parallelism.zero_stage=1")
    return Sizes(**given)


def _refuse_sizes(given: Mapping[str, int | None], world_size: int) -> None:
    """Names the sizes, the rule, and the nearest layout that works."""
    product = " x ".join(f"{name} {given[name]}" for name in AXES if given[name] is not None)
    plural = "" if world_size == 1 else "es"
    left, fitting = world_size, {}
    for name in ("tensor", "context", "pipeline"):
        fitting[name] = math.gcd(given[name], left)
        left //= fitting[name]
    fitting["data"] = left
    wrong = [name for name, size in fitting.items() if given[name] is not None and given[name] != size]
    key = "data" if wrong == ["data"] else next(name for name in wrong if name != "data")
    remedy = f"set {' '.join(f'parallelism.{name}={fitting[name]}' for name in wrong)}"
    needed = math.prod(given[name] or 1 for name in AXES)
    rule = f"{product} must {'divide' if given['data'] is None else 'be'} the {world_size} process{plural} started"
    raise ConfigError(
        f"parallelism.{key}", given[key], rule, f"{remedy}, or start {needed} with torchrun --nproc-per-node={needed}"
    )


def read_ranks(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun or srun set them; plain `python` is a world of one.

    srun is recognised by SLURM_STEP_ID: an sbatch script has the other variables too, but is a single process.
    """
    if "RANK" in environ:
        return int(environ["RANK"]), int(environ.get("WORLD_SIZE", "1")), int(environ.get("LOCAL_RANK", "0"))
    if _launched_by_srun(environ):
        return int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]), int(environ["SLURM_LOCALID"])
    return 0, 1, 0


def rendezvous(topology: Topology, environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0: as given, else from SLURM's node list and job id, else a free port here."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if "RANK" not in environ and _launched_by_srun(environ):
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        job, step = int(environ.get("SLURM_JOB_ID", "0")), int(environ.get("SLURM_STEP_ID", "0"))
        return address or first_node(nodes), int(port or 20000 + (job * 17 + step) % 20000)
    if topology.world_size > 1 and not (address and port):
        raise ConfigError(
            "WORLD_SIZE", topology.world_size, "needs MASTER_ADDR and MASTER_PORT as well", "start it with torchrun"
        )
    return address or "127.0.0.1", int(port or _free_port())


def first_node(node_list: str) -> str:
    """First host of SLURM's compressed list, e.g. `gpu[003-007,9],cpu1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", node_list)
    return match.group(1) + (match.group(2) or "")


def start_distributed(topology: Topology, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group (gloo on CPU, NCCL on CUDA). Call once, before anything imports DeepSpeed."""
    from v4train.parallel.deepspeed_fixes import init_distributed, quiet

    _export(topology, os.environ)
    if topology.device.type == "cuda":
        torch.cuda.set_device(topology.device)
    quiet()
    init_distributed(topology.device, timeout)


def stop_distributed() -> None:
    """Leave the process group. Without it, some runs hang or abort at exit (deepspeed 0.19.8, gloo)."""
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def leave(code: int = 0) -> NoReturn:
    """End this process, one of several, with this code once everything is done and the process group is left.

    Python's own way out now and then aborts with threads of the process group (torch 2.13 with gloo, deepspeed 0.19.8):
    "terminate called without an active exception", for which torchrun would end the whole job with an error.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _export(topology: Topology, environ: MutableMapping[str, str]) -> None:
    """Tell torch and DeepSpeed 0.19.8, which otherwise looks for MPI, through the variables that torchrun sets."""
    address, port = rendezvous(topology, environ)
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = address, str(port)
    environ["RANK"], environ["WORLD_SIZE"] = str(topology.rank), str(topology.world_size)
    environ["LOCAL_RANK"] = str(topology.local_rank)
    if topology.device.type == "cpu":
        environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported; it would pick a GPU that it sees


def _launched_by_srun(environ: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
