"""Freed memory that the process keeps."""

import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from v4train.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.ones(2**20) for _ in range(32)]  # 32 times 4 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()
print(sum(faults() for _ in range(8)))
"""


def faults_of_later_steps(what):
    command = [sys.executable, "-c", PROGRAM, what]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout)


def test_memory_taken_again_is_mapped_already():
    """glibc's; elsewhere there is nothing to tell."""
    assert faults_of_later_steps("keep") < faults_of_later_steps("default") / 4
