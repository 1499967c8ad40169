"""What a run does in a step, and on which layout: what memory, traffic and time depend on beside the model."""

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Work:
    """Sizes of a layout, and what it does in a step.

    rows: of a micro-batch, on each of the `data` ranks; accumulation: micro-batches; sequence_length: of whole rows.
    stage_length: rows that pipeline stages are cut for, once for all phases; None: these. The words are those of
    conf/: `train.attention_mode`, `train.recompute`, `optimizer.name`, `precision`. newton_schulz_*: those of
    conf/optimizer/muon.yaml, iterations of both kinds together. device: on a `cpu` memory that nothing is written to
    takes no room, on `cuda` it does.
    """

    sequence_length: int
    _: KW_ONLY
    rows: int = 1
    accumulation: int = 1
    stage_length: int | None = None
    mode: str = "sparse"
    recompute: str = "none"
    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    zero_stage: int = 1
    optimizer: str = "muon"
    newton_schulz_steps: int = 10
    newton_schulz_dtype: str = "float32"
    precision: str = "fp32"
    device: str = "cuda"
    bucket: int | None = None  # numbers that ZeRO 1-3 reduce at a time: reduce_bucket_size, where it is given

    @property
    def length(self) -> int:
        """S: tokens of a row on a rank."""
        return self.sequence_length // self.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.rows * self.length

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pipeline * self.replicas * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks that have the same parameters, but for experts: data x context."""
        return self.data * self.context

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.data * self.rows * self.accumulation * self.sequence_length
