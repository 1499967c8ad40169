"""Toy model, batches and oracle of test_engine.py, and the program that runs the engine on them on every rank.

torchrun -m tests.distributed.engine_worker '{"folder": "...", "jobs": [{"stage": 1, ...}]}'
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.distributed.launch import finished
from tests.distributed.states import whole_state
from v4train.optim.config import OptimizerConfig
from v4train.optim.muon import Matrices, muon_update
from v4train.optim.param_groups import is_muon_parameter

VOCABULARY, WIDTH, ROWS, LENGTH = 29, 16, 8, 12
STEPS, LEARNING_RATE, GLOBAL_ROWS = 8, 3e-3, 24
# For each step, what is frozen (the indexer, or the rest) and how the model runs; frozen with and without gradients.
PHASES = [
    ("indexer", "dense"),
    ("indexer", "dense"),
    ("rest", "warmup"),
    ("rest", "warmup"),
    (None, "all"),
    ("indexer", "all"),
    ("rest", "all"),
    (None, "all"),
]


def is_frozen(name: str, frozen: str | None) -> bool:
    return frozen == ("indexer" if "indexer" in name else "rest")


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None


class Owner(nn.Module):
    """Reads its parameter in its own forward, as ZeRO 3 wants."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(*shape))


class Experts(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsm,enm,eno->bso", x, self.weight, torch.tanh(self.weight)) / self.weight.shape[0]


class Fused(Owner):
    """Three matrices stacked along the rows, as in mHC."""

    def __init__(self) -> None:
        super().__init__(24, WIDTH)
        self.weight.independent_rows = (4, 4, 16)

    def forward(self, x: Tensor) -> Tensor:
        pre, post, mix = F.linear(x, self.weight).split([4, 4, 16], dim=-1)
        return torch.sigmoid(pre).mean(-1, keepdim=True) * mix + torch.tanh(post).mean(-1, keepdim=True) * x


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position_bias = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.position_bias


class Toy(nn.Module):
    """Every kind of parameter that the split knows. `sometimes` takes part only where `used` says so, the indexer not
    in `dense`; in `warmup` it alone has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.bias = Bias()
        self.experts = Experts(3, 10, WIDTH)
        self.fused = Fused()
        self.indexer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, 7)
        self.lm_head = nn.Linear(7, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, used: bool = True, mode: str = "all") -> Output:
        if mode == "warmup":
            with torch.no_grad():
                output = self(tokens, targets, used)
                seen = self.embed(tokens)
            own = self.indexer(seen).square().mean()
            return Output(output.logits, output.loss + own - own.detach())
        x = self.bias(self.embed(tokens))
        x = x + self.experts(x)
        x = x + torch.tanh(self.indexer(self.fused(x)) if mode == "all" else self.fused(x))
        if used:
            x = x + self.sometimes(x)
        logits = self.lm_head(torch.tanh(self.hidden(self.norm(x))))
        return Output(logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def make_model() -> Toy:
    torch.manual_seed(5)
    return Toy()


def batch(step: int) -> tuple[Tensor, Tensor, bool]:
    """Global batch of one step, and whether `sometimes` is used in it."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCABULARY, (GLOBAL_ROWS, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], step % 3 != 1


def optimizer_config(name: str) -> OptimizerConfig:
    return OptimizerConfig(name, LEARNING_RATE, (0.9, 0.95), 1e-20, 0.1, 0.95, 0.18, (8, 2), "float32", False, True)


def train_plainly(
    name: str,
    grad_clip: float = 0.0,
    used_from: int = 0,
    skip: int | None = None,
    precision: str = "fp32",
    stop: int = STEPS,
    phases: bool = False,
) -> dict:
    """The oracle: one process, plain PyTorch, the whole global batch at once.

    used_from: within a step that uses `sometimes`, the half of the batch from which on it does (0: both, 1: only the
    second). skip: a step that changes nothing. phases: run and freeze as PHASES says.
    """
    model, config = make_model(), optimizer_config(name)
    named = dict(model.named_parameters())
    muon = {n: torch.zeros_like(p) for n, p in named.items() if name == "muon" and is_muon_parameter(n, p)}
    rest = [p for n, p in named.items() if n not in muon]
    adamw = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=config.betas, eps=config.eps, weight_decay=0.1)
    losses, norms = [], []
    for step in range(stop):
        tokens, targets, used = batch(step)
        frozen, mode = PHASES[step] if phases else (None, "all")
        halves = zip(tokens.chunk(2), targets.chunk(2), (used and used_from == 0, used), [mode] * 2, strict=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = sum(model(*half).loss for half in halves) / 2
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        trained = {n: p for n, p in named.items() if not is_frozen(n, frozen)}
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in set(named.values()) - set(trained.values()):
            parameter.grad = None
        norms.append(torch.stack([p.grad.double().square().sum() for p in trained.values()]).sum().sqrt().item())
        if step == skip:
            continue
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(rest, grad_clip)
        adamw.step()
        with torch.no_grad():
            for n, momentum in muon.items():
                if n not in trained:
                    continue
                rows = getattr(named[n], "independent_rows", None)
                update = muon_update(
                    named[n].grad, momentum, beta=0.95, update_rms=0.18, steps=(8, 2), matrices=Matrices(rows)
                )
                named[n].mul_(1 - LEARNING_RATE * 0.1).sub_(LEARNING_RATE * update)
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in named.items()}}


