"""Muon in every ZeRO stage: each update is the one that a single process makes of the whole gradient, whatever the
number of micro-batches; its work and its momentum are shared out. One launch a world runs all jobs."""

import json
import math
from functools import cache

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.muon_worker import CLIP, DEFICIENT, NOTES, SHAPES, STEPS, TENSOR_CUTS, gradients
from tests.optim.test_muon import COEFFICIENTS, naive_newton_schulz
from v4train.optim.muon import Matrices, muon_update

pytestmark = pytest.mark.distributed

STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 4)
WORLDS = [2, pytest.param(1, marks=pytest.mark.exhaustive), pytest.param(3, marks=pytest.mark.exhaustive)]
MUON = [name for name in SHAPES if name not in ("embed", "norm")]
LARGEST, LARGEST_WORK = 48 * 64, 48 * 48 * 64  # of a matrix: elements, and the work that the worker counts


def jobs() -> dict[tuple[int, int, bool], dict]:
    """By stage, accumulation and whether heads are apart and groups joined."""
    return {
        (stage, accumulation, other): {
            "stage": stage,
            "accumulation": accumulation,
            "per_head": other,
            "per_group": not other,
        }
        for stage in STAGES
        for accumulation in ACCUMULATIONS
        for other in ((False, True) if accumulation == 1 else (False,))
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    @cache
    def results(world: int) -> list[dict]:
        """Of each rank: `jobs` by key, `tensor`."""
        folder = tmp_path_factory.mktemp(f"muon_{world}")
        spec = json.dumps({"folder": str(folder), "jobs": list(jobs().values())})
        launch("tests.distributed.muon_worker", world, [spec], folder, timeout=120)
        ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(world)]
        return [rank | {"jobs": dict(zip(jobs(), rank["jobs"], strict=True))} for rank in ranks]

    return results


def matrices_in(name: str, other: bool) -> Matrices:
    kind, value = NOTES.get(name, (None, None))
    if kind == "independent_rows":
        return Matrices(value)
    if kind == "head_rows" and other:
        return Matrices(value)
    return Matrices(joined=kind == "grouped" and other)


@cache
def single(name: str, other: bool) -> list[torch.Tensor]:
    """Updates of one process from the mean gradient of each step."""
    momentum = torch.zeros(SHAPES[name])
    settings = {"beta": 0.95, "update_rms": 0.18, "steps": (8, 2), "matrices": matrices_in(name, other)}
    return [muon_update(gradients(name, step).mean(0), momentum, **settings) for step in range(STEPS)]


