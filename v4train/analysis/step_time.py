"""How long a training step takes on a device that is described by a few numbers.

    step = (micro-batches + stages - 1) x the dearest stage's micro-batch + the optimizer + traffic that isn't hidden

A micro-batch takes its FLOPs (recomputation included) over peak x efficiency, and the passes over what it keeps for
backward and over weights and gradients: what is no product is bound by memory. So is the optimizer, but for Muon's
products. Tensor parallelism shares out heads, inner channels and vocabulary;
each rank does the rest for all of the tokens. Traffic is `communication.py`'s, over the link that joins the ranks of
its axis; besides, ranks wait for each other in each exchange. Ranks that share the cores of a machine leave them to
each other while they wait: there the mean stage counts, and there is no bubble. FLOPs are those of `Work.mode`; passes
over memory and traffic are sparse training's in every mode. For choosing between layouts: the sum is no better than the
few numbers in conf/plan.yaml.
"""

import math
from dataclasses import dataclass, fields, replace
from statistics import mean

from v4train.analysis.activations import unit_bytes
from v4train.analysis.communication import activation_bytes, gradient_bytes, muon_bytes
from v4train.analysis.decode import used_matrices
from v4train.analysis.flops import MODE_PASSES, part_flops, recomputed_flops, training_flops_per_token
from v4train.analysis.parameters import Share, stage_shares
from v4train.analysis.work import Work
from v4train.errors import ConfigError
from v4train.model.config import ModelConfig

WEIGHT_PASSES = 5  # over the weights of a stage: read in forward, twice in backward; gradients read and written
STATE_PASSES = 8  # over the part that a rank updates: weight, moments, gradient read, and all but the last written
PASSES = 8  # over memory for what is kept: written, read twice in forward, read in backward; as much for its gradient
EXCHANGES = {"tensor": 7, "expert": 7, "context": 6}  # of a block, in forward and backward, about


@dataclass
class Device:
    """Values and their meaning: conf/plan.yaml."""

    flops_bf16: float
    flops_fp32: float
    node: int
    node_bandwidth: float
    bandwidth: float
    memory: float
    memory_bandwidth: float
    latency: float
    shared: bool

    def check(self, prefix: str) -> None:
        """Raise ConfigError for a number that nothing can be divided by. prefix: of the keys."""
        for field in fields(self):
            value = getattr(self, field.name)
            fine = field.name == "shared" or (field.name == "latency" and value == 0)
            if not fine and not 0 < value < math.inf:
                remedy = "conf/plan.yaml describes some devices"
                raise ConfigError(f"{prefix}.{field.name}", value, "it must be above 0", remedy)


@dataclass
class Use:
    """How well a run uses the device: conf/plan.yaml."""

    efficiency: float
    overlap: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, `bubble` being those that the dearest stage waits, and its traffic in bytes a rank by axis."""

    compute: float
    bubble: float
    optimizer: float
    communication: float
    traffic: dict[str, float]
    mfu: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.optimizer + self.communication


def bubble_fraction(work: Work) -> float:
    """Share of a step's computing time that each stage waits: (P - 1) / (micro-batches + P - 1), by 1F1B."""
    return (work.pipeline - 1) / (work.accumulation + work.pipeline - 1)


def step_time(config: ModelConfig, work: Work, device: Device, use: Use, shares: list[Share] | None = None) -> StepTime:
    """Of all ranks together, which end a step together."""
    shares = shares or stage_shares(config, work)
    peak = device.flops_bf16 if work.precision == "bf16" else device.flops_fp32
    rate, bandwidth = peak * use.efficiency, device.memory_bandwidth
    kept = unit_bytes(config, replace(work, recompute="none"))
    own = _share_of_flops(config, work) * work.tokens / rate
    of_stages = mean if device.shared else max
    micro_batch = of_stages(
        [
            own * flops + (PASSES * sum(kept[share.units]) + WEIGHT_PASSES * 4 * share.size) / bandwidth
            for flops, share in zip(_stage_flops(config, work, shares), shares, strict=True)
        ]
    )
    compute = work.accumulation * micro_batch
    optimizer = of_stages([STATE_PASSES * 4 * _updated(share, work) for share in shares]) / bandwidth
    if work.optimizer == "muon":
        products = device.flops_bf16 if work.newton_schulz_dtype == "bfloat16" else device.flops_fp32
        flops = work.newton_schulz_steps * of_stages([_orthogonalised(share, work) for share in shares])
        optimizer += flops / (products * use.efficiency)
    traffic = traffic_per_rank(config, work, shares)
    seconds = sum(sent / _bandwidth(axis, work, device) for axis, sent in traffic.items())
    bubble = 0.0 if device.shared else (work.pipeline - 1) * micro_batch
    communication = (1 - use.overlap) * seconds + device.latency * exchanges(config, work)
    flops = training_flops_per_token(config, work.sequence_length, work.mode) * work.step_tokens / work.world
    mfu = flops / peak / (compute + bubble + optimizer + communication)
    return StepTime(compute, bubble, optimizer, communication, traffic, mfu)