# Each returns a handle whose `remove` ends it. Squares of the second overflow, its entries and Muon's update do not.
INJECTIONS = {
    "infinite_loss": lambda model: model.norm.register_forward_hook(lambda module, args, output: output * torch.inf),
    "infinite_norm": lambda model: model.hidden.weight.register_hook(lambda gradient: gradient * 1e30),
}


def run_job(job: dict, topology: object) -> dict:
    """Train as the job says: stage, accumulation (or that of each step), optimizer; optional: precision, grad_clip,
    used_from, persistence, start and stop (steps), load and save (files, the latter at step `save_at`), inject (a step
    with bad gradients), injection (a key of INJECTIONS), rates (learning rates by group), misuse (make the calls that
    must fail), phases (run and freeze as PHASES says, and keep the state after each step), reduced (numbers at a time).
    """
    from v4train.optim import muon
    from v4train.parallel import deepspeed_fixes, sizes
    from v4train.parallel.engine import Engine
    from v4train.parallel.sizes import ParallelismConfig

    sizes.REDUCED = deepspeed_fixes.REDUCED = job.get("reduced", 1 << 20)

    extra = {"zero_optimization": {"stage3_param_persistence_threshold": job.get("persistence", 0)}}
    calls = []
    original = muon.newton_schulz
    muon.newton_schulz = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    model = make_model()
    given = job["accumulation"]
    each = given if isinstance(given, list) else [given] * STEPS
    accumulation = each[0]
    engine = Engine(
        model,
        optimizer_config(job["optimizer"]),
        ParallelismConfig(None, 1, 1, 1, 1, job["stage"], extra),
        topology,
        micro_batch_size=GLOBAL_ROWS // topology.sizes.data // accumulation,
        accumulation_steps=accumulation,
        grad_clip=job.get("grad_clip", 0.0),
        precision=job.get("precision", "fp32"),
    )
    if "load" in job:
        state = torch.load(job["load"], weights_only=True)
        engine.load_named_state(lambda name, box: state[name])
    whole_state(engine)  # before the optimizers have any
    result = {"losses": [], "norms": [], "finite": [], "counts": engine.parameter_counts}
    for step in range(job.get("start", 0), job.get("stop", STEPS)):
        if step == job.get("save_at"):
            result |= {"saved": job["save"], "saved_validation": validate(engine)}
            state = whole_state(engine)  # every rank takes part
            if topology.rank == 0:
                torch.save(state, job["save"])
        inject = step == job.get("inject")
        if inject:
            result["before"] = whole_state(engine)
            hook = INJECTIONS[job["injection"]](model)
        loss, mode = 0.0, "all"
        if each[step] != accumulation:
            accumulation = each[step]
            engine.set_batch(GLOBAL_ROWS // topology.sizes.data // accumulation, accumulation)
        if job.get("phases"):
            frozen, mode = PHASES[step]
            engine.freeze(group.name for group in engine.groups if is_frozen(group.name, frozen))
        tokens, targets, used = batch(step)
        for index in range(accumulation):
            # micro-batch `index` of all ranks together is the index-th part of the global batch
            part = [
                t.chunk(accumulation)[index].chunk(topology.sizes.data)[topology.index("data")]
                for t in (tokens, targets)
            ]
            output = engine.forward_backward(*part, used and index >= job.get("used_from", 0), mode)
            loss += output.loss.item() / accumulation
        outcome = engine.step(LEARNING_RATE, job.get("rates"))
        if inject:
            hook.remove()
            result["after"] = whole_state(engine)
        mean = torch.tensor([loss], dtype=torch.float64)
        torch.distributed.all_reduce(mean)
        result["losses"].append(mean.item() / topology.world_size)
        result["norms"].append(outcome.grad_norm)
        result["finite"].append(outcome.finite)
        if job.get("phases"):
            result.setdefault("states", []).append(whole_state(engine))
    result["validation"] = validate(engine)
    result["state"] = whole_state(engine)
    result["muon_calls"] = len(calls)
    if job.get("misuse"):
        result["errors"] = misuse(engine, part)
    muon.newton_schulz = original
    return result


def misuse(engine: object, micro_batch: list[Tensor]) -> list[str]:
    """The messages of calls in the wrong order, for a group and with a state that do not exist."""
    errors = []
    calls = (
        lambda: engine.step(LEARNING_RATE),
        lambda: [engine.forward_backward(*micro_batch) for _ in range(9)],
        lambda: engine.freeze(["adamw"]),
        lambda: engine.step(LEARNING_RATE, {"nonsense": 1.0}),
        lambda: engine.load_named_state(lambda name, box: {"weight": torch.zeros(VOCABULARY, WIDTH)}),
    )
    for call in calls:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    return errors


def validate(engine: object) -> float:
    engine.model.eval()
    tokens, targets, _ = batch(STEPS)
    loss = engine.forward(tokens, targets).loss.item()
    engine.model.train()
    return loss


def main() -> None:
    spec = json.loads(sys.argv[1])
    folder = Path(spec["folder"])
    torch.set_num_threads(1)

    from v4train.parallel.topology import ParallelismConfig, leave, make_topology, start_distributed, stop_distributed

    topology = make_topology(ParallelismConfig(None, 1, 1, 1, 1, 1, {}))
    start_distributed(topology)
    results = [run_job(job, topology) for job in spec["jobs"]]
    torch.save(results, folder / f"rank_{topology.rank}.pt")
    finished(folder)
    stop_distributed()
    leave()


if __name__ == "__main__":
    main()
