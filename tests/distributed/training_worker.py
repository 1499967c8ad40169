"""One rank of several training runs, one after another: `python -m tests.distributed.training_worker JOBS FOLDER HOW`.

JOBS is a JSON file with a list of override lists; HOW they start: `even`, or `uneven` with streams that differ from the
first site on. All runs of a launch share the process group, so only what does not change it (ZeRO stage, optimizer,
precision, batch sizes) may differ.
"""

import json
import sys
from pathlib import Path

import torch

from tests.distributed.launch import finished
from v4train.config import load, settings
from v4train.model import init, recompute
from v4train.model.config import ModelConfig
from v4train.parallel.topology import leave, start_distributed, stop_distributed
from v4train.train.pretrain import run

even_bias = init._static_bias


def uneven_bias(rows: int, config: ModelConfig) -> torch.Tensor:
    """mHC's static bias that treats no two streams alike."""
    return even_bias(rows, config) + 0.5 * torch.randn(rows, generator=torch.Generator().manual_seed(rows))


def main(jobs: Path, folder: Path, start: str) -> None:
    started = False
    recompute.FORGET_FROM = 0  # as in a run of real size
    if start == "uneven":
        init._static_bias = uneven_bias
    for overrides in json.loads(jobs.read_text()):
        checked = settings(load(overrides))
        if not started:
            start_distributed(checked.topology)
            started = True
        run(checked)
    finished(folder)
    stop_distributed()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
