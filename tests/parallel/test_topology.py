"""Ranks and groups of a layout, and layouts that can't be."""

import itertools

import pytest
import torch

from tests.shipped import shipped
from v4train.errors import ConfigError
from v4train.parallel.sizes import ParallelismConfig, Sizes, check_layout
from v4train.parallel.topology import (
    Topology,
    first_node,
    make_topology,
    read_ranks,
    rendezvous,
)


def parallelism(preset: str = "auto", **overrides) -> ParallelismConfig:
    return ParallelismConfig(**(shipped("parallelism", preset) | overrides))


@pytest.mark.parametrize(
    "preset, ranks, stage, sizes",
    [
        ("auto", 4, 1, Sizes(data=4)),
        ("single", 1, 0, Sizes()),
        *[(f"zero{stage}", 4, stage, Sizes(data=4)) for stage in range(4)],
        ("expert", 8, 1, Sizes(data=8, expert=8)),
        ("tensor", 4, 1, Sizes(data=2, tensor=2)),
        ("pipeline", 2, 1, Sizes(pipeline=2)),
        ("context", 4, 1, Sizes(data=2, context=2)),
        ("expert_pipeline", 4, 1, Sizes(pipeline=2, data=2, expert=2)),
        ("full4", 4, 1, Sizes(pipeline=2, context=2, expert=2)),
        ("flash", 64, 1, Sizes(pipeline=4, data=16, expert=8)),
        ("pro", 512, 1, Sizes(pipeline=8, data=64, expert=64)),
    ],
)
def test_presets(preset, ranks, stage, sizes):
    config = parallelism(preset)
    assert config.zero_stage == stage
    assert check_layout(config, ranks) == sizes


def test_a_process_knows_its_place():
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    topology = make_topology(parallelism(), environ=environ)
    assert (topology.rank, topology.world_size, topology.local_rank) == (3, 4, 1)
    assert (topology.index("data"), topology.sizes.data, topology.device) == (3, 4, torch.device("cpu"))
    assert make_topology(parallelism(), "cuda", environ).device == torch.device("cuda", 1)
    assert make_topology(parallelism("single"), environ={}).sizes == Sizes()


def test_groups_differ_along_their_axis_only():
    """Eight ranks: pipeline 2 x data 1 x context 2 x tensor 2, experts over the contexts."""
    topology = Topology(5, 1, Sizes(pipeline=2, context=2, tensor=2, expert=2), torch.device("cpu"))
    assert topology.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups("context") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups("data") == [[rank] for rank in range(8)]
    assert topology.groups("replica") == topology.groups("expert") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups("expert_replica") == [[rank] for rank in range(8)]
    assert [topology.index(axis) for axis in ("pipeline", "data", "context", "tensor", "expert")] == [1, 0, 0, 1, 0]


AXES = ("pipeline", "data", "context", "tensor", "replica", "expert", "expert_replica")


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 2, 4), (1, 2), (1, 3))))
def test_every_rank_is_in_one_group_of_each_kind(sizes):
    sizes = Sizes(*sizes)
    for expert in [count for count in (1, 2, 4, 8) if sizes.replicas % count == 0]:
        with_experts = Sizes(sizes.pipeline, sizes.data, sizes.context, sizes.tensor, expert)
        topology = Topology(0, 0, with_experts, torch.device("cpu"))
        for axis in AXES:
            groups = topology.groups(axis)
            assert sorted(itertools.chain(*groups)) == list(range(sizes.world)), axis
            assert all(group == sorted(group) for group in groups)
            for rank in range(sizes.world):
                place = Topology(rank, 0, with_experts, torch.device("cpu")).index(axis)
                assert next(group for group in groups if rank in group)[place] == rank
        size = {axis: len(topology.groups(axis)[0]) for axis in AXES}
        assert size["expert"] * size["expert_replica"] == size["replica"] == sizes.data * sizes.context
        # All experts are in one expert group: its ranks have different ones, replicas the same
        experts = {rank: [g.index(rank) for g in topology.groups("expert") if rank in g] for rank in range(sizes.world)}
        assert all(len({tuple(experts[rank]) for rank in group}) == 1 for group in topology.groups("expert_replica"))


