"""Time the data path, and print JSON.

    python tools/benchmark_data.py
    python tools/benchmark_data.py --tokens-per-second 50000 --resume-after 10000000 --texts 'corpus/*.txt'

`tokenize` is the rate of tokenising text files into shards, as tools/tokenize.py does, over that of the tokenizer alone
on the same texts and cores, in turns. `resume` is how long a run takes from a saved position behind so many tokens to
its next step, opening the shards included. `wait` is the share of its time that a training loop of the given speed
waits for its rows, all cores being busy meanwhile: from shards, and from JSON lines that are tokenised on the way.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch

from v4train.config import load, settings
from v4train.data import BatchConfig, Loader, load_data
from v4train.data.bulk import tokenize_source
from v4train.data.texts import find_tokenizer, source_texts
from v4train.errors import refusing_bad_input

BATCH, LENGTH = 4, 512  # of a step of flash_small
BARE_CHARACTERS = 8 << 20  # of a batch for the tokenizer alone


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    text = ["data=text", f"data.path={options.texts}"] if options.texts else ["data=stdlib"]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(benchmark(options, text, Path(folder)), indent=1))


def parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", help="text files (path, folder or glob); the standard library's otherwise")
    parser.add_argument("--rounds", default=9, type=int, help="turns of tokenising")
    parser.add_argument("--tokens-per-second", default=50_000, type=float, help="speed of the training loop")
    parser.add_argument("--steps", default=200, type=int, help="of that loop")
    parser.add_argument("--resume-after", default=10_000_000, type=int, help="tokens before the saved position")
    return parser


def benchmark(options: argparse.Namespace, text: list[str], folder: Path) -> dict:
    made = settings(load(text))
    (source,) = made.data.named_sources.values()
    tokenizer = find_tokenizer(made.tokenizer, made.data.named_sources)
    tokenizer.save(folder / "tokenizer.json")
    texts = list(source_texts(source).training_texts(1 << 40))
    alone = tokenizers.Tokenizer.from_str(tokenizer.json)
    ratios, shards = [], folder / "shards-0"
    for number in range(options.rounds):
        started = time.perf_counter()
        bare = encode(alone, texts)
        between = time.perf_counter()
        progress = tokenize_source(source, tokenizer, folder / f"shards-{number}", 100_000_000)
        ours = progress.new_tokens / (time.perf_counter() - between)
        ratios.append(ours / (bare / (between - started)))
    lines = folder / "texts.jsonl"
    with lines.open("w") as file:
        file.writelines(json.dumps({"text": one}) + "\n" for one in texts)
    common = [f"tokenizer.path={folder / 'tokenizer.json'}", "data.validation_fraction=0.05"]
    return {
        "texts": {"bytes": sum(map(len, texts)), "documents": len(texts)},
        "tokenize": {"ratio": round(statistics.median(ratios), 3), "tokens_per_second": round(ours)},
        "resume": resume([*common, "data=shards", f"data.path={shards}"], options.resume_after),
        "wait": {
            name: wait([*common, f"data={name}", f"data.path={path}"], options)
            for name, path in (("shards", shards), ("jsonl", lines))
        },
    }


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> int:
    """Tokens that the tokenizer alone makes of the texts."""
    count, batch, size = 0, [], 0
    for text in [*texts, None]:
        if text is None or size >= BARE_CHARACTERS:
            count += sum(len(one) for one in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
            batch, size = [], 0
        if text is not None:
            batch.append(text)
            size += len(text)
    return count


def opened(overrides: list[str]) -> Loader:
    made = settings(load(overrides))
    tokenizer, corpus = load_data(made.data, made.tokenizer, made.train.validation_tokens)
    return Loader(corpus, made.data, tokenizer, LENGTH, BatchConfig(BATCH, BATCH, 0, 1), made.seed)


def resume(overrides: list[str], tokens: int) -> dict:
    loader = opened(overrides)
    while loader.progress.tokens < tokens:
        loader.next_step()
    state = json.loads(json.dumps(loader.state_dict()))
    expected = loader.next_step()[0].input_ids
    loader.close()
    started = time.perf_counter()
    again = opened(overrides)
    again.load_state_dict(state)
    found = again.next_step()[0].input_ids
    seconds = time.perf_counter() - started
    again.close()
    return {"after_tokens": tokens, "seconds": round(seconds, 3), "exact": torch.equal(found, expected)}


def wait(overrides: list[str], options: argparse.Namespace) -> float:
    loader = opened(overrides)
    for _ in range(50):  # the threads begin with nothing read ahead
        loader.next_step()
    step, matrix, waited, batches = BATCH * LENGTH / options.tokens_per_second, torch.ones(512, 512), 0.0, []
    begun = time.perf_counter()
    for _ in range(options.steps):
        batches.clear()  # as a training loop has let go of them by then
        started = time.perf_counter()
        batches.extend(loader.next_step())
        waited += time.perf_counter() - started
        while time.perf_counter() - started < step:
            matrix @ matrix
    share = waited / (time.perf_counter() - begun)
    loader.close()
    return round(share, 5)


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
