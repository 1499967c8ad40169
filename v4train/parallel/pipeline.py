"""Pipeline parallelism by DeepSpeed's PipelineModule: each rank has some of the parts of `Transformer.parts`, and what
they hand on (streams, token ids, document ids, targets) goes from stage to stage, one micro-batch after another (1F1B).

Losses that arise in the middle need no sending: they are attached where they arise (DESIGN 5). The embedding is on the
first stage and, for MTP or a tied output matrix, on the last: the first trains it with the sum of both gradients, the
last gets a copy.

Shapes: B batch, S sequence, C streams, M hidden, V vocabulary.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from v4train.data import Batch
from v4train.model import Transformer
from v4train.model.losses import Losses, Recorded
from v4train.parallel.deepspeed_fixes import share_out_experts
from v4train.parallel.engine import Engine, EngineSnapshot
from v4train.parallel.groups import Groups
from v4train.parallel.slices import Box
from v4train.parallel.stages import Stages

State = tuple[Tensor, Tensor, Tensor, Tensor]


class PipelineEngine(Engine):
    """`Engine` whose model is on several stages; `train` takes the place of `forward_backward`."""

    def _initialize(self, deepspeed: ModuleType, config: dict[str, Any], groups: Groups) -> tuple:
        from deepspeed.runtime.pipe import schedule

        self._stages, self._pipeline = self.layout.stages, groups["pipeline"]
        self._ranks = dist.get_process_group_ranks(self._pipeline)
        self._ends = groups["ends"]
        # use_reentrant: recomputation is ours. Partitioned: shares of streams that every rank has whole already.
        options = {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False}
        module = _pipeline_module(self.model, self._stages, self.topology.sizes)
        module.experts = share_out_experts(self.groups, groups)
        self._shape: torch.Size | None = None  # of the last batch: DeepSpeed keeps buffers for one
        made = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config={**config, "pipeline": options}, dist_init_required=False
        )
        made[0]._config.steps_per_print = None  # it would print of step 0
        of_deepspeed = made[0]._INSTRUCTION_MAP
        self._step_instruction = of_deepspeed[schedule.OptimizerStep]
        made[0]._INSTRUCTION_MAP = {
            **of_deepspeed,
            schedule.OptimizerStep: lambda engine: None,  # `step` does it
            schedule.ReduceTiedGrads: lambda engine: self._sum_embedding_gradients(),
        }
        return made

    def _time_passes(self, timed: Callable[[str, Callable], Callable]) -> None:
        from deepspeed.runtime.pipe import schedule

        self._forward_indexers = timed("forward", self._forward_indexers)
        self._backward_indexers = timed("backward", self._backward_indexers)
        instructions = self._engine._INSTRUCTION_MAP
        of_backward = (schedule.BackwardPass, schedule.ReduceTiedGrads, schedule.ReduceGrads)
        for kind, name in ((schedule.ForwardPass, "forward"), *((kind, "backward") for kind in of_backward)):
            instructions[kind] = timed(name, instructions[kind])

    def train(self, batches: Sequence[Batch]) -> Recorded:
        self._begun = True
        if self.model.attention_mode == "indexer_warmup":
            self._train_indexers(batches)
        else:
            self._train_all(batches)
        self._ready = True
        return self.model.losses.take()

    def _train_indexers(self, batches: Sequence[Batch]) -> None:
        """Forward through all stages; the indexers of each learn from their own losses, so that no gradient crosses
        stages and none passes through a block."""
        from deepspeed.runtime.pipe import schedule

        for batch in batches:
            self._backward_indexers(self._forward_indexers(batch))
        self._engine._INSTRUCTION_MAP[schedule.ReduceGrads](self._engine)

    def _forward_indexers(self, batch: Batch) -> Tensor:
        losses = self.model.losses
        with losses.indexers_only():
            self._run_stages((batch.input_ids, batch.document_ids, batch.targets), self._stages.parts)
            if self._stages.last:
                losses.record("loss", _objective(losses, self.model.mtp is not None))
            return losses.with_direct(torch.zeros((), device=self.topology.device))

    def _backward_indexers(self, loss: Tensor) -> None:
        if loss.requires_grad:  # there are indexers on this stage
            (self.model.losses.scale * loss).backward()

    def _train_all(self, batches: Sequence[Batch]) -> None:
        if batches[0].input_ids.shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = batches[0].input_ids.shape
        fields = ((batch.input_ids, batch.document_ids, batch.targets) for batch in batches)
        self._engine.train_batch(iter([(inputs, ()) for inputs in fields]))

    @torch.no_grad()
    def validation_loss(self, batch: Batch) -> Tensor:
        self._run_stages((batch.input_ids, batch.document_ids, batch.targets), self._stages.parts)
        recorded = self.model.losses.collect()
        return recorded.get("lm_loss", torch.zeros((), device=self.topology.device))

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        head, blocks = self.model.head, self._stages.parts
        if self._stages.last:
            blocks = blocks[: blocks.index(head)]
        with self.layout.whole_rows(self.model):
            inputs = (input_ids, torch.zeros_like(input_ids), torch.full_like(input_ids, -100))
            state = self._run_stages(inputs, blocks)
            if self._stages.last:
                logits = head.lm_head(head.output_norm(state[0]), None).contiguous()
            else:
                logits = torch.empty(*input_ids.shape, self.model.config.vocab_size, device=input_ids.device)
        self.model.losses.take()
        dist.broadcast(logits, self._ranks[-1], group=self._pipeline)
        return logits

    def _run_stages(self, inputs: tuple[Tensor, Tensor, Tensor], parts: list[nn.Module]) -> State:
        """A forward pass without gradients through all stages; returns what this one hands on."""
        config, device = self.model.config, self.topology.device
        streams = None
        if not self._stages.first:
            shape = (*inputs[0].shape, config.num_streams, config.hidden_size)
            streams = torch.empty(shape, device=device)
            dist.recv(streams, self._ranks[self._stages.index - 1], group=self._pipeline)
        state = (streams, *inputs)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for part in parts:
                state = part(*state)
        if not self._stages.last:
            dist.send(state[0].contiguous(), self._ranks[self._stages.index + 1], group=self._pipeline)
        return state

    def load_named_state(self, read: Callable[[str, Box], dict[str, Tensor]]) -> None:
        super().load_named_state(read)
        self._copy_embedding()

    def roll_back(self, snapshot: EngineSnapshot) -> None:
        super().roll_back(snapshot)
        self._copy_embedding()

    def _take_step(self) -> None:
        self._step_instruction(self._engine)
        self._copy_embedding()

    def _sum_embedding_gradients(self) -> None:
        """The first stage trains the embedding; the last one's gradient is a part of it."""
        for parameter in self._shared_embedding():
            dist.all_reduce(parameter.grad, group=self._ends)
            if self._stages.copies_embedding:
                parameter.grad = None

    def _copy_embedding(self) -> None:
        for parameter in self._shared_embedding():
            dist.broadcast(parameter.data, self._ranks[0], group=self._ends)

    def _shared_embedding(self) -> list[nn.Parameter]:
        shared = self._stages.shared_embedding
        return [] if shared is None else list(shared.parameters())


