"""The figures of this machine: `tools/measure_device.py`."""

import json
import subprocess
import sys

import pytest


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_two_ranks():
    """Each figure is there, and of an order that a CPU can have."""
    command = [sys.executable, "tools/measure_device.py", "--ranks", "2", "--seconds", "0.05"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=110, check=True).stdout)
    assert 1e9 < found["flops_fp32"] < 1e13 and 1e8 < found["flops_bf16"] < 1e14
    assert 1e8 < found["memory_bandwidth"] < 1e12
    assert 1e-6 < found["latency"] < 1
    assert set(found["bandwidth"]) == {"all_reduce", "all_gather", "all_to_all"}
    assert all(1e6 < bandwidth < 1e12 for bandwidth in found["bandwidth"].values())
