"""Bits per byte of held-out text, by source and by position in the context."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from v4train.data import Batch, Corpus, Tokenizer, validation_batches
from v4train.evaluation.scores import Scorer

FIRST_EDGE = 16  # tokens of context in the first bin; each further one is as wide as all before


def position_edges(length: int) -> list[int]:
    """Lower ends of the bins of positions up to `length`: 0, 16, 32, 64, ..."""
    edges, edge = [0], FIRST_EDGE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return edges


def positions(document_ids: Tensor) -> Tensor:
    """Tokens of the same document before each, [B, S] -> int64 [B, S]: what a model sees of a packed row."""
    changes = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    index = torch.arange(document_ids.shape[1]).expand_as(document_ids)
    return index - torch.where(changes, index, 0).cummax(1).values


def text_sums(batches: Iterable[Batch], scores_of: Scorer, bytes_per_token: Tensor, edges: list[int]) -> Tensor:
    """Sums of this rank's targets by position, float64 [bins, 3]: nats, UTF-8 bytes, targets."""
    sums = torch.zeros(len(edges), 3, dtype=torch.float64)
    starts = torch.tensor(edges)
    for batch in batches:
        scores = scores_of(batch)
        counted = scores.counted
        bins = torch.bucketize(positions(batch.document_ids)[counted], starts, right=True) - 1
        sizes = bytes_per_token[batch.targets[counted]]
        values = torch.stack([scores.nats[counted].double(), sizes.double(), torch.ones(len(bins)).double()], dim=1)
        sums.index_add_(0, bins, values)
    return sums


def text_sums_by_source(
    corpus: Corpus,
    tokenizer: Tokenizer,
    scores_of: Scorer,
    *,
    tokens: int,
    length: int,
    batch_size: int,
    rank: tuple[int, int] = (0, 1),
) -> Tensor:
    """[sources, bins, 3] as of `text_sums`, of about `tokens` held-out tokens, as many of each source.

    rank: number of this data rank, and of how many. Sums of ranks add up.
    """
    edges, table = position_edges(length), torch.as_tensor(tokenizer.bytes_per_token)
    share = -(-tokens // len(corpus.sources))
    return torch.stack(
        [
            text_sums(
                validation_batches(source.validation, length, batch_size, share, *rank, tokenizer.pad_id),
                scores_of,
                table,
                edges,
            )
            for source in corpus.sources.values()
        ]
    )


def text_figures(sums: Tensor, names: Iterable[str], length: int) -> dict[str, Any]:
    """What the sums [sources, bins, 3] of all ranks say, in plain values: of all text, by source, by position.

    A bin [start, stop) holds the targets that were predicted from so many tokens before the last one. One without a
    target is left out. Bits per byte are None where the targets stand for no byte.
    """
    edges = position_edges(length)
    bins = zip(edges, [*edges[1:], length], sums.sum(0), strict=True)
    return {
        "all": _figures(sums.sum((0, 1))),
        "by_source": {name: _figures(own) for name, own in zip(names, sums.sum(1), strict=True)},
        "by_position": [{"start": start, "stop": stop} | _figures(own) for start, stop, own in bins if own[2] > 0],
    }


def _figures(sums: Tensor) -> dict[str, Any]:
    nats, size, targets = sums.tolist()
    return {
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "loss": nats / targets if targets else None,
        "tokens": int(targets),
    }
