"""Memory that a step frees and takes again, kept by the process, with few holes."""

import ctypes
import os
import platform
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
NEVER = -1  # as thresholds: no block is mapped apart, none is given back
# What glibc reads at a process's start only. Small freed blocks join their neighbours at once: glibc (2.36) cuts such
# from every tensor it aligns, and where they stay in caches, the hole of a freed tensor doesn't fit the next like it.
# And memory comes in huge pages where the kernel gives them to who asks: a few per cent of a step. All threads share
# one arena: else each of gloo's keeps its largest copy of a collective's tensor for ever.
TUNABLES = {
    "glibc.malloc.tcache_count": "0",
    "glibc.malloc.mxfast": "0",
    "glibc.malloc.hugetlb": "1",
    "glibc.malloc.arena_max": "1",
}


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; returns whether there is a glibc and it agreed.

    By default it gives each large block back to the system, which then has to clear and map its pages anew for the
    next step. Holes between kept blocks cost memory, less with TUNABLES; docs/performance.md compares the settings.
    """
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_THRESHOLD: NEVER, M_TRIM_THRESHOLD: NEVER}
    return all([mallopt(key, value) for key, value in settings.items()])


def tuned_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with TUNABLES where it says nothing of them: for a process that is yet to start."""
    own = [setting for setting in environment.get("GLIBC_TUNABLES", "").split(":") if setting]
    said = {setting.partition("=")[0] for setting in own}
    own += [f"{name}={value}" for name, value in TUNABLES.items() if name not in said]
    return dict(environment) | {"GLIBC_TUNABLES": ":".join(own)}


def restart_tuned() -> None:
    """Start this program once more in its place with TUNABLES, where there is a glibc to heed them; else return.

    The process stays the same to whoever started it. To be called before anything else is done.
    """
    environment = tuned_environment(os.environ)
    if _is_glibc() and environment["GLIBC_TUNABLES"] != os.environ.get("GLIBC_TUNABLES"):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
