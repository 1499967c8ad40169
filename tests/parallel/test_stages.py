"""Pipeline stages are as even as can be."""

import itertools

import pytest
import torch

from tests.models import tiny_config
from v4train.analysis.flops import part_flops, training_flops_per_token
from v4train.analysis.stages import balanced
from v4train.model import Transformer
from v4train.parallel.sizes import Sizes
from v4train.parallel.stages import Stages
from v4train.parallel.topology import Topology


@pytest.mark.parametrize("seed", range(20))
def test_the_dearest_run_is_as_cheap_as_can_be(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(0, 9, (8,), generator=generator).tolist()
    for count in range(1, 9):
        bounds = balanced(costs, count)
        assert bounds[0] == 0 and bounds[-1] == len(costs) and all(a < b for a, b in itertools.pairwise(bounds))
        choices = itertools.combinations(range(1, len(costs)), count - 1)
        best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, 8))) for cuts in choices)
        assert max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds)) == best


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_part_is_on_one_stage_and_mtp_with_the_head(count):
    config = tiny_config("swa csa hca")
    with torch.device("meta"):
        model = Transformer(config)
    stages = [Stages(model, Topology(rank, 0, Sizes(pipeline=count), torch.device("cpu")), 64) for rank in range(count)]
    assert list(itertools.chain(*(stage.parts for stage in stages))) == model.parts()
    assert model.head in stages[-1].parts and model.mtp in stages[-1].parts
    assert stages[-1].shared_embedding is stages[0].shared_embedding is model.embedding
    assert all(stage.shared_embedding is None for stage in stages[1:-1])
    assert sum(part_flops(config, 64)) == pytest.approx(training_flops_per_token(config, 64))
