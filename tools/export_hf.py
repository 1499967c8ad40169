"""Write a run's model as a directory that transformers' AutoModelForCausalLM and AutoTokenizer load.

    python tools/export_hf.py run=runs/flash_small out=exported/
    python tools/export_hf.py run=runs/flash_small/checkpoints/step_00000100 out=exported/ dtype=bf16 max_shard_size=2GB

`run` is the folder of a run (its newest whole checkpoint is taken) or of one of its checkpoints, from any layout; `out`
a folder that does not exist, or is empty; `dtype` the type of the weights, fp32 (default) or bf16; `max_shard_size` the
size of a safetensors file, 5GB unless given. What transformers loads is compared with the checkpoint, tokenizer,
weights and logits, before `out` is there.
"""

import os
import sys

from v4train.errors import ConfigError, refusing_bad_input
from v4train.structured import key_values, wants_help

DEFAULTS = {"run": "", "out": "", "dtype": "fp32", "max_shard_size": "5GB"}


def main(arguments: list[str]) -> None:
    """Raises ConfigError."""
    if wants_help(arguments):
        return print(__doc__)
    given = DEFAULTS | key_values(arguments, DEFAULTS, "give run=runs/NAME out=exported/")
    if not given["run"]:
        raise ConfigError("run", "missing", "nothing says which model to export", "give run=runs/NAME")
    from v4train.hf.export import ExportConfig, export  # after the arguments: it takes seconds
    from v4train.train.progress import stages

    config = ExportConfig(**given)
    with stages() as say:
        done = export(config, say)
    print(f"{done.checkpoint.name}: {done.parameters:,} parameters as {done.architecture}")
    print(f"tokenizer and weights are the checkpoint's; {done.agreement}")
    if done.rounding:
        print(f"{given['dtype']} weights move a logit by {done.rounding:.1e} at most")
    print(f"{given['out']}: {done.files} safetensors file{'s' * (done.files > 1)}, {done.bytes / 1e6:,.1f} MB")


if __name__ == "__main__":
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too
    with refusing_bad_input():
        main(sys.argv[1:])