def updates(result: dict, name: str) -> list[torch.Tensor]:
    """Learning rate 1, no decay, weights from zero."""
    before, made = torch.zeros(SHAPES[name]), []
    for weights in result["weights"]:
        made.append(before - weights[f"{name}.weight"])
        before = weights[f"{name}.weight"]
    return made


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def on_its_own_space(update: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Of a matrix: the part in the gradient's own column and row space (its rank from its singular values)."""
    u, values, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    own = values > 1e-5 * values.max()
    u, vh = u[:, own], vh[own]
    return u @ (u.mT @ update.double() @ vh.mT) @ vh


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage, accumulation, other", jobs())
def test_an_update_is_that_of_one_process(run, world, stage, accumulation, other):
    for rank in run(world):
        result = rank["jobs"][stage, accumulation, other]
        for name in MUON:
            for found, expected in zip(updates(result, name), single(name, other), strict=True):
                assert found.isfinite().all()
                if name not in DEFICIENT:
                    assert relative(found, expected) < 1e-5, name
        assert all(update[4].count_nonzero() == 0 for update in updates(result, "few_tokens"))  # no gradient, no update


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage, accumulation, other", jobs())
def test_of_rank_deficient_gradients_it_is_so_on_their_own_space(run, world, stage, accumulation, other):
    result = run(world)[-1]["jobs"][stage, accumulation, other]
    for name in DEFICIENT:
        for step, (found, expected) in enumerate(zip(updates(result, name), single(name, other), strict=True)):
            gradient = gradients(name, step).mean(0)
            triples = zip(*(x.view(-1, *x.shape[-2:]) for x in (found, expected, gradient)), strict=True)
            for one, wanted, of in triples:
                if of.count_nonzero():
                    assert relative(on_its_own_space(one, of), on_its_own_space(wanted, of)) < 1e-5, name


@pytest.mark.parametrize("name", MUON)
def test_the_single_process_is_the_naive_iteration(name):
    """In float64, matrix by matrix; otherwise all would be held against themselves."""
    momentum, gradient = 0, gradients(name, 0).mean(0).double()
    for step, expected in enumerate(single(name, False)):
        gradient = gradients(name, step).mean(0).double()
        momentum = 0.95 * momentum + gradient
        nesterov = 0.95 * momentum + gradient
        sizes = NOTES[name][1] if name == "fused" else [nesterov.shape[-2]]
        for part, own in zip(nesterov.split(sizes, -2), expected.split(sizes, -2), strict=True):
            matrices = zip(part.reshape(-1, *part.shape[-2:]), own.reshape(-1, *own.shape[-2:]), strict=True)
            for matrix, found in matrices:
                if not matrix.count_nonzero():
                    continue
                naive = naive_newton_schulz(matrix, COEFFICIENTS) * 0.18 * math.sqrt(max(matrix.shape))
                assert relative(on_its_own_space(found, matrix), on_its_own_space(naive, matrix)) < 1e-4


def test_clipping_before_muon_would_be_noticed():
    """The engine clips at 1e-3 what AdamW has: gradients of both steps clipped to one norm give other updates."""
    momentum, made = torch.zeros(SHAPES["square"]), []
    for step in range(STEPS):
        gradient = gradients("square", step).mean(0)
        clipped = gradient * CLIP / gradient.norm()
        made.append(muon_update(clipped, momentum, beta=0.95, update_rms=0.18, steps=(8, 2)))
    assert relative(made[1], single("square", False)[1]) > 0.05


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES[1:])
def test_work_and_momentum_are_shared_out(run, world, stage):
    """A rank has its share. In ZeRO 1-2 also the other parts of the matrices at its edges, be they one expert's; in
    ZeRO 3 tensors take turns, and what is no multiple of the ranks is padded."""
    total = sum(math.prod(SHAPES[name]) for name in MUON)
    ranks = [rank["jobs"][stage, 1, False] for rank in run(world)]
    work = run(world)[0]["jobs"][0, 1, False]["work"]
    edges = LARGEST if stage < 3 else len(MUON)
    assert all(rank["momentum"] <= total / world + edges for rank in ranks)
    assert work <= sum(rank["work"] for rank in ranks) <= work + (world - 1) * STEPS * LARGEST_WORK * (stage < 3)
    if world > 1:
        assert max(rank["work"] for rank in ranks) < 0.7 * work


def test_parts_of_a_tensor_become_parts_of_the_whole_update(run):
    """Tensor parallelism, with heads and groups apart and whole."""
    for name, dim in TENSOR_CUTS:
        for option in (False, True):
            kind, value = NOTES.get(name, (None, None))
            of = Matrices(value if kind == "head_rows" and option else None, kind == "grouped" and not option)
            gradient = gradients(name, 0).mean(0)
            settings = {"beta": 0.95, "update_rms": 0.18, "steps": (8, 2)}
            whole = muon_update(gradient, torch.zeros_like(gradient), matrices=of, **settings)
            found = torch.cat([rank["tensor"][f"{name} {dim} {option}"] for rank in run(2)], dim)
            assert relative(found, whole) < 1e-5, (name, option)
    assert relative(single("query_up", True)[0], single("query_up", False)[0]) > 0.1
    assert relative(single("output_down", True)[0], single("output_down", False)[0]) > 0.1
