"""Memory of a rank: by hand, against what PyTorch holds, and against set-ups that others have published."""

from dataclasses import replace

import pytest
import torch

from tests.models import random_tokens, tiny_config
from v4train.analysis.activations import unit_bytes, working_bytes
from v4train.analysis.memory import GIB, LIVE, Needs, newton_schulz_bytes, peak_memory, phases, stage_memory
from v4train.analysis.parameters import MuonGroup, Share, stage_shares
from v4train.analysis.work import Work
from v4train.model import build_model
from v4train.model.config import model_config
from v4train.optim.config import BATCH
from v4train.optim.muon import newton_schulz
from v4train.overrides import composed
from v4train.parallel.sizes import REDUCED


def shipped(name):
    return model_config(composed("pretrain", [f"model={name}"]).model)


def test_what_pytorch_holds_after_a_step():
    """ZeRO 0 with AdamW is plain PyTorch: weights, gradients and two moments."""
    config, tokens = tiny_config(), random_tokens(2, 64)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, None, tokens).loss.backward()
    optimizer.step()
    memory = by_phase(stage_shares(config, Work(64))[0], Work(64, zero_stage=0, optimizer="adamw"))["backward"]
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == sum(state.nbytes for state in states)
    assert memory.buffers == 0


def by_phase(share, work, needs=Needs()):  # noqa: B008 - frozen
    return {memory.phase: memory for memory in phases(share, work, needs)}


def share(**sizes):
    return Share(slice(0, 1), **sizes)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        # 1000 numbers, 600 of them experts'; 8 ranks have the others, 2 ranks each expert: a part is 50 + 300
        (0, 4000, 4000, 8000),
        (1, 4000, 4000, 12 * 350),
        (2, 4000, 0, 12 * 350),  # they lie in the bucket
        (3, 4 * 350 + 4000, 4 * 350, 12 * 350),
    ],
)
def test_zero_stages_by_hand(stage, weights, gradients, optimizer):
    work = Work(64, data=8, expert=4, zero_stage=stage, optimizer="adamw", device="cpu")
    memory = by_phase(share(size=1000, experts=600), work)["backward"]
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.buffers == (4000 if stage > 1 else 0)


def matrices():
    """900 elements of matrices, 600 of them experts': 10 of 6 x 10, two tensors, and 300 of 5 x 10, one of two."""
    groups = {
        "experts": MuonGroup(True, size=600, whole=600, matrix=60, shapes={(6, 10): [600, 300]}),
        "others": MuonGroup(False, size=300, whole=300, matrix=50, shapes={(5, 10): [300, 100]}),
    }
    return share(size=1000, experts=600, matrices=900, expert_matrices=600, groups=groups)


def test_muon_keeps_one_number_less_and_zero_stages_it():
    alone = by_phase(matrices(), Work(64, zero_stage=0))["muon"]
    assert alone.optimizer == 4 * 900 + 8 * 100
    # The experts' ten matrices: copies, and at work together
    assert alone.working == 4 * 600 + 600 * 4 * (3 + 2 * 6 / 10)
    own, of_experts, straddling = 350, 600 / 2, 60  # parts
    for stage, gradients in ((1, 0), (2, own)):
        work = Work(64, data=8, expert=4, zero_stage=stage, accumulation=2, device="cpu")
        sharded = by_phase(matrices(), work)
        assert sharded["backward"].optimizer == 12 * own + 8 * straddling
        muon = sharded["muon"]
        own_matrices = of_experts + 300 / 8
        assert muon.working == 4 * own_matrices + 4 * of_experts + of_experts * 4 * (3 + 2 * 6 / 10)
        assert muon.gradients == 4 * (own + gradients) and muon.buffers == 4000  # the bucket is still there
        assert sharded["step"].working == 4 * own_matrices + 4 * of_experts
        assert sharded["step"].buffers == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_newton_schulz_is_what_pytorch_allocates(dtype):
    """Largest sum of live storages while ten matrices go through, as the profiler of memory sees it."""
    x = torch.randn(10, 32, 64)
    group = MuonGroup(False, x.numel(), x.numel(), 32 * 64, {(32, 64): [x.numel(), x.numel()]})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        newton_schulz(x, dtype=getattr(torch, dtype))
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    expected = newton_schulz_bytes(group, 1.0, Work(64, newton_schulz_dtype=dtype))
    assert peak + x.nbytes == pytest.approx(expected, rel=0.1)


