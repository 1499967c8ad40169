"""Memory of a rank: by hand, against what PyTorch holds, and against set-ups that others have published."""

import pytest
import torch

from tests.models import random_tokens, tiny_config
from v4train.analysis.activations import unit_bytes, working_bytes
from v4train.analysis.memory import GIB, LIVE, peak_memory, stage_memory, static_memory
from v4train.analysis.parameters import Share, stage_shares
from v4train.analysis.work import Work
from v4train.model import build_model
from v4train.model.config import model_config
from v4train.overrides import composed


def shipped(name):
    return model_config(composed("pretrain", [f"model={name}"]).model)


def test_what_pytorch_holds_after_a_step():
    """ZeRO 0 with AdamW is plain PyTorch: weights, gradients and two moments."""
    config, tokens = tiny_config(), random_tokens(2, 64)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, None, tokens).loss.backward()
    optimizer.step()
    memory = static_memory(stage_shares(config, Work(64))[0], Work(64, zero_stage=0, optimizer="adamw"))
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == sum(state.nbytes for state in states)
    assert memory.buffers == 0


def share(**sizes):
    return Share(slice(0, 1), **sizes)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        # 1000 numbers, 600 of them experts'; 8 ranks have the others, 2 ranks each expert: a part is 50 + 300
        (0, 4000, 4000, 8000),
        (1, 4000, 4000, 12 * 350),
        (2, 4000, 4 * 350, 12 * 350),
        (3, 4 * 350 + 4000, 4 * 350, 12 * 350),
    ],
)
def test_zero_stages_by_hand(stage, weights, gradients, optimizer):
    work = Work(64, data=8, expert=4, zero_stage=stage, optimizer="adamw")
    memory = static_memory(share(size=1000, experts=600), work)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.buffers == (4000 if stage else 0)


def test_muon_keeps_one_number_less():
    sizes = {"size": 1000, "experts": 600, "matrices": 900, "expert_matrices": 600, "largest": 200}
    alone = static_memory(share(**sizes), Work(64, zero_stage=0))
    assert alone.optimizer == 4 * 900 + 8 * 100
    sharded = static_memory(share(**sizes), Work(64, data=8, expert=4, zero_stage=1))
    own, matrices = 350, 300 / 8 + 600 / 2  # a part; of Muon's
    assert sharded.optimizer == 4 * own + 4 * (matrices + 200) + 8 * (own - matrices)


def test_limits_of_deepspeed():
    big = share(size=4 * LIVE)
    assert static_memory(big, Work(64, data=4, zero_stage=3)).weights == 4 * LIVE + 4 * LIVE
    assert static_memory(big, Work(64, data=4, zero_stage=1)).buffers == 4 * 500_000_000
    assert static_memory(big, Work(64, data=4, zero_stage=1, bucket=7)).buffers == 28


def test_micro_batches_in_flight():
    """1F1B: the first of 3 stages has 3 micro-batches under way, the last one; fewer where there are fewer."""
    config = tiny_config("swa csa hca swa csa", mtp__num_layers=0)
    units = unit_bytes(config, Work(64, pipeline=3))
    for accumulation, flights in ((8, (3, 2, 1)), (2, (2, 2, 1)), (1, (1, 1, 1))):
        work = Work(64, accumulation=accumulation, pipeline=3)
        shares = stage_shares(config, work)
        for memory, of, flight in zip(stage_memory(config, work), shares, flights, strict=True):
            assert memory.activations == flight * sum(units[of.units])
            assert memory.working >= working_bytes(config, work)


def test_the_last_stage_has_the_embedding_too():
    config = tiny_config("swa csa hca")
    alone, shared = (tiny_config("swa csa hca", mtp__num_layers=n) for n in (0, 1))
    buffers = [stage_memory(of, Work(64, pipeline=2))[1].buffers for of in (alone, shared)]
    sizes = [stage_shares(of, Work(64, pipeline=2))[1].size for of in (alone, shared)]
    assert buffers[1] - 4 * sizes[1] == buffers[0] - 4 * sizes[0] + 2 * 4 * 64 * 32
    assert config.hidden_size == 32


@pytest.mark.parametrize(
    ("model", "gib", "sizes"),
    [
        # V4.md 5, community set-ups of training: what v4train needs for the same layouts, fp32 weights and gradients
        ("pro", 288, {"pipeline": 4, "data": 64, "expert": 64}),  # 256 GB300
        ("flash", 186, {"pipeline": 4, "data": 8, "expert": 8, "zero_stage": 0}),  # 32 GB200
    ],
)
def test_published_layouts_fit(model, gib, sizes):
    work = Work(4096, accumulation=16, recompute="block", precision="bf16", **sizes)
    assert peak_memory(shipped(model), work).total < 0.9 * gib * GIB


def test_published_layout_that_needs_bf16_weights():
    """Pro on 512 H100, PP8 x EP64 (V4.md 5) has 7.2 B parameters a rank, 54 GiB with gradients in fp32."""
    work = Work(4096, accumulation=16, recompute="block", precision="bf16", pipeline=8, data=64, expert=64)
    memory = peak_memory(shipped("pro"), work)
    assert memory.weights + memory.gradients == pytest.approx(2 * 4 * 7.19e9, rel=0.01)
    assert memory.total > 80 * GIB
