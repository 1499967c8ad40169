"""Validation rows: the same for every run, seed and number of ranks."""

from collections.abc import Iterator

import numpy as np

from v4train.data.corpus import Corpus
from v4train.data.loader import Batch, stack_rows
from v4train.data.packing import IGNORED_TARGET, PADDING_DOCUMENT, Row, Stream, permutation
from v4train.data.tokenizer import Tokenizer

_ORDER = 0  # key of the fixed order of documents, and of rows: a subset of rows draws on all documents


def num_validation_rows(corpus: Corpus, sequence_length: int, max_tokens: int) -> int:
    """Rows that `validation_batches` visits, all ranks together; at least one."""
    rows = -(-corpus.validation.num_tokens // sequence_length)
    return min(rows, max(1, max_tokens // sequence_length)) if max_tokens else rows


def validation_batches(
    corpus: Corpus, sequence_length: int, batch_size: int, max_tokens: int, data_rank: int, data_world: int
) -> Iterator[Batch]:
    """This rank's validation batches, [batch_size, S] each.

    `max_tokens` tokens (0: all) of the validation documents, in whole rows drawn in a fixed order; the last row of the
    documents is padded. Row i goes to rank i % data_world. Every rank gets the same number of batches of the same
    shape, since a forward may hold collectives (ZeRO-3, experts): where rows run out, padding rows (document -1, no
    target) fill up, so a rank's last batch may hold no target at all.
    """
    documents = corpus.validation
    stream = Stream(documents, permutation(documents.num_documents, _ORDER))
    rows = num_validation_rows(corpus, sequence_length, max_tokens)
    order = permutation(num_validation_rows(corpus, sequence_length, 0), _ORDER)
    for first in range(data_rank, -(-rows // data_world) * data_world, batch_size * data_world):
        numbers = range(first, first + batch_size * data_world, data_world)
        yield stack_rows(
            stream.row(int(order[number]) * sequence_length, sequence_length, Tokenizer.pad_id)
            if number < rows
            else padding_row(sequence_length)
            for number in numbers
        )


def padding_row(sequence_length: int) -> Row:
    return Row(*(np.full(sequence_length, v, np.int64) for v in (Tokenizer.pad_id, PADDING_DOCUMENT, IGNORED_TARGET)))
