"""Tokenise a source in advance, into a folder of shards that a run reads with data=shards data.path=<folder>.

    python tools/tokenize.py out=shards/ data=jsonl data.path='corpus/*.jsonl.zst' tokenizer.path=tokenizer.json
    python tools/tokenize.py out=shards/ data=text data.path=books/ shard_tokens=10000000

`out` is the folder to write, `shard_tokens` the least tokens of a shard but the last; everything else is an override of
conf/, as in launch/pretrain.py. Without tokenizer.path the tokenizer is trained first, as a run would. All cores work
(RAYON_NUM_THREADS sets how many). Killed and started again it goes on after the last whole shard.
"""

import os
import sys
import time

if __name__ == "tokenize":
    # A program of this folder was started (python tools/benchmark.py), so that the folder comes first on the path, and
    # a module such as `inspect` wants the standard library's tokenize: hand that over. Hence the imports in functions.
    here, path = os.path.dirname(os.path.abspath(__file__)), sys.path[:]
    sys.path[:] = [folder for folder in path if os.path.abspath(folder) != here]
    del sys.modules["tokenize"]
    import tokenize  # noqa: F401

    sys.path[:] = path

SHARD_TOKENS = 100_000_000


def main(arguments: list[str]) -> None:
    """Raises ConfigError."""
    from v4train.structured import wants_help

    if wants_help(arguments):
        return print(__doc__)
    from v4train.config import load, settings
    from v4train.data.bulk import tokenize_source
    from v4train.data.texts import find_tokenizer
    from v4train.errors import ConfigError

    out, shard_tokens, overrides = split(arguments)
    checked = settings(load(overrides))
    sources = checked.data.named_sources
    if len(sources) != 1:
        rule = "a folder of shards holds one source"
        raise ConfigError("data.sources", ",".join(sources), rule, "tokenise each into a folder of its own")
    display = Display(out)
    tokenizer = find_tokenizer(checked.tokenizer, sources)
    with display:
        result = tokenize_source(*sources.values(), tokenizer, out, shard_tokens, display.update)
    print(display.summary(result))


def split(arguments: list[str]) -> tuple[str, int, list[str]]:
    """`out`, `shard_tokens` and the overrides of conf/. Raises ConfigError."""
    from v4train.errors import ConfigError

    own = {"out": "", "shard_tokens": str(SHARD_TOKENS)}
    given = [argument for argument in arguments if argument.partition("=")[0] in own]
    own |= {key: value for key, _, value in (argument.partition("=") for argument in given)}
    if not own["out"]:
        raise ConfigError("out", own["out"], "a folder to write is needed", "give out=shards/")
    if not own["shard_tokens"].isdecimal() or int(own["shard_tokens"]) == 0:
        rule, remedy = "it must be a whole number above 0", f"for example shard_tokens={SHARD_TOKENS}"
        raise ConfigError("shard_tokens", own["shard_tokens"], rule, remedy)
    return own["out"], int(own["shard_tokens"]), [argument for argument in arguments if argument not in given]


class Display:
    """A progress bar on a terminal, elsewhere a line for each shard; as a context manager around the work."""

    def __init__(self, out: str) -> None:
        import logging

        from rich import progress

        from v4train.terminal import console, on_terminal
        from v4train.train.progress import setup_logging

        if on_terminal():
            setup_logging(None, rank=0)  # above the bar: a tokenizer trained, bad records left out
        else:
            logger = logging.getLogger("v4train")
            logger.addHandler(logging.StreamHandler())  # to standard error, as the shards are on standard output
            logger.setLevel(logging.INFO)
        self.out, self._started, self._shards = out, 0.0, None
        self._bar = progress.Progress(
            progress.TextColumn("tokenise"),
            progress.BarColumn(bar_width=None),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[figures]}", markup=False),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not on_terminal(),
            expand=True,
        )
        self._task = self._bar.add_task("tokenise", total=None, figures="")

    def __enter__(self) -> "Display":
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, now) -> None:
        """`now`: Progress of v4train.data.bulk."""
        self._bar.update(self._task, completed=now.done_bytes, total=now.total_bytes, figures=self._figures(now))
        if self._bar.disable and now.shards != self._shards:
            if self._shards is not None or now.shards:
                print(f"{self.out}: {self._figures(now)}", flush=True)
            self._shards = now.shards

    def summary(self, now) -> str:
        """What is said at the end, in one line."""
        left_out = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in now.skipped.items()) or "nothing"
        ready = "complete" if now.new_tokens else "complete already, nothing to do"
        return f"{self.out}: {ready}: {self._figures(now)}; left out: {left_out}"

    def _figures(self, now) -> str:
        rate = now.new_tokens / max(time.monotonic() - self._started, 1e-9)
        speed = f", {rate:,.0f} tokens/s" if now.new_tokens else ""
        return f"{now.shards} shards, {now.documents:,} documents, {now.tokens:,} tokens{speed}"


if __name__ == "__main__":
    from v4train.errors import refusing_bad_input

    with refusing_bad_input():
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt:
            print("stopped; the same command goes on after the last whole shard", file=sys.stderr)
            raise