class _Part(nn.Module):
    """A part as DeepSpeed calls it: the first gets no streams."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, state: tuple[Tensor, ...]) -> State:
        return self.part(*state) if len(state) == 4 else self.part(None, *state)


class _Objective(nn.Module):
    """The last parts, head and MTP: the whole objective of a micro-batch."""

    def __init__(self, stages: Stages, losses: Losses) -> None:
        super().__init__()
        self.parts, self.losses = nn.ModuleList(stages.units[-1]), losses
        self.embedding = stages.shared_embedding  # MTP's or the output matrix, for DeepSpeed to know

    def forward(self, state: State) -> Tensor:
        for part in self.parts:
            state = part(*state)
        loss = _objective(self.losses, len(self.parts) > 1)
        self.losses.record("loss", loss.detach())
        return loss


def _objective(losses: Losses, with_mtp: bool) -> Tensor:
    """From the values last recorded."""
    loss = losses.last("lm_loss")
    return loss + losses.mtp_weight * losses.last("mtp_loss") if with_mtp else loss


def _pipeline_module(model: Transformer, stages: Stages, sizes: Any) -> nn.Module:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class Module(PipelineModule):
        def _partition_layers(self, method: str = "uniform") -> None:
            self.parts = stages.bounds
            self._set_bounds(start=stages.bounds[stages.index], stop=stages.bounds[stages.index + 1])

    layers = [_Part(unit[0]) for unit in stages.units[:-1]]
    layers.append(_Objective(stages, model.losses))
    grid = PipeModelDataParallelTopology(num_pp=sizes.pipeline, num_mp=sizes.tensor, num_dp=sizes.replicas)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds
        return Module(layers, topology=grid)