def test_newton_schulz_takes_a_batch_or_a_tensor():
    batch = BATCH["cuda"]
    whole, tensor = 4 * batch, 2 * batch
    small = MuonGroup(False, whole, whole, 1, {(1, 1): [whole, 1]})
    large = MuonGroup(False, whole, whole, 1, {(1, 1): [whole, tensor]})
    work = Work(64, data=4, zero_stage=1)
    assert newton_schulz_bytes(small, 1.0, work) == 20 * batch
    assert newton_schulz_bytes(small, 1.0, replace(work, device="cpu")) == 20 * BATCH["cpu"]
    assert newton_schulz_bytes(large, 1.0, work) == 20 * tensor
    assert newton_schulz_bytes(large, 1 / 4, work) == 20 * batch  # its part of the tensor
    assert newton_schulz_bytes(large, 1 / 4, Work(64, data=4, zero_stage=3)) == 20 * tensor


def test_reduction_copies_what_it_sends():
    """ZeRO 0 flattens a bucket, ZeRO 1 fills one and flattens that; a rank alone sends nothing."""
    of = share(size=1000)
    assert by_phase(of, Work(64, zero_stage=0, optimizer="adamw"))["reduction"].working == 0
    assert by_phase(of, Work(64, data=4, zero_stage=0, optimizer="adamw"))["reduction"].working == 4000
    one = {"data": 4, "zero_stage": 1, "optimizer": "adamw", "device": "cpu"}
    whole = by_phase(of, Work(64, **one))["reduction"]
    assert (whole.gradients, whole.buffers, whole.working) == (0, 4000, 4000)
    several = by_phase(of, Work(64, **one, bucket=100))["reduction"]
    assert (several.gradients, several.buffers, several.working) == (3600, 400, 1000)


def test_a_bucket_on_a_gpu_is_whole():
    of, one = share(size=1000), {"data": 4, "zero_stage": 1, "optimizer": "adamw"}
    assert by_phase(of, Work(64, **one))["backward"].buffers == 4 * 500_000_000
    assert by_phase(of, Work(64, **one, device="cpu"))["backward"].buffers == 0
    pipeline = Work(64, pipeline=2, **one)
    assert by_phase(of, pipeline)["reduction"].buffers == 2 * 4 * 500_000_000


def test_accumulation_sums_parts_in_zero_2():
    of, two = share(size=1000), {"data": 4, "zero_stage": 2, "optimizer": "adamw", "device": "cpu"}
    once, often = (by_phase(of, Work(64, accumulation=n, **two)) for n in (1, 2))
    assert often["backward"].gradients - once["backward"].gradients == 4 * 250
    assert often["step"].gradients - once["step"].gradients == 4 * 250


def test_limits_of_deepspeed():
    big = share(size=4 * LIVE)
    assert by_phase(big, Work(64, data=4, zero_stage=3))["backward"].weights == 4 * LIVE + 4 * LIVE
    assert by_phase(big, Work(64, data=4, zero_stage=2))["backward"].buffers == 4 * 500_000_000
    assert by_phase(big, Work(64, data=4, zero_stage=0))["reduction"].working == 4 * 500_000_000
    assert by_phase(big, Work(64, data=4, zero_stage=2, bucket=7))["backward"].buffers == 28


