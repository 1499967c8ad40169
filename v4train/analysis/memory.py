"""Training memory of a rank, in closed form: what v4train and DeepSpeed 0.19.8 hold at the peak of a step.

    weights       fp32, all that the rank trains; in ZeRO 3 its part, and what is gathered at a time
    gradients     fp32, those that have a place of their own
    optimizer     AdamW: two numbers a parameter, Muon: one; from ZeRO 1 on of the rank's part, and its fp32 masters.
                  ZeRO 1-2 keep Muon's momentum twice: as it stands, and as the step will leave it
    buffers       the bucket that gradients are reduced from (ZeRO 1-3), routing tables and biases, the embedding of
                  another stage, what pipeline stages hand on
    activations   what backward needs of all micro-batches in flight, bf16 copies of weights included
    working       what is at work at a time

A step passes through phases that never meet, and each is a sum of its own; the largest is the peak:

    backward      all activations and, with accumulation, all gradients at once; without it gradients come as
                  activations go, unit by unit, and the sum of both counts where it is largest
    reduction     of gradients among replicas, from flat copies
    muon          updates of one group of matrices after another
    step          of the flat parts that ZeRO keeps

Activations are those of sparse training, whatever `Work.mode`: an upper bound for `indexer_warmup`, which has no
backward pass but the indexers'.

Not counted: the process itself (Python, PyTorch, CUDA's context), NCCL's buffers, holes between blocks of memory.
"""

from dataclasses import dataclass, replace

from v4train.analysis.activations import recomputed_bytes, unit_bytes, working_bytes
from v4train.analysis.parameters import MuonGroup, Share, copied_embedding, stage_shares
from v4train.analysis.work import Work
from v4train.model.config import ModelConfig
from v4train.optim.config import BATCH
from v4train.parallel.sizes import REDUCED, reduce_bucket_size

