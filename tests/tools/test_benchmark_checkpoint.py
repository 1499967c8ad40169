"""What a checkpoint costs: `tools/benchmark_checkpoint.py`."""

import json
import subprocess
import sys

import pytest

TINY = ["model.hidden_size=32", "model.num_layers=2", "model.attention_mix=[csa,hca]", "train.sequence_length=32"]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_each_figure_is_there(tmp_path):
    command = [sys.executable, "tools/benchmark_checkpoint.py", "rounds=1", f"tokenizer.cache_dir={tmp_path}", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["checkpoint_mib"] > 0 and 0 < found["stall_seconds"] < found["waited_seconds"] * 10
    assert set(found) == {"checkpoint_mib", "waited_seconds", "stall_seconds", "share", "slower"}
