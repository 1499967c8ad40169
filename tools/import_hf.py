"""Make a v4train checkpoint from a directory that transformers loads, to continue pretraining.

    python tools/import_hf.py model=llama/ out=imported/ data=text data.path=my_texts/ train.sequence_length=1024
    python tools/import_hf.py model=exported/ out=imported/ optimizer=adamw model.moe.balance_loss_weight=1e-4

`model` is the directory, `out` the folder to write; everything else is an override of conf/, as in launch/pretrain.py:
what the checkpoint is bound to (data, optimizer, sequence length, seed) has to be said here as in the run. It prints
the command that goes on, to which may be added what may change: length, schedule, layout, run.name.
model.mtp.num_layers=1 adds a new multi-token-prediction block.
"""

import os
import sys

from v4train.errors import ConfigError, refusing_bad_input
from v4train.structured import wants_help


def main(arguments: list[str]) -> None:
    """Raises ConfigError."""
    if wants_help(arguments):
        return print(__doc__)
    source, out, overrides = split(arguments)
    from v4train.hf.importing import command, import_model  # after the arguments: it takes seconds
    from v4train.train.progress import stages

    with stages() as say:
        done = import_model(source, out, overrides, say)
    new = f", {done.fresh:,} of them new (MTP)" if done.fresh else ""
    print(f"{out}: {done.name}, {done.parameters:,} parameters{new}; {done.agreement}")
    print(f"to continue pretraining:\n    {command(done.arguments)}")


def split(arguments: list[str]) -> tuple[str, str, list[str]]:
    """`model`, `out` and the overrides of conf/. Raises ConfigError."""
    own = {"model": "", "out": ""}
    given = [argument for argument in arguments if argument.partition("=")[0] in own]
    own |= {key: value for key, _, value in (argument.partition("=") for argument in given)}
    if not own["model"]:
        raise ConfigError("model", "missing", "nothing says what to import", "give model=DIRECTORY")
    return own["model"], own["out"], [argument for argument in arguments if argument not in given]


if __name__ == "__main__":
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too
    with refusing_bad_input():
        main(sys.argv[1:])
