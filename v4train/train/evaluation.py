"""What launch/evaluate.py measures on our own rows, during training: `train.evaluate_every`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from v4train.config import Settings
from v4train.data import Batch, Corpus, Tokenizer, load_data
from v4train.data.packing import IGNORED_TARGET
from v4train.evaluation.measure import flat, measure, recall_task
from v4train.evaluation.scores import Scores
from v4train.parallel.engine import Engine
from v4train.train.distributed import all_sum_tensor
from v4train.train.phases import Stage


class RunData(NamedTuple):
    """What a run trains on, and `evaluated` every `train.evaluate_every` steps: with `evaluation.tokens` held out."""

    tokenizer: Tokenizer
    corpus: Corpus
    evaluated: Corpus


def find_data(settings: Settings) -> RunData:
    """All data of a run.

    Raises:
        ConfigError: (data.*, tokenizer.*, evaluation.*) it can't be read, or a recall task doesn't fit the rows of some
            phase, or the tokenizer.
    """
    lengths = {phase.sequence_length for phase in settings.plan.phases}
    validated = settings.train.validation_tokens
    tokenizer, corpus = load_data(settings.data, settings.tokenizer, validated, lengths)
    evaluated = corpus
    if settings.train.evaluate_every:
        recall_task(settings.evaluation, corpus, tokenizer, min(lengths))
        if (wanted := settings.evaluation.held_out_tokens(validated)) != validated:
            _, evaluated = load_data(settings.data, settings.tokenizer, wanted)
    return RunData(tokenizer, corpus, evaluated)


class Evaluation:
    """Of one run, on every rank. `beat` is called for each batch."""

    def __init__(self, settings: Settings, engine: Engine, data: RunData, beat: Callable[[], None]) -> None:
        self.settings, self.config, self.topology = settings, settings.evaluation, settings.topology
        self.engine, self.data, self.beat = engine, data, beat

    def figures(self, stage: Stage) -> dict[str, float | None]:
        """For a line of metrics, on rows as long as those of `stage`; every rank must call it, and then set the model
        to training again."""
        self.engine.model.eval()
        found = measure(
            self.config,
            self.data.evaluated,
            self.data.tokenizer,
            self._scores,
            length=stage.sequence_length,
            batch_size=self.settings.micro_batch(stage),
            rank=(self.topology.index("data"), self.topology.sizes.data),
            over_ranks=self._over_ranks,
        )
        return dict(flat(found))

    def _scores(self, batch: Batch) -> Scores:
        """Of whole rows; what another rank counts is 0 here: of a row's shards, stages and copies each has its own."""
        self.beat()
        index, count = self.topology.index("context"), self.topology.sizes.context
        found = self.engine.token_losses(batch.shard(index, count, self.topology.device))
        targets = batch.targets.cpu()
        scores = Scores(*(torch.zeros(targets.shape, dtype=dtype) for dtype in (torch.float, torch.bool, torch.bool)))
        if found is None or self.topology.index("tensor"):
            return scores
        own = slice(index * targets.shape[1] // count, (index + 1) * targets.shape[1] // count)
        scores.nats[:, own], scores.likeliest[:, own] = found.nats.cpu(), found.likeliest.cpu()
        scores.counted[:, own] = targets[:, own] != IGNORED_TARGET
        return scores

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return all_sum_tensor(sums.to(self.topology.device)).cpu()
