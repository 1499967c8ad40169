"""Train the tokenizer of a configuration, or take it from the cache, and write it as tokenizer.json.

    python tools/train_tokenizer.py out=tokenizer.json data=text data.path=my_texts/ model.vocab_size=8192
    python tools/train_tokenizer.py out=tokenizer.json data=jsonl data.path=corpus/ tokenizer.train_bytes=1000000000

`out` is the file to write; everything else is an override of conf/, as in launch/pretrain.py. Held-out documents are
left out; of several sources each gives an equal share.
"""

import sys

from v4train.config import load, settings
from v4train.data.texts import find_tokenizer
from v4train.errors import ConfigError, refusing_bad_input
from v4train.structured import wants_help
from v4train.train.progress import setup_logging


def main(arguments: list[str]) -> None:
    if wants_help(arguments):
        return print(__doc__)
    out = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    if len(out) != 1 or not out[0]:
        raise ConfigError("out", out, "exactly one file to write is needed", "give out=tokenizer.json")
    checked = settings(load([argument for argument in arguments if not argument.startswith("out=")]))
    sources = checked.data.named_sources
    setup_logging(None, rank=0)
    tokenizer = find_tokenizer(checked.tokenizer, sources)
    tokenizer.save(out[0])
    print(f"{out[0]}: {tokenizer.vocab_size} entries for {', '.join(sources)}")


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
