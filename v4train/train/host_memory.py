"""How much main memory a host has left, and whether all its ranks together may take some of it."""

import socket
from pathlib import Path

import psutil

from v4train.train.distributed import gathered

PART = 0.25  # of what is available


def available(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the host, or of the control group (version 2) that it is confined to.

    root: of the file system, for tests.
    """
    found = [psutil.virtual_memory().available]
    groups = root / "sys/fs/cgroup"
    try:
        own = next(line for line in (root / "proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):  # no Linux, or version 1
        return found[0]
    group = groups / own.removeprefix("0::").strip("/")
    for folder in (group, *group.parents):  # each may have a limit
        try:
            limit, used = (folder / "memory.max").read_text(), (folder / "memory.current").read_text()
        except OSError:  # the root has none; in a container the path may be one outside of it
            limit, used = "max", "0"
        if limit.strip() != "max":
            found.append(int(limit) - int(used))
        if folder == groups:
            break
    return max(0, min(found))


def fits(size: int) -> tuple[bool, int, int]:
    """Whether `size` bytes of this rank, and what the other ranks name, fit on every host. Collective, before any is
    taken.

    Returns whether, and of the fullest host the bytes of all its ranks and those available; the same on every rank.
    """
    hosts: dict[str, tuple[int, int]] = {}
    for name, wanted, left in gathered((socket.gethostname(), size, available())):
        before = hosts.get(name, (0, left))
        hosts[name] = before[0] + wanted, min(before[1], left)
    wanted, left = max(hosts.values(), key=lambda host: host[0] / max(1, host[1]))
    return wanted <= PART * left, wanted, left
