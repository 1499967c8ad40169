"""Bytes that ranks really send: every collective and message of torch.distributed, as it is dispatched.

Volumes are those of `v4train.analysis.communication`, which says in closed form what is counted here.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from v4train.parallel.groups import Groups

HERE = Path(__file__).parent
OURS = {str(HERE / "collectives.py"), str(HERE / "context.py")}  # where the model's own collectives are
SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")  # what others send, or nothing
SCALARS = 16  # numbers of a collective up to which it is not counted: norms, counts, signals


class Traffic(TorchDispatchMode):
    """While it is entered, counts the bytes that this rank hands to the network, in `sent` by axis.

    A collective counts as what a rank's share of it is with the algorithm that sends least: of n numbers on g ranks
    2 n (g - 1) / g to sum them everywhere, n (g - 1) to gather n own ones, n (g - 1) / g to sum and scatter them.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self._names = {axis: groups[axis].group_name for axis in ("tensor", "context", "pipeline", "ends")}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.name().removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        if sent := _bytes(name, args, group):
            self.sent[self._axis(name, group.group_name)] += sent

    def _axis(self, name: str, group: str) -> str:
        if name == "alltoall_base_":
            return "expert"
        # A context group may have the same ranks as one that sums gradients, so who asks for it decides
        ours = _caller() in OURS
        if name == "send":
            return "context" if ours else "pipeline"
        names = {of: axis for axis, of in self._names.items() if ours or axis != "context"}
        return names.get(group, "gradients").replace("ends", "pipeline")


def _caller() -> str:
    """File of the innermost function of this project or of DeepSpeed, but for this one's."""
    packages = (str(HERE.parent), str(Path(sys.modules["deepspeed"].__file__).parent))
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or not frame.f_code.co_filename.startswith(packages)):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


def _bytes(name: str, args: tuple, group: dist.ProcessGroup) -> float:
    """Of one call, on this rank; the first arguments are what comes, or is worked on in place, and what goes."""
    ranks = group.size()
    share = (ranks - 1) / ranks
    if name in SILENT:
        return 0
    if name == "allreduce_":
        return 2 * share * _size(args[0])
    if name in ("broadcast_", "reduce_"):
        return share * _size(args[0])
    if name.startswith(("allgather_", "_allgather_base_", "reduce_scatter_", "_reduce_scatter_base_")):
        return share * max(_size(args[0]), _size(args[1]))
    if name == "alltoall_base_":
        pieces, rows = args[4], args[1].shape[0]
        kept = pieces[group.rank()] if pieces else rows / ranks
        return _size(args[1]) * (1 - kept / rows) if rows else 0
    if name == "send":
        return _size(args[0])
    raise ValueError(f"c10d::{name}: no volume is known for it, and leaving it out would look like agreement")


def _size(tensors: torch.Tensor | list) -> int:
    """Bytes of a tensor, or of a list of them; 0 for a few numbers."""
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes if tensors.numel() > SCALARS else 0
    return sum(map(_size, tensors))
