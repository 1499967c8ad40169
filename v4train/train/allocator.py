"""Memory that a step frees and takes again, kept by the process."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
NEVER = -1  # as thresholds: no block is mapped apart, none is given back


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; returns whether there is a glibc and it agreed.

    By default it gives each large block back to the system, which then has to clear and map its pages anew for the
    next step. Holes between kept blocks cost memory; docs/performance.md compares the two settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_THRESHOLD: NEVER, M_TRIM_THRESHOLD: NEVER}
    return all([mallopt(key, value) for key, value in settings.items()])
