"""Validation rows: the same for every run, seed and number of ranks."""

from collections.abc import Iterator

import numpy as np

from v4train.data.corpus import TokenizedDocuments
from v4train.data.loader import Batch, stack_rows
from v4train.data.packing import (
    IGNORED_TARGET,
    PADDING_DOCUMENT,
    Piece,
    Row,
    build_row,
    concatenate,
    permutation,
)

_ORDER = 0  # key of the fixed order of documents, and of rows: a subset of rows draws on all documents


def num_validation_rows(documents: TokenizedDocuments, sequence_length: int, max_tokens: int) -> int:
    """Rows that `validation_batches` visits, all ranks together; at least one."""
    rows = -(-documents.num_tokens // sequence_length)
    return min(rows, max(1, max_tokens // sequence_length)) if max_tokens else rows


def validation_batches(
    documents: TokenizedDocuments,
    sequence_length: int,
    batch_size: int,
    max_tokens: int,
    data_rank: int,
    data_world: int,
    pad_id: int,
) -> Iterator[Batch]:
    """This rank's validation batches, [R, S] each: as few as R <= `batch_size` allows, and R no larger than these need.

    `max_tokens` tokens (0: all) of the held-out `documents`, end to end, in whole rows drawn in a fixed order; the last
    row of the documents is padded. Row i goes to rank i % data_world. Every rank gets the same number of batches of the
    same shape, since a forward may hold collectives (ZeRO-3, experts): where rows run out, padding rows (document -1,
    no target) fill up, so a rank's last batch may hold no target at all.
    """
    order, sizes = permutation(documents.num_documents, _ORDER), np.diff(documents.offsets)
    packed = concatenate((Piece(int(i), 0, int(sizes[i])) for i in order), sequence_length)
    rows = num_validation_rows(documents, sequence_length, max_tokens)
    of_rank = -(-rows // data_world)
    batch_size = -(-of_rank // -(-of_rank // batch_size))
    chosen = permutation(len(packed), _ORDER)
    for first in range(data_rank, of_rank * data_world, batch_size * data_world):
        numbers = range(first, first + batch_size * data_world, data_world)
        yield stack_rows(
            build_row(packed[chosen[number]], documents, sequence_length, pad_id)
            if number < rows
            else padding_row(sequence_length, pad_id)
            for number in numbers
        )


def padding_row(sequence_length: int, pad_id: int) -> Row:
    return Row(*(np.full(sequence_length, value, np.int64) for value in (pad_id, PADDING_DOCUMENT, IGNORED_TARGET)))
