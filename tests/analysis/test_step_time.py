"""Time of a step from the numbers of a device, by hand."""

from dataclasses import replace

import pytest

from tests.models import tiny_config
from v4train.analysis.activations import unit_bytes
from v4train.analysis.communication import activation_bytes, gradient_bytes
from v4train.analysis.flops import part_flops, training_flops_per_token
from v4train.analysis.parameters import stage_shares
from v4train.analysis.step_time import (
    PASSES,
    STATE_PASSES,
    WEIGHT_PASSES,
    Device,
    Use,
    bubble_fraction,
    exchanges,
    step_time,
    traffic_per_rank,
)
from v4train.analysis.work import Work

LINKS = {"node": 2, "node_bandwidth": 1e6, "bandwidth": 1e3, "latency": 0.1}
DEVICE = Device(2e9, 1e9, memory=1, memory_bandwidth=1e8, shared=False, **LINKS)
USE = Use(efficiency=0.5, overlap=0.25)
CONFIG = tiny_config("swa csa hca", mtp__num_layers=0)
SIZE = stage_shares(CONFIG, Work(64))[0].size


def test_one_rank_computes():
    work = Work(64, rows=2, accumulation=3, optimizer="adamw", zero_stage=0)
    time = step_time(CONFIG, work, DEVICE, USE)
    flops = 3 * 128 * training_flops_per_token(CONFIG, 64)
    weights = 4 * SIZE
    passes = 3 * (PASSES * sum(unit_bytes(CONFIG, work)) + WEIGHT_PASSES * weights) / 1e8
    assert time.compute == pytest.approx(flops / 0.5e9 + passes)
    assert time.optimizer == pytest.approx(STATE_PASSES * weights / 1e8)
    assert time.bubble == time.communication == 0
    assert time.mfu == pytest.approx(flops / 1e9 / time.total)


def test_bf16_is_at_another_rate():
    seconds = []
    for precision in ("fp32", "bf16"):
        work = Work(64, optimizer="adamw", precision=precision)
        passes = (PASSES * sum(unit_bytes(CONFIG, work)) + WEIGHT_PASSES * 4 * SIZE) / 1e8
        seconds.append(step_time(CONFIG, work, DEVICE, USE).compute - passes)
    assert seconds[0] == pytest.approx(2 * seconds[1])


def test_recomputation_adds_a_forward_of_the_blocks():
    plain, again = (step_time(CONFIG, Work(64, optimizer="adamw", recompute=r), DEVICE, USE) for r in ("none", "block"))
    blocks = sum(part_flops(CONFIG, 64)[1:4])
    assert again.compute - plain.compute == pytest.approx(64 * blocks / 3 / 0.5e9)
    part = step_time(CONFIG, Work(64, optimizer="adamw", recompute="attention"), DEVICE, USE)
    assert plain.compute < part.compute < again.compute


@pytest.mark.parametrize(("mode", "part"), [("dense", 1), ("indexer_warmup", 0)])
def test_modes_have_flops_of_their_own(mode, part):
    """A dense backward pass computes no indexer again; where the indexers learn alone it computes nothing again."""
    work = Work(64, optimizer="adamw", mode=mode)
    sparse, plain = (step_time(CONFIG, of, DEVICE, USE) for of in (replace(work, mode="sparse"), work))
    flops = training_flops_per_token(CONFIG, 64, mode) - training_flops_per_token(CONFIG, 64)
    assert plain.compute - sparse.compute == pytest.approx(64 * flops / 0.5e9)
    assert plain.mfu == pytest.approx(64 * training_flops_per_token(CONFIG, 64, mode) / 1e9 / plain.total)
    again = step_time(CONFIG, replace(work, recompute="block"), DEVICE, USE)
    blocks = sum(part_flops(CONFIG, 64, mode)[1:4]) / 3
    assert again.compute - plain.compute == pytest.approx(part * 64 * blocks / 0.5e9)