def exchanges(config: ModelConfig, work: Work) -> float:
    """How often ranks wait for each other in a step, about: those of a stage's blocks, and between stages."""
    blocks = (config.num_layers + config.mtp.num_layers) / work.pipeline
    each = sum(count for axis, count in EXCHANGES.items() if getattr(work, axis) > 1)
    between = 4 if work.pipeline > 1 else 0
    return work.accumulation * (blocks * each + between) + (1 if work.replicas > 1 else 0)


def traffic_per_rank(config: ModelConfig, work: Work, shares: list[Share] | None = None) -> dict[str, float]:
    """Bytes that a rank sends in a step, on average, by axis; under bf16 activations take half of their fp32 bytes."""
    shares = shares or stage_shares(config, work)
    sent = dict(activation_bytes(config, work))
    for axis in ("tensor", "context", "expert"):
        sent[axis] /= 2 if work.precision == "bf16" else 1
    copies, stage = work.replicas, work.zero_stage
    of_experts = copies // work.expert
    gradients = 0.0
    for share in shares:  # of each rank that has a share of its own: tensor x (expert)
        muon = work.optimizer == "muon"
        matrices = (share.matrices - share.expert_matrices, share.expert_matrices) if muon else (None, None)
        dense = gradient_bytes(share.size - share.experts, copies, stage, work.accumulation, matrices[0])
        experts = gradient_bytes(share.experts, of_experts, stage, work.accumulation, matrices[1])
        gradients += work.tensor * (dense + work.expert * experts)
        if muon:
            whole, whole_experts = share.cut_matrices - share.cut_expert_matrices, share.cut_expert_matrices
            sent["tensor"] += muon_bytes(whole * work.tensor, work.tensor, copies, stage)
            sent["tensor"] += work.expert * muon_bytes(whole_experts * work.tensor, work.tensor, of_experts, stage)
    sent["gradients"] = gradients
    return {axis: total / work.world for axis, total in sent.items()}


def _stage_flops(config: ModelConfig, work: Work, shares: list[Share]) -> list[float]:
    """FLOPs of a token on each stage, with those that backward makes again."""
    parts = part_flops(config, work.sequence_length, work.mode)
    again = recomputed_flops(config, work.sequence_length, work.mode, work.recompute)
    costs = [part + more for part, more in zip(parts, again, strict=True)]
    together = config.num_layers + 1
    units = [*costs[:together], sum(costs[together:])]
    return [sum(units[share.units]) for share in shares]


def _share_of_flops(config: ModelConfig, work: Work) -> float:
    """Share of a token's FLOPs that each rank of a tensor group does: heads, inner channels, vocabulary are cut."""
    if work.tensor == 1:
        return 1.0
    of_trunk, of_indexers = MODE_PASSES[work.mode]
    whole = sum(
        2 * (of_indexers if parameter.part == "indexers" else of_trunk) * size
        for parameter, _, size in used_matrices(config)
        if parameter.cut is None
    )
    left = min(1.0, whole / training_flops_per_token(config, work.sequence_length, work.mode))
    return left + (1 - left) / work.tensor


def _updated(share: Share, work: Work) -> float:
    """Numbers that a rank updates: all in ZeRO 0, its part in the others."""
    if work.zero_stage == 0:
        return share.size
    return (share.size - share.experts + work.expert * share.experts) / work.replicas


def _orthogonalised(share: Share, work: Work) -> float:
    """FLOPs of one Newton-Schulz iteration on what a rank has to do: all in ZeRO 0, its part in the others."""
    if work.zero_stage == 0:
        return share.newton_schulz
    of_experts = share.expert_matrices / max(1, share.matrices)
    return share.newton_schulz * ((1 - of_experts) / work.replicas + of_experts * work.expert / work.replicas)


def _bandwidth(axis: str, work: Work, device: Device) -> float:
    """Of the link that the ranks of an axis share: the last dimensions of the box of ranks are neighbours."""
    span = {
        "tensor": work.tensor,
        "context": work.tensor * work.context,
        "expert": work.tensor * work.expert,
        "gradients": work.tensor * work.replicas,
        "pipeline": work.world,
    }[axis]
    return device.node_bandwidth if span <= device.node else device.bandwidth
