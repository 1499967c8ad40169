"""A clock that is set by hand: parts are exact."""

import pytest
import torch
import torch.distributed as dist

from v4train.train import step_times
from v4train.train.step_times import StepTimes, over_ranks, timing_waits


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])
    return now


def test_a_part_does_not_count_what_parts_inside_it_count(clock):
    times = StepTimes(torch.device("cpu"))

    def update():
        clock[0] += 16

    clock[0] += 100  # in no part
    with times.part("backward"):
        clock[0] += 1
        with times.part("wait"):
            clock[0] += 2
        clock[0] += 4
        times.timed("optimizer", update)()
        clock[0] += 8
    clock[0] += 100
    with times.part("wait"):
        clock[0] += 32
    assert times.take() == {"data": 0, "forward": 0, "backward": 13, "optimizer": 16, "wait": 34}
    assert set(times.take().values()) == {0}


def test_a_part_that_fails_is_left(clock):
    times = StepTimes(torch.device("cpu"))
    with pytest.raises(RuntimeError), times.part("forward"), times.part("wait"):
        clock[0] += 1
        raise RuntimeError
    with times.part("data"):
        clock[0] += 2
    assert times.take() == {"data": 2, "forward": 0, "backward": 0, "optimizer": 0, "wait": 1}


def test_one_rank_is_not_the_slowest_of_any(clock):
    own = {"data": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 4.0, "wait": 0.0}
    assert over_ranks(own, 11.0, torch.device("cpu")) == {f"{name}_seconds": value for name, value in own.items()}


def test_waiting_for_a_collective_is_seen_inside_only(tmp_path):
    times = StepTimes(torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        before = dist.Work.wait
        with timing_waits(times):
            dist.all_reduce(torch.ones(3))
            dist.all_reduce(torch.ones(3), async_op=True).wait()
            dist.all_gather_object([None], "object")
        assert times.take()["wait"] > 0
        dist.all_reduce(torch.ones(3))
        assert times.take()["wait"] == 0 and dist.Work.wait is before
    finally:
        dist.destroy_process_group()