def test_recomputation_reaches_the_block_of_mtp():
    """And not the head that MTP calls, nor its projections."""
    with_mtp, without = tiny_config("swa csa hca"), CONFIG
    more = []
    for config in (with_mtp, without):
        plain, again = (
            step_time(config, Work(64, optimizer="adamw", recompute=r), DEVICE, USE) for r in ("none", "block")
        )
        more.append((again.compute - plain.compute) * 0.5e9 / 64)
    block = part_flops(with_mtp, 64)[5] / 3
    outside = 2 * ((1 + with_mtp.num_streams) * with_mtp.hidden_size**2) + part_flops(without, 64)[4] / 3
    assert more[0] - more[1] == pytest.approx(block - outside, rel=1e-6)


def test_the_optimizer():
    """ZeRO shares out what is updated; Newton-Schulz is as often, and in the dtype, as the options say."""
    seconds = [
        step_time(CONFIG, Work(64, data=data, zero_stage=1, optimizer="adamw"), DEVICE, USE).optimizer
        for data in (1, 4)
    ]
    assert seconds[0] == pytest.approx(4 * seconds[1])
    passes = STATE_PASSES * 4 * SIZE / 1e8
    fp32, shorter, bf16 = (
        step_time(CONFIG, Work(64, zero_stage=0, **of), DEVICE, USE).optimizer - passes
        for of in ({}, {"newton_schulz_steps": 5}, {"newton_schulz_dtype": "bfloat16"})
    )
    assert fp32 == pytest.approx(2 * shorter) == pytest.approx(2 * bf16)


@pytest.mark.parametrize(("stages", "micro_batches", "share"), [(1, 4, 0), (4, 1, 3 / 4), (4, 12, 3 / 15)])
def test_bubble(stages, micro_batches, share):
    assert bubble_fraction(Work(64, pipeline=stages, accumulation=micro_batches)) == share


def test_bubble_in_a_step():
    work = Work(64, pipeline=2, accumulation=4)
    time = step_time(CONFIG, work, DEVICE, USE)
    assert time.bubble / (time.bubble + time.compute) == pytest.approx(bubble_fraction(work))


def test_ranks_that_share_cores_leave_them_to_each_other():
    """No bubble, and two uneven stages take half as long each as both together."""
    work = Work(64, accumulation=4, zero_stage=0)
    together, apart, own = (
        step_time(CONFIG, of, replace(DEVICE, shared=shared), USE)
        for of, shared in ((work, True), (replace(work, pipeline=2), True), (replace(work, pipeline=2), False))
    )
    assert apart.bubble == 0 < own.bubble
    assert 2 * apart.compute == pytest.approx(together.compute) and apart.compute < own.compute
    assert 2 * apart.optimizer == pytest.approx(together.optimizer) and apart.optimizer < own.optimizer


def test_traffic_is_that_of_the_formulas():
    work = Work(64, data=4, expert=2, optimizer="adamw", zero_stage=1)
    share = stage_shares(CONFIG, work)[0]
    dense = gradient_bytes(share.size - share.experts, 4, 1)
    experts = 2 * gradient_bytes(share.experts, 2, 1)
    sent = traffic_per_rank(CONFIG, work)
    assert sent["gradients"] == (dense + experts) / 4
    assert sent["expert"] == activation_bytes(CONFIG, work)["expert"] / 4
    assert sent["tensor"] == sent["context"] == sent["pipeline"] == 0


def test_links_and_waits():
    """Experts' groups of 2 lie in a node, the 4 data ranks don't; a quarter is hidden; waits are not."""
    work = Work(64, data=4, expert=2, optimizer="adamw", zero_stage=1)
    sent = traffic_per_rank(CONFIG, work)
    seconds = sent["expert"] / 1e6 + sent["gradients"] / 1e3
    assert exchanges(CONFIG, work) == 3 * 7 + 1
    assert step_time(CONFIG, work, DEVICE, USE).communication == pytest.approx(0.75 * seconds + 0.1 * 22)


def test_tensor_parallelism_shares_out_a_part():
    one, two, many = (step_time(CONFIG, Work(64, tensor=t, optimizer="adamw"), DEVICE, USE).compute for t in (1, 2, 4))
    assert one / 2 < two < one and one / 4 < many < two
