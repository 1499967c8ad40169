"""Process groups of a topology."""

import functools

import torch.distributed as dist

from v4train.parallel.topology import Topology


class Groups:
    """One group of each kind that this rank is in: `axis` as in `Topology.groups`, or the pipeline's `ends`."""

    def __init__(self, topology: Topology) -> None:
        made: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(topology.world_size)): dist.group.WORLD}
        self._by_axis: dict[str, dist.ProcessGroup] = {}
        for axis in ("tensor", "context", "pipeline", "replica", "expert", "expert_replica"):
            ranks = next(tuple(group) for group in topology.groups(axis) if topology.rank in group)
            if ranks not in made:  # its members alone make it, or thousands of ranks would make thousands of groups
                made[ranks] = dist.new_group(ranks, use_local_synchronization=True)
            self._by_axis[axis] = made[ranks]
        if topology.sizes.pipeline > 2:  # first and last stage; every rank makes one, as NCCL's splitting wants it
            pipeline = dist.get_process_group_ranks(self._by_axis["pipeline"])
            ends = (pipeline[0], pipeline[-1])
            mine = ends if topology.rank in ends else (topology.rank,)
            self._by_axis["ends"] = dist.new_group(mine, use_local_synchronization=True)
        else:
            self._by_axis["ends"] = self._by_axis["pipeline"]

    def __getitem__(self, axis: str) -> dist.ProcessGroup:
        return self._by_axis[axis]


@functools.cache
def process_groups(topology: Topology) -> Groups:
    """Made once a process and layout, after `start_distributed`. Collective."""
    return Groups(topology)
