"""Time by module: attribution of forward, backward and recomputation, and that looking changes nothing."""

import json

import pytest
import torch
from torch import nn

from tests.models import random_model, random_tokens, tiny_config
from v4train.train.profiler import StepProfiler

TOKENS = random_tokens(2, 24)


class Burn(torch.autograd.Function):
    """Identity that multiplies matrices in one of the two passes."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_products = backward
        burn(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        burn(ctx.backward_products)
        return gradient, None, None


def burn(products):
    matrix = torch.ones(256, 256)
    for _ in range(products):
        matrix @ matrix


class Burner(nn.Module):
    def __init__(self, forward, backward):
        super().__init__()
        self.work = (forward, backward)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return Burn.apply(self.inner(x), *self.work)


def steps(model, count=3):
    """Losses and gradients of so many steps without update."""
    found = []
    for _ in range(count):
        model.zero_grad()
        loss = model(TOKENS, targets=TOKENS).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        yield found[-1]


def profiled(folder, model, which, step, count=3):
    """Rows by module of a profile of `which` steps; `step` is called for each of `count`."""
    with StepProfiler(which, folder, model, {}) as profiler:
        for number in range(1, count + 1):
            with profiler.step(number):
                step()
    return {row["module"]: row for row in json.loads((folder / "modules.json").read_text())["rows"]}


def test_each_pass_counts_for_the_module_that_caused_it(tmp_path):
    # Work that what runs besides, milliseconds on a machine that others use, is nothing beside
    model = nn.Sequential(Burner(600, 0), Burner(0, 1200), nn.Linear(8, 8))
    rows = profiled(tmp_path, model, [1, 3], lambda: model(torch.ones(4, 8, requires_grad=True)).sum().backward())
    for name, phase, other in (("0", "forward", "backward"), ("1", "backward", "forward")):
        assert rows[name][f"{phase}_self"] > 0.9 * rows["model"][f"{phase}_total"], phase
        assert rows[name][f"{other}_self"] < 0.1 * rows[name][f"{phase}_self"], other
        assert 0 < rows[f"{name}.inner"]["backward_self"] < rows["model"]["backward_total"]
        assert rows[name]["calls"] == rows[f"{name}.inner"]["calls"] == 1


@pytest.fixture(scope="module")
def of_a_model(tmp_path_factory):
    """Rows of two steps of a model, without and with recomputation."""
    found = {}
    for level in ("none", "block"):
        model = random_model(tiny_config("swa csa"))
        model.recompute = level
        running = steps(model)
        found[level] = profiled(tmp_path_factory.mktemp(level), model, [2, 4], lambda running=running: next(running))
    return found


def test_parts_add_up_to_the_step(of_a_model):
    for rows in of_a_model.values():
        phases = ("forward", "recompute", "backward")
        assert sum(row["self"] for row in rows.values()) == pytest.approx(rows["step"]["total"], rel=1e-3)
        assert rows["step"]["share"] == 1 and 0.3 < rows["model"]["share"] < 1
        inside = [rows[name]["total"] for name in ("embedding", "blocks", "head", "mtp")]
        assert sum(inside) + rows["model"]["self"] == pytest.approx(rows["model"]["total"], rel=1e-3)
        for name, row in rows.items():
            if name not in ("step", "gradients"):
                assert row["total"] == pytest.approx(sum(row[f"{phase}_total"] for phase in phases), rel=1e-2, abs=1e-2)


def test_every_module_has_a_row_under_its_caller(of_a_model):
    rows = of_a_model["none"]
    for name in ("embedding.lookup", "blocks.0.attention", "blocks.1.attention.indexer", "blocks.0.ffn.experts"):
        assert rows[name]["calls"] == 1 and rows[name]["forward_self"] > 0
    for name in ("mtp.head.lm_head", "mtp.embedding.lookup", "mtp.block.ffn.router", "head.lm_head"):
        assert rows[name]["calls"] == 1 and rows[name]["backward_total"] > 0
    assert max(name.count(".") for name in rows if not name.startswith("mtp")) == 3
    order = list(rows)
    assert order[0] == "step" and order.index("model") < order.index("blocks.0") < order.index("blocks.1")


def test_recomputation_has_a_column_of_its_own(of_a_model):
    plain, recomputed = of_a_model["none"], of_a_model["block"]
    assert all(row["recompute_total"] == 0 for row in plain.values())
    assert recomputed["blocks.1.attention"]["recompute_total"] > 0 and recomputed["mtp.block"]["recompute_total"] > 0
    assert recomputed["blocks.1.attention"]["backward_total"] > 0
    assert recomputed["head"]["recompute_total"] == 0
    assert {name: row["calls"] for name, row in recomputed.items()} == {n: row["calls"] for n, row in plain.items()}


def test_looking_changes_no_bit_and_leaves_no_hook(tmp_path):
    plain, looked_at = random_model(tiny_config("swa csa")), random_model(tiny_config("swa csa"))
    with StepProfiler([2, 3], tmp_path / "made", looked_at, {}) as profiler:
        for number, (theirs, ours) in enumerate(zip(steps(plain), steps_inside(profiler, looked_at), strict=True), 1):
            assert ours[0] == theirs[0], number
            assert all(map(torch.equal, ours[1], theirs[1])), number
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in looked_at.modules())
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "modules.txt",
        "modules.json",
        "operators.txt",
        "trace_steps_2_3.json",
    }
    assert "aten::" in (tmp_path / "made" / "operators.txt").read_text()
    trace = json.loads((tmp_path / "made" / "trace_steps_2_3.json").read_text())
    assert "blocks.1.attention" in {event.get("name") for event in trace["traceEvents"]}


def steps_inside(profiler, model):
    running = steps(model)
    for number in range(1, 4):
        with profiler.step(number):
            made = next(running)
        yield made


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path):
    model = nn.Linear(2, 2)
    rows = profiled(tmp_path, model, [2, 9], lambda: model(torch.ones(1, 2)).sum().backward(), count=4)
    assert rows["model"]["calls"] == 1
    assert json.loads((tmp_path / "modules.json").read_text())["profiled_steps"] == 3


def test_no_steps_no_profile(tmp_path):
    with StepProfiler(None, tmp_path / "none", nn.Linear(2, 2), {}) as profiler, profiler.step(1):
        pass
    assert not (tmp_path / "none").exists()