@pytest.mark.parametrize(
    "ranks, overrides, message",
    [
        (1, {"tensor": 2}, r"parallelism.tensor=2: .*tensor 2 .*divide the 1 process started; .*parallelism.tensor=1"),
        (4, {"tensor": 3}, r"tensor=3: .*divide the 4 processes started; set parallelism.tensor=1, or start 3"),
        (2, {"pipeline": 4}, r"parallelism.pipeline=4: .*set parallelism.pipeline=2, or start 4 with torchrun"),
        (6, {"context": 4}, r"parallelism.context=4: .*set parallelism.context=2"),
        (
            4,
            {"tensor": 2, "pipeline": 4},
            r"parallelism.pipeline=4: pipeline 4 x context 1 x tensor 2 must divide the 4",
        ),
        (2, {"expert": 4}, r"parallelism.expert=4: .*data 2 x context 1 ranks.*; for example parallelism.expert=2"),
        (4, {"expert": 3}, r"parallelism.expert=3: .*for example parallelism.expert=1"),
        (2, {"pipeline": 2, "zero_stage": 2}, r"parallelism.zero_stage=2: .*pipeline.*; set parallelism.zero_stage=1"),
        (1, {"zero_stage": 4}, r"parallelism.zero_stage=4: ZeRO has stages 0 to 3"),
        (1, {"data": 3}, r"parallelism.data=3: .*data 3 .* must be the 1 process started; set parallelism.data=1"),
        (2, {"data": 1}, r"parallelism.data=1: .*must be the 2 processes started; set parallelism.data=2"),
        (1, {"data": 0}, r"parallelism.data=0: it must be at least 1"),
        (1, {"deepspeed": {"gradient_clipping": 1.0}}, r"deepspeed.gradient_clipping=1.0: .*train.grad_clip"),
        (1, {"deepspeed": {"zero_optimization": {"stage": 2}}}, r"zero_optimization.stage=2: .*zero_stage"),
    ],
)
def test_impossible_layouts_are_refused(ranks, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_layout(parallelism(**overrides), ranks)
    assert "\n" not in str(caught.value)


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "gpu[003-004,9],cpu1",
}


def test_ranks_under_slurm():
    assert read_ranks(SLURM) == (5, 8, 1)
    assert read_ranks(SLURM | {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == (2, 4, 0)  # torchrun inside srun
    batch_script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert read_ranks(batch_script) == (0, 1, 0)
    interactive = SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert read_ranks(interactive) == (0, 1, 0)
    assert read_ranks(SLURM | {"SLURM_STEP_NUM_TASKS": "6"}) == (5, 6, 1)  # srun --ntasks=6 in a job of 8
    ranks = [make_topology(parallelism(), environ=SLURM | {"SLURM_PROCID": str(rank)}) for rank in range(8)]
    places = {rendezvous(topology, SLURM) for topology in ranks}
    assert len(places) == 1
    address, port = places.pop()
    assert address == "gpu003" and 20000 <= port < 40000
    assert rendezvous(ranks[0], SLURM | {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}) == ("here", 1234)


def test_a_task_that_slurm_shows_one_gpu_uses_that(monkeypatch):
    for visible, device in ((1, 0), (4, 1)):  # --gpus-per-task=1, --gpus-per-node=4
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert make_topology(parallelism(), "cuda", SLURM).device == torch.device("cuda", device)


@pytest.mark.parametrize(
    "nodes, first", [("gpu[003-004,9],cpu1", "gpu003"), ("node7", "node7"), ("a-1,b-2", "a-1"), ("n[5,7-9]", "n5")]
)
def test_first_node(nodes, first):
    assert first_node(nodes) == first


def test_a_world_without_an_address_is_refused():
    topology = make_topology(parallelism(), environ={"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: needs MASTER_ADDR"):
        rendezvous(topology, {"RANK": "0", "WORLD_SIZE": "2"})