LIVE = 1_000_000_000  # numbers that ZeRO 3 keeps gathered, at most: its max_live_parameters
BUCKET = 500_000_000  # numbers that are reduced at a time on a GPU: its reduce_bucket_size, MEMORY_OPT_ALLREDUCE_SIZE
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank in one phase of a step."""

    phase: str
    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    working: float

    @property
    def parts(self) -> dict[str, float]:
        names = ("weights", "gradients", "optimizer", "buffers", "activations", "working")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Needs:
    """Bytes of micro-batches: `held` by all in flight when most is, `working` at a time, `handed_on` between stages;
    `fixed` of tables and copies that no phase is without. made: the share of the gradients that there are by then."""

    held: float = 0
    made: float = 1
    working: float = 0
    handed_on: float = 0
    fixed: float = 0


def peak_memory(config: ModelConfig, work: Work) -> Memory:
    """That of the rank that needs most."""
    return max(stage_memory(config, work), key=lambda memory: memory.total)


def stage_memory(config: ModelConfig, work: Work, shares: list[Share] | None = None) -> list[Memory]:
    """Of a rank of each pipeline stage, at its peak. shares: `stage_shares`, where they are known already."""
    shares = shares or stage_shares(config, work)
    units = unit_bytes(config, work)
    at_a_time = recomputed_bytes(config, work) + working_bytes(config, work)
    copied = copied_embedding(config, work)
    stages = []
    for stage, share in enumerate(shares):
        in_flight = min(work.pipeline - stage, work.accumulation)
        kept, made = _held(units, share, work)
        if work.precision == "bf16" and work.recompute != "block":
            kept += 2 * share.cast
        fixed = (2 * 4 * copied if stage == work.pipeline - 1 else 0) + (_tables(config) if stage == 0 else 0)
        needs = Needs(in_flight * kept, made, at_a_time, _handed_on(config, work, stage, in_flight), fixed)
        stages.append(max(phases(share, work, needs), key=lambda memory: memory.total))
    return stages


def _held(units: list[float], share: Share, work: Work) -> tuple[float, float]:
    """Bytes that a micro-batch keeps, and the share of the gradients that are made, when both come to most.

    Where a step has several micro-batches, the last one begins its backward pass with all of either. One alone gives up
    what each unit has kept as its gradients are made, the last unit first.
    """
    if work.accumulation > 1:
        return sum(units[share.units]), 1.0
    weight = 4 * (_part(share.size, share.experts, work) / share.size if work.zero_stage > 1 else 1)
    kept, gradients, found = sum(units[share.units]), 0.0, []
    for unit in reversed(range(share.units.start, share.units.stop)):
        gradients += share.by_unit[unit]
        found.append((kept + weight * gradients, kept, gradients / share.size))
        kept -= units[unit]
    return max(found)[1:]


def least_memory(share: Share, work: Work) -> Memory:
    """What no choice of micro-batch or recomputation gets below."""
    return max(phases(share, work, Needs()), key=lambda memory: memory.total)


def phases(share: Share, work: Work, needs: Needs) -> list[Memory]:
    """What a rank with this share holds in each phase of a step."""
    work = replace(work, bucket=_bucket(share, work))
    muon = _Muon.of(share, work) if work.optimizer == "muon" else _Muon()
    own = 4 * _part(share.size, share.experts, work)
    of = {0: _whole, 1: _sharded_states, 2: _sharded_gradients, 3: _sharded_weights}[work.zero_stage]
    return of(4 * share.size, own, muon, work, needs)


def _bucket(share: Share, work: Work) -> int:
    """Numbers that are reduced at a time; ZeRO 0 has no key to say so."""
    if work.bucket and work.zero_stage > 0:
        return work.bucket
    if work.device != "cpu" or work.zero_stage == 3:
        return BUCKET
    return REDUCED + share.largest if work.zero_stage == 0 else reduce_bucket_size(share.size, share.largest)


@dataclass(frozen=True)
class _Muon:
    """Bytes of a rank's matrices: all, its parts, those that straddle two parts; at work, the copies of one group and
    Newton-Schulz on some of them."""

    matrices: float = 0
    own: float = 0
    straddling: float = 0
    copies: float = 0
    newton_schulz: float = 0
    group: float = 0  # its part of the largest group, as it holds it
    largest: float = 0  # one tensor

    @classmethod
    def of(cls, share: Share, work: Work) -> "_Muon":
        groups = share.groups.values()
        if not groups:
            return cls()
        shared_out = work.replicas > 1 and work.zero_stage > 0
        fractions = [_fraction(group.expert, work) if work.zero_stage else 1.0 for group in groups]
        return cls(
            4 * share.matrices,
            4 * _part(share.matrices, share.expert_matrices, work),
            4 * max(group.matrix for group in groups) if shared_out else 0,  # both of its ranks make it
            4 * max(group.whole * fraction for group, fraction in zip(groups, fractions, strict=True)),
            max(newton_schulz_bytes(group, fraction, work) for group, fraction in zip(groups, fractions, strict=True)),
            4 * max(group.size * fraction for group, fraction in zip(groups, fractions, strict=True)),
            4 * max(largest for group in groups for _, largest in group.shapes.values()),
        )


def newton_schulz_bytes(group: MuonGroup, fraction: float, work: Work) -> float:
    """At work on as many matrices of one shape as go through the iteration together; ZeRO 3 takes tensor by tensor.

    In float32 there are at most the matrices as they came, the iterate, what comes of it, its Gram matrix and the
    polynomial; with bfloat16 there is most before the first product: three of them in fp32, and their cast.
    """
    found = 0.0
    for (short, long), (whole, largest) in group.shapes.items():
        together = min(max(largest, min(BATCH[work.device], whole)), max(fraction * whole, short * long))
        together = largest if work.zero_stage == 3 else together
        element = 14 if work.newton_schulz_dtype == "bfloat16" else 4 * (3 + 2 * short / long)
        found = max(found, together * element)
    return found


def _fraction(of_experts: bool, work: Work) -> float:
    """The part of what a rank holds that ZeRO leaves to it."""
    return (work.expert if of_experts else 1) / work.replicas


def _part(size: float, experts: float, work: Work) -> float:
    return (size - experts) * _fraction(False, work) + experts * _fraction(True, work)


def _whole(size: float, own: float, muon: _Muon, work: Work, needs: Needs) -> list[Memory]:
    """ZeRO 0."""
    states = muon.matrices + 2 * (size - muon.matrices)
    held = (size, size, states, needs.fixed)
    flat = min(4 * work.bucket, size) if work.replicas > 1 else 0
    return [
        Memory("backward", size, needs.made * size, states, needs.fixed + needs.handed_on, needs.held, needs.working),
        Memory("reduction", *held, 0, flat),
        Memory("muon", *held, 0, muon.copies + muon.newton_schulz),
    ]


def _states(own: float, muon: _Muon) -> float:
    """ZeRO 1-2: masters, momentum as it stands and as staged, AdamW's moments."""
    return own + 2 * (muon.own + muon.straddling) + 2 * (own - muon.own)


