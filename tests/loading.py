"""Loaders of small sources, and their steps from all ranks together, for tests of the loader."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch

from tests.documents import FIRST, data_config, documents_of, indexed_source
from tests.sources import write_jsonl
from v4train.data.corpus import Corpus, load_data
from v4train.data.loader import BatchConfig, Loader, merged_states
from v4train.data.tokenizer import FillInMiddle, TokenizerConfig, train_tokenizer

G, LENGTH = 8, 12
IDS = SimpleNamespace(pad_id=2, fim_ids=FillInMiddle(3, 4, 5))


def lengths_of(count, seed=0):
    return (np.random.default_rng(seed).lognormal(2.5, 0.8, count).astype(int) + 2).tolist()


def one_source(epochs=None, count=60, **others):
    return Corpus({"text": indexed_source("text", documents_of(lengths_of(count)), epochs)}), IDS, data_config(**others)


def two_sources(epochs=None, **others):
    lengths = {"a": lengths_of(40, 1), "b": lengths_of(25, 2)}
    first = {"a": FIRST, "b": FIRST + sum(lengths["a"])}
    sources = {n: indexed_source(n, documents_of(lengths[n], first[n]), epochs) for n in lengths}
    return Corpus(sources), IDS, data_config(**{"weights": {"a": 2, "b": 1}} | others)


def loader(made, rank=0, world=1, micro=1, length=LENGTH, seed=7, total=G, workers=0):
    corpus, tokenizer, data = made
    data.workers = workers
    return Loader(corpus, data, tokenizer, length, BatchConfig(total, micro, rank, world), seed)


def loaders(made, world, micro=1, state=None, **others):
    ranks = [loader(made, rank, world, micro, **others) for rank in range(world)]
    for one in ranks:
        if state:
            one.load_state_dict(json.loads(json.dumps(state)))
    return ranks


def step_of(ranks):
    """The rows of a step, in the order of the sequence, from all ranks; their counts are shared as a run does it."""
    per_rank = [one.next_step() for one in ranks]
    counts = sum((one.counts for one in ranks), Counter())
    for one in ranks:
        one.count(counts)
    batches = [batch for micro_step in zip(*per_rank, strict=True) for batch in micro_step]
    return [row for b in batches for row in torch.stack([b.input_ids, b.document_ids, b.targets], 1).tolist()]


def steps_of(ranks, count):
    found = [step_of(ranks) for _ in range(count)]
    for one in ranks:
        one.close()
    return found


def state_of(ranks):
    return json.loads(json.dumps(merged_states([one.state_dict() for one in ranks])))


def streamed(tmp_path, names="abc", kind="jsonl", **others):
    """Files of JSON lines, tokenised on the way."""
    folder = tmp_path / "files"
    folder.mkdir(exist_ok=True)
    tokenizer_file = tmp_path / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(["text"], 262).save(tokenizer_file)
    for name in names:
        write_jsonl(folder / f"{name}.jsonl", [f"{name}{i}" * (i * 7 % 11 + 1) for i in range(40)])
    source = {"source": "jsonl", "path": str(folder), "max_document_bytes": 100}
    data = data_config(**source | {"lanes": 4} | others)
    tokenizer, corpus = load_data(data, TokenizerConfig(300, str(tmp_path / "cache"), str(tokenizer_file), 1000), 50)
    return corpus, tokenizer, data


def mixed(tmp_path, **others):
    """A streamed source and one of text files."""
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} " * (i % 5 + 1))
    sources = {
        "lines": {"source": "jsonl", "path": str(tmp_path / "files")},
        "texts": {"source": "text", "path": str(folder)},
    }
    return streamed(tmp_path, sources=sources, weights={"lines": 1, "texts": 3}, fim_rate=0.3, **others)
