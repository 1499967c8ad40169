"""Pretrain a model: `torchrun launch/pretrain.py model=flash_small`, or plain `python` for one process.

Every key of conf/ can be set on the command line (Hydra). Bad input ends in one line and exit code 2.
"""

import os
import sys
import time

from v4train.train.allocator import restart_tuned

if __name__ == "__main__":
    restart_tuned()  # before imports that take time

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from v4train.config import complete, config_dir, explain, settings
from v4train.errors import ConfigError
from v4train.train.signals import REQUEUE

LISTENING = 5  # seconds that other ranks leave rank 0 to speak
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `main`, which says them in one line


@hydra.main(config_path=str(config_dir()), config_name="pretrain", version_base="1.3")
def run(config: DictConfig) -> None:
    try:
        complete(config, list(HydraConfig.get().overrides.task))
        checked = settings(config)
        # After the checks: a bad command line is refused before DeepSpeed is even imported.
        from v4train.train.pretrain import pretrain

        pretrain(checked)
    except ConfigError as error:
        refuse(error)


def refuse(error: ConfigError) -> None:
    """Say it once, whatever the number of ranks, and leave with code 2."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"error: {error}", file=sys.stderr)
    else:
        time.sleep(LISTENING)  # torchrun ends all ranks with the first: let that be the one that says why
    sys.exit(2)


def started() -> int:
    """The exit code of the run: 0, or that of one that has saved and wants to be started again."""
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        refuse(explain(error))
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    code = started()
    # Set by torchrun, or by the run itself under srun
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and code in (0, REQUEUE):
        from v4train.parallel.topology import leave

        leave(code)
    sys.exit(code)
