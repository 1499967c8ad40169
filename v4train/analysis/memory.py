"""Training memory of a rank, in closed form: what v4train and DeepSpeed 0.19.8 hold at the peak of a step.

    weights       fp32, all that the rank trains; in ZeRO 3 its part, and what is gathered at a time
    gradients     fp32, whole in ZeRO 0-1, the rank's part in 2-3
    optimizer     AdamW: two numbers a parameter, Muon: one; from ZeRO 1 on of the rank's part, and its fp32 masters.
                  ZeRO 1-2 keep Muon's momentum by whole tensors
    buffers       the bucket that gradients are reduced from (ZeRO 1-3), routing tables and biases, the embedding of
                  another stage
    activations   what backward needs of all micro-batches in flight, bf16 copies of weights included
    working       what is at work at a time: in backward, or in the optimizer's step, which never meet

Not counted: the process itself (Python, PyTorch, CUDA's context), NCCL's buffers, holes between blocks of memory.
"""

from dataclasses import dataclass

from v4train.analysis.activations import recomputed_bytes, unit_bytes, working_bytes
from v4train.analysis.parameters import Share, copied_embedding, stage_shares
from v4train.analysis.work import Work
from v4train.model.config import ModelConfig

LIVE = 1_000_000_000  # numbers that ZeRO 3 keeps gathered, at most: its max_live_parameters
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.working


def peak_memory(config: ModelConfig, work: Work) -> Memory:
    """That of the rank that needs most."""
    return max(stage_memory(config, work), key=lambda memory: memory.total)


def stage_memory(config: ModelConfig, work: Work, shares: list[Share] | None = None) -> list[Memory]:
    """Of a rank of each pipeline stage. shares: `stage_shares`, where they are known already."""
    shares = shares or stage_shares(config, work)
    units = unit_bytes(config, work)
    at_a_time = recomputed_bytes(config, work) + working_bytes(config, work)
    copied = copied_embedding(config, work)
    stages = []
    for stage, share in enumerate(shares):
        last = stage == work.pipeline - 1
        in_flight = min(work.pipeline - stage, work.accumulation)
        kept = sum(units[share.units])
        if work.precision == "bf16" and work.recompute != "block":
            kept += 2 * share.cast
        copy = 2 * 4 * copied if last else 0  # weights and gradient
        static = static_memory(share, work)
        tables = _tables(config) if stage == 0 else 0
        stages.append(
            Memory(
                static.weights,
                static.gradients,
                static.optimizer,
                static.buffers + copy + tables,
                in_flight * kept,
                max(at_a_time, static.working - in_flight * kept),
            )
        )
    return stages


def static_memory(share: Share, work: Work) -> Memory:
    """What depends on no micro-batch; `working` is that of the optimizer's step."""
    stage, replicas = work.zero_stage, work.replicas
    dense, experts = 1 / replicas, work.expert / replicas  # parts that ZeRO makes

    def part(size: float, of_experts: float) -> float:
        return (size - of_experts) * dense + of_experts * experts

    own = part(share.size, share.experts)
    muon = work.optimizer == "muon"
    matrices, of_experts = (share.matrices, share.expert_matrices) if muon else (0, 0)
    own_matrices = part(matrices, of_experts)
    # Muon's momentum of a tensor that straddles two ranks' parts is on both
    straddling = share.largest if muon and replicas > 1 and stage in (1, 2) else 0
    # Newton-Schulz: the iterate, its Gram matrix, the polynomial, what comes of them, and the update
    orthogonal = 4 * 5 * share.largest if muon else 0
    if stage == 0:
        state = 4 * matrices + 8 * (share.size - matrices)
        return Memory(4 * share.size, 4 * share.size, state, 0, 0, orthogonal)
    state = 4 * own + 4 * (own_matrices + straddling) + 8 * (own - own_matrices)
    bucket = 4 * min(work.bucket, share.size)
    if stage == 3:
        gathered = 4 * min(LIVE, share.size)
        return Memory(4 * own + gathered, 4 * own, state, bucket, 0, orthogonal + 4 * own)
    gradients = 4 * (share.size if stage == 1 else own)
    # The step flattens a group's gradients; a step's momentum is staged beside the old one until it is known to stand
    return Memory(4 * share.size, gradients, state, bucket, 0, orthogonal + 4 * own + 4 * (own_matrices + straddling))


def _tables(config: ModelConfig) -> int:
    """Hash tables (int64) and selection biases of the routers."""
    moe, layers = config.moe, config.ffn_kinds.count("moe")
    return 8 * config.vocab_size * moe.top_k * moe.num_hash_layers + 4 * moe.num_experts * layers
