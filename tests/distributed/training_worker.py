"""One rank of several training runs, one after another: `python -m tests.distributed.training_worker JOBS FOLDER`.

JOBS is a JSON file with a list of override lists. All runs of a launch share the process group, so only what does not
change it (ZeRO stage, optimizer, precision, batch sizes) may differ.
"""

import json
import sys
from pathlib import Path

from tests.distributed.launch import finished
from v4train.config import load, settings
from v4train.parallel.topology import leave, start_distributed, stop_distributed
from v4train.train.pretrain import run


def main(jobs: Path, folder: Path) -> None:
    started = False
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
