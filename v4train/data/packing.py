"""Rows of S tokens from documents laid end to end. Legend: D documents, T tokens, S row length, R rows an epoch.

An epoch is a stream: every document once, in an order drawn from (seed, epoch). Row r holds stream positions
[r*S, r*S + S); its targets are the tokens that follow them, so a row also looks at the position after its end. What
is left behind the last whole row is dropped for that epoch. The rows of an epoch are visited in an order of their
own, so that a document longer than a row doesn't fill a batch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from v4train.data.corpus import TokenizedDocuments
from v4train.errors import ConfigError

IGNORED_TARGET = -100
PADDING_DOCUMENT = -1


class Row(NamedTuple):
    """int64 [S] each. targets: the next token, IGNORED_TARGET where it belongs to another document or isn't there."""

    input_ids: np.ndarray
    document_ids: np.ndarray  # number of the document in the corpus; PADDING_DOCUMENT behind the stream's end
    targets: np.ndarray


def permutation(count: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation drawn from `key` (integers >= 0).

    Sorting raw PCG64 output, not `Generator.permutation`: NumPy promises that raw streams never change (NEP 19), and a
    run resumed under another NumPy must go on with the same order.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")


@dataclass(frozen=True)
class Stream:
    """Documents end to end in the order `order` (int64 [D])."""

    documents: TokenizedDocuments
    order: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [D + 1]: stream position of each document of the order, then the stream's length."""
        return np.concatenate([[0], np.cumsum(np.diff(self.documents.offsets)[self.order])])

    def row(self, first: int, length: int, pad_id: int) -> Row:
        """Stream positions [first, first + length), padded with `pad_id` behind the stream's end."""
        tokens = np.full(length + 1, pad_id, dtype=np.int64)
        document_ids = np.full(length + 1, PADDING_DOCUMENT, dtype=np.int64)
        position, end = first, min(first + length + 1, int(self.starts[-1]))
        place = int(np.searchsorted(self.starts, first, side="right")) - 1
        while position < end:
            document = self.order[place]
            stop = min(int(self.starts[place + 1]), end)
            source = self.documents.offsets[document] + position - self.starts[place]
            tokens[position - first : stop - first] = self.documents.tokens[source : source + stop - position]
            document_ids[position - first : stop - first] = document
            position, place = stop, place + 1
        follows = (document_ids[1:] == document_ids[:-1]) & (document_ids[1:] != PADDING_DOCUMENT)
        return Row(tokens[:-1], document_ids[:-1], np.where(follows, tokens[1:], IGNORED_TARGET))


class Packing:
    """The endless sequence of training rows: row number n >= 0 is a pure function of (documents, S, seed, n)."""

    def __init__(self, documents: TokenizedDocuments, sequence_length: int, seed: int, pad_id: int) -> None:
        """Raises ConfigError (train.sequence_length) where the documents don't fill a row."""
        self.documents, self.sequence_length, self.seed, self.pad_id = documents, sequence_length, seed, pad_id
        self.rows_per_epoch = documents.num_tokens // sequence_length
        self.dropped_tokens_per_epoch = documents.num_tokens % sequence_length
        if self.rows_per_epoch == 0:
            raise ConfigError(
                "train.sequence_length",
                sequence_length,
                f"the training documents have {documents.num_tokens} tokens, less than one row",
                f"at most {documents.num_tokens}, or more data",
            )
        self._epochs: dict[int, tuple[Stream, np.ndarray]] = {}

    def locate(self, number: int) -> tuple[int, int]:
        """Row number -> (epoch, row of that epoch's stream)."""
        epoch, visit = divmod(number, self.rows_per_epoch)
        return epoch, int(self._epoch(epoch)[1][visit])

    def row(self, number: int) -> Row:
        epoch, row = self.locate(number)
        return self._epoch(epoch)[0].row(row * self.sequence_length, self.sequence_length, self.pad_id)

    def _epoch(self, epoch: int) -> tuple[Stream, np.ndarray]:
        """That epoch's stream and the order of its rows; a step sees two epochs at most, so two are kept."""
        if epoch not in self._epochs:
            stream = Stream(self.documents, permutation(self.documents.num_documents, self.seed, epoch, 0))
            self._epochs[epoch] = stream, permutation(self.rows_per_epoch, self.seed, epoch, 1)
            if len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]
