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
    targets = torch.randint(0, 5, (4, 50), generator=torch.Generator().manual_seed(0)) ** 2
    entropy = unigram_entropy(target_counts(targets, 20))
    logits = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits.expand(200, 20), targets.flatten())
        value.backward()
        return value

    optimizer.step(loss)
    assert loss().item() == pytest.approx(entropy, abs=1e-4)


def test_counts_and_bytes_leave_out_ignored_targets():
    targets = torch.tensor([[3, 3, -100], [0, 4, -100]])
    assert target_counts(targets, 6).tolist() == [1, 0, 0, 2, 1, 0]
    assert target_bytes(targets, np.array([0, 0, 0, 5, 7, 1])) == 17