def _sharded_states(size: float, own: float, muon: _Muon, work: Work, needs: Needs) -> list[Memory]:
    """ZeRO 1: gradients are whole until the step's last backward pass is over, then pass through the bucket."""
    states, filled = _states(own, muon), min(4 * work.bucket, size)
    buckets = 2 if work.pipeline > 1 else 1  # DeepSpeed's pipeline makes one beside the optimizer's
    bucket = filled if work.device == "cpu" else buckets * 4 * work.bucket
    untouched = 0 if work.device == "cpu" else bucket
    # In the bucket they have no other place. A second one meets the rank's part that was taken out of the first
    beside = max(filled, own if filled < size else 0)
    fixed, made = needs.fixed, needs.made * size
    return [
        Memory("backward", size, made, states, fixed + untouched + needs.handed_on, needs.held, needs.working),
        Memory("reduction", size, size - filled, states, fixed + bucket, 0, beside),
        *_muon_and_step(size, own, states, bucket + fixed, muon, fixed),
    ]


def _sharded_gradients(size: float, own: float, muon: _Muon, work: Work, needs: Needs) -> list[Memory]:
    """ZeRO 2: each gradient goes into the bucket, and the rank's part out of it, once for every micro-batch."""
    states, filled = _states(own, muon), min(4 * work.bucket, size)
    bucket = filled if work.device == "cpu" else 4 * work.bucket
    summed = own if work.accumulation > 1 else 0  # of the micro-batches before
    # Where the bucket holds all of them, it is reduced when backward is over
    flat, taken = (filled, own) if filled < size else (0, 0)
    made, buffers = needs.made * taken, needs.fixed + bucket
    backward = needs.working + flat
    return [
        Memory("backward", size, summed + made, states, buffers + needs.handed_on, needs.held, backward),
        Memory("reduction", size, summed + taken, states, buffers, 0, max(filled, own if not taken else 0)),
        *_muon_and_step(size, own + summed, states, buffers, muon, needs.fixed),
    ]


def _muon_and_step(
    size: float, gradients: float, states: float, buffers: float, muon: _Muon, fixed: float
) -> list[Memory]:
    """Updates wait, flat, until all groups have theirs; the step copies a group's once more."""
    at_work = muon.own + muon.copies + muon.newton_schulz
    return [
        Memory("muon", size, gradients, states, buffers, 0, at_work),
        Memory("step", size, gradients, states, fixed, 0, muon.own + muon.group),
    ]


def _sharded_weights(size: float, own: float, muon: _Muon, work: Work, needs: Needs) -> list[Memory]:
    """ZeRO 3: Muon gathers gradients and momenta of a bucket of tensors; AdamW's are copied to be scattered."""
    gathered = min(4 * LIVE, size)
    states = own + muon.own + 2 * (own - muon.own)
    filled = min(4 * work.bucket, size)
    buffers = (filled if work.device == "cpu" else 4 * work.bucket) + needs.fixed
    scattered = filled if work.optimizer == "adamw" else 0
    whole = 2 * max(min(4 * work.bucket, muon.matrices), muon.largest)
    return [
        Memory("backward", own + gathered, own, states, buffers, needs.held, needs.working + scattered),
        Memory("muon", own + gathered, own, states, buffers, 0, whole + muon.largest + muon.newton_schulz),
        Memory("step", own + gathered, own, states, buffers, 0, own),
    ]


def _handed_on(config: ModelConfig, work: Work, stage: int, in_flight: int) -> float:
    """Streams between pipeline stages, as received and as sent, of each micro-batch in flight; the gradient's buffer.

    DeepSpeed's forward pass begins with a copy of what it received, which counts as an activation.
    """
    if work.pipeline == 1:
        return 0.0
    received, sent = stage > 0, stage < work.pipeline - 1
    return (received + sent) * (in_flight + 1) * 4 * config.num_streams * config.hidden_size * work.tokens


def _tables(config: ModelConfig) -> int:
    """Hash tables (int64) and selection biases of the routers."""
    moe, layers = config.moe, config.ffn_kinds.count("moe")
    return 8 * config.vocab_size * moe.top_k * moe.num_hash_layers + 4 * moe.num_experts * layers
