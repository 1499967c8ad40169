"""Packed batches for tests, and the slow, obvious reading of them.

A layout lists the lengths of a row's documents; a negative number is that much padding: `[5, -2, 9]` is a document of
five tokens, two padded positions, a document of nine.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.models import random_tokens

layouts = st.lists(st.integers(1, 40) | st.integers(-6, -1), min_size=1, max_size=6)


def ids_of(*rows: list[int]) -> Tensor:
    """document_ids [B, S] of the layouts; shorter rows are padded at their end."""
    length = max(sum(abs(part) for part in row) for row in rows)
    ids = torch.full((len(rows), length), -1)
    for row, layout in enumerate(rows):
        position = 0
        for number, part in enumerate(layout):
            if part > 0:
                ids[row, position : position + part] = number % 3  # numbers come back: only a change marks a start
            position += abs(part)
    return ids


def documents_in(ids: Tensor) -> list[tuple[int, int, int]]:
    """(row, first token, one past the last) of each document, token by token."""
    found = []
    for row, values in enumerate(ids.tolist()):
        start = 0
        for position in range(1, len(values) + 1):
            if position == len(values) or values[position] != values[start]:
                if values[start] >= 0:
                    found.append((row, start, position))
                start = position
    return found


def same_document(ids: Tensor) -> Tensor:
    """[B, S, S] bool: both positions lie in one document; a padded position shares one with itself alone."""
    same = torch.eye(ids.shape[1], dtype=torch.bool).repeat(ids.shape[0], 1, 1)
    for row, start, stop in documents_in(ids):
        same[row, start:stop, start:stop] = True
    return same


def visible_entries(ids: Tensor, ratio: int) -> Tensor:
    """[B, S, N] bool: which compressed entries each token sees, by counting entries document by document."""
    visible = torch.zeros(*ids.shape, ids.shape[1] // ratio, dtype=torch.bool)
    used = [0] * ids.shape[0]
    for row, start, stop in documents_in(ids):
        for token in range(start, stop):
            complete = (token - start + 1) // ratio
            visible[row, token, used[row] : used[row] + complete] = True
        used[row] += (stop - start) // ratio
    return visible


def shifted(tokens: Tensor, ids: Tensor) -> Tensor:
    """Targets [B, S]: the next token of the same document, -100 at a document's last token and on padding."""
    targets = torch.full_like(tokens, -100)
    for row, start, stop in documents_in(ids):
        targets[row, start : stop - 1] = tokens[row, start + 1 : stop]
    return targets


def batch_of(*rows: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(input ids, document ids, targets), each [B, S], of random tokens laid out so."""
    ids = ids_of(*rows)
    tokens = random_tokens(*ids.shape, seed=seed)
    return tokens, ids, shifted(tokens, ids)
