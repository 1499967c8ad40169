"""Accuracy by distance, of models whose memory is known."""

import pytest
import torch

from tests.data.test_recall import LENGTH, OPTIONS, TOKENIZER
from tests.documents import documents_of
from v4train.data import Batch
from v4train.data.recall import RecallTask
from v4train.evaluation.measure import flat
from v4train.evaluation.recall import recall_figures, recall_sums
from v4train.evaluation.scores import Scores

ROWS = 20


@pytest.fixture
def task() -> RecallTask:
    return RecallTask(documents_of([30, 90, 40], 1000), TOKENIZER, LENGTH, 1, **OPTIONS)


def remembering(reach: int):
    """Finds what followed the last token when it came before, at most `reach` tokens ago; else it is wrong."""

    def scores(batch: Batch) -> Scores:
        right = torch.zeros(batch.targets.shape, dtype=torch.bool)
        for row, (tokens, targets) in enumerate(zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True)):
            for place in range(len(tokens)):
                for before in range(max(0, place - reach), place):
                    right[row, place] |= tokens[before] == tokens[place] and tokens[before + 1] == targets[place]
        return Scores(torch.where(right, 0.5, 3.0), right, batch.targets != -100)

    return scores


@pytest.mark.parametrize(("reach", "expected"), [(LENGTH, [1, 1, 1]), (60, [1, 1, 0]), (16, [1, 0, 0]), (8, [0, 0, 0])])
def test_accuracy_tells_how_far_a_memory_reaches(task, reach, expected):
    found = recall_figures(recall_sums(task, remembering(reach), ROWS, 4), task)
    assert [of["distance"] for of in found] == OPTIONS["distances"]
    assert [of["accuracy"] for of in found] == expected
    assert [of["loss"] for of in found] == [0.5 if right else 3.0 for right in expected]
    assert {of["chance"] for of in found} == {0.1} and all(of["pairs"] >= 0.9 * ROWS for of in found)
    assert list(flat({"recall": found})) == [
        (f"eval/recall/{distance}", right) for distance, right in zip(OPTIONS["distances"], expected, strict=True)
    ]


def test_ranks_together_have_what_one_has(task):
    whole = recall_sums(task, remembering(60), ROWS, 4)
    parts = [recall_sums(task, remembering(60), ROWS, 4, rank=(rank, 3)) for rank in range(3)]
    assert torch.equal(sum(parts), whole) and all(part.sum() > 0 for part in parts)


def test_a_distance_without_a_pair_has_no_accuracy(task):
    assert recall_figures(torch.zeros(3, 3), task)[0]["accuracy"] is None
