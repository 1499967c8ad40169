import math

import numpy as np
import pytest
import torch

from v4train.data.statistics import target_bytes, target_counts, unigram_entropy


def test_entropy_in_closed_form():
    assert unigram_entropy(torch.tensor([1, 1, 1, 1, 0])) == pytest.approx(math.log(4), abs=1e-12)
    assert unigram_entropy(np.array([0, 9, 0])) == 0
    assert unigram_entropy(torch.tensor([3, 1])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_entropy_is_the_least_loss_of_a_model_without_context():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (200,), generator=generator) ** 2
    counts = target_counts(targets.view(4, 50), 17)
    best = (counts / counts.sum()).double().log().clamp_min(-50)

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits.expand(200, 17), targets).item()

    assert loss(best) == pytest.approx(unigram_entropy(counts), abs=1e-6)
    for size in (0.01, 0.1, 1.0):
        assert loss(best + size * torch.randn(17, generator=generator)) > unigram_entropy(counts)


def test_counts_and_bytes_leave_out_ignored_targets():
    targets = torch.tensor([[3, 3, -100], [0, 4, -100]])
    assert target_counts(targets, 6).tolist() == [1, 0, 0, 2, 1, 0]
    assert target_bytes(targets, np.array([0, 0, 0, 5, 7, 1])) == 17