def test_buckets_on_a_cpu_are_small():
    """A million numbers, or the largest tensor; ZeRO 0 copies both together at most."""
    cpu = {"data": 4, "optimizer": "adamw", "device": "cpu"}
    for largest in (1000, 3 * REDUCED):
        of, bucket = share(size=4 * REDUCED, largest=largest), max(REDUCED, largest)
        assert by_phase(of, Work(64, zero_stage=0, **cpu))["reduction"].working == 4 * min(
            4 * REDUCED, REDUCED + largest
        )
        for stage in (1, 2):
            assert by_phase(of, Work(64, zero_stage=stage, **cpu))["reduction"].buffers == 4 * bucket


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_come_as_activations_go(stage):
    """One micro-batch: what the units up to one keep, and the gradients from it on; ZeRO 2 leaves a rank its part."""
    config = tiny_config("swa csa hca", mtp__num_layers=0)
    work = Work(64, data=2, zero_stage=stage, optimizer="adamw", device="cpu")
    units, (of,) = unit_bytes(config, work), stage_shares(config, work)
    assert sum(of.by_unit.values()) == of.size and len(of.by_unit) == len(units)
    (once,), (twice,) = stage_memory(config, work), stage_memory(config, replace(work, accumulation=2))
    weight = 1 if stage < 2 else 1 / 2
    sums = [sum(units[: n + 1]) + weight * 4 * sum(of.by_unit[m] for m in range(n, 5)) for n in range(5)]
    at = max(range(5), key=lambda n: sums[n])
    assert once.activations == sum(units[: at + 1]) and twice.activations == sum(units)
    if stage < 2:
        assert once.gradients == 4 * sum(of.by_unit[m] for m in range(at, 5)) and twice.gradients == 4 * of.size


def test_muon_in_zero_3_gathers_gradients_and_momenta():
    for bucket, gathered in ((500_000_000, 900), (100, 300)):  # or the largest tensor
        memory = by_phase(matrices(), Work(64, data=8, expert=4, zero_stage=3, bucket=bucket, device="cpu"))["muon"]
        assert memory.working == 2 * 4 * gathered + 4 * 300 + 300 * 4 * (3 + 2 * 6 / 10)


def test_micro_batches_in_flight():
    """1F1B: the first of 3 stages has 3 micro-batches under way, the last one; fewer where there are fewer."""
    config = tiny_config("swa csa hca swa csa", mtp__num_layers=0)
    units = unit_bytes(config, Work(64, pipeline=3))
    streams = 4 * config.num_streams * config.hidden_size * 64
    moe = config.moe
    tables = 8 * config.vocab_size * moe.top_k * moe.num_hash_layers + 4 * moe.num_experts * config.num_layers
    for accumulation, flights in ((8, (3, 2, 1)), (2, (2, 2, 1)), (1, (1, 1, 1))):
        work = Work(64, accumulation=accumulation, pipeline=3, optimizer="adamw", device="cpu")
        shares = stage_shares(config, work)
        handed_on = [flight + 1 for flight in flights]  # what comes, or what goes; both in the middle
        handed_on[1] *= 2
        for index, (memory, of, flight) in enumerate(zip(stage_memory(config, work), shares, flights, strict=True)):
            assert memory.phase == "backward"
            held = flight * sum(units[of.units])
            if accumulation > 1:
                assert (memory.activations, memory.gradients) == (held, 4 * of.size)
            else:  # gradients come as activations go
                assert memory.activations <= held < memory.activations + memory.gradients < held + 4 * of.size
            assert memory.working >= working_bytes(config, work)
            assert memory.buffers == handed_on[index] * streams + (tables if index == 0 else 0)


def test_the_last_stage_has_the_embedding_too():
    config = tiny_config("swa csa hca")
    alone, shared = (tiny_config("swa csa hca", mtp__num_layers=n) for n in (0, 1))
    buffers = [
        stage_memory(of, Work(64, pipeline=2, optimizer="adamw", zero_stage=0))[1].buffers for of in (alone, shared)
    ]
    assert buffers[1] == buffers[0] + 2 * 4 * 64 * 32
    assert config.hidden_size == 32


def published(**sizes):
    """As they would be trained here: bf16 under autocast, blocks recomputed."""
    sizes = {"recompute": "block", "precision": "bf16", "newton_schulz_dtype": "bfloat16"} | sizes
    return Work(4096, accumulation=16, **sizes)


def test_published_layout_that_fits():
    """V4.md 5, a community set-up: Pro on 256 GB300."""
    work = published(pipeline=4, data=64, expert=64)
    assert peak_memory(shipped("pro"), work).total < 0.9 * 288 * GIB


def test_published_layout_that_needs_bf16_weights():
    """Pro on 512 H100, PP8 x EP64 (V4.md 5) has 7.2 B parameters a rank, 54 GiB with gradients in fp32."""
    work = published(pipeline=8, data=64, expert=64)
    memory = peak_memory(shipped("pro"), work)
    assert memory.weights == pytest.approx(4 * 7.19e9, rel=0.01)
    assert memory.total > 80 * GIB
