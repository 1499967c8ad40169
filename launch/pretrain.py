"""Pretrain a model: `torchrun launch/pretrain.py model=flash_small`, or plain `python` for one process.

Every key of conf/ can be set on the command line (Hydra). Bad input ends in one line and exit code 2;
HYDRA_FULL_ERROR=1 shows where it was found as well. A sweep is `python launch/pretrain.py -m seed=1,2`.
"""

import os
import sys
import time
import traceback

from v4train.train.allocator import restart_tuned

if __name__ == "__main__":
    restart_tuned()  # before imports that take time

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from v4train.errors import ConfigError, SweepFailed, errors_from_hydra, wants_traceback
from v4train.overrides import check_options, check_whole, complete, config_dir, explain, explain_entry
from v4train.train.signals import REQUEUE, SPIKED

LISTENING = 5  # seconds that other ranks leave rank 0 to speak
errors_from_hydra()


@hydra.main(config_path=str(config_dir()), config_name="pretrain", version_base="1.3")
def run(config: DictConfig) -> None:
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # a launcher that calls this function, such as Hydra's basic
            rule, remedy = "a process can be a rank of one run only", "use hydra/launcher=local or slurm"
            raise ConfigError("hydra/launcher", HydraConfig.get().runtime.choices["hydra/launcher"], rule, remedy)
        check_whole(config)
        complete(config, list(HydraConfig.get().overrides.task))
        from v4train.config import settings  # PyTorch: not for --help

        checked = settings(config)
        # After the checks: a bad command line is refused before DeepSpeed is even imported.
        from v4train.train.pretrain import pretrain

        pretrain(checked)
    except ConfigError as error:
        refuse(error)


def refuse(error: ConfigError) -> None:
    """Say it once, whatever the number of ranks, and leave with code 2."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        if wants_traceback():
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
    else:
        time.sleep(LISTENING)  # torchrun ends all ranks with the first: let that be the one that says why
    sys.exit(2)


def started() -> int:
    """The exit code: 0, REQUEUE of a run that has saved and wants to be started again, 1 of a sweep with failures."""
    try:
        check_options(sys.argv[1:])
        run()
    except (HydraException, OmegaConfBaseException) as error:
        refuse(explain(error))
    except ConfigError as error:
        refuse(error)
    except ValueError as error:
        refuse(explain_entry(error, sys.argv[1:]))
    except SweepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    code = started()
    # Set by torchrun, or by the run itself under srun
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and code in (0, REQUEUE, SPIKED):
        from v4train.parallel.topology import leave

        leave(code)
    sys.exit(code)
