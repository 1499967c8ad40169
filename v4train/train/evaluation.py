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
from v4train.train.distributed import all_sum_tensor, gathered
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
        if (config := settings.evaluation).tasks:
            from v4train.evaluation.harness import check_tasks  # lm_eval may be missing, and takes seconds

            check_tasks(config.tasks, config.task_path, config.few_shot, generates=False, key="evaluation.tasks")
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
        if self.config.tasks:
            found["tasks"] = self._tasks(stage)
        return dict(flat(found))

    def _tasks(self, stage: Stage) -> dict[str, dict[str, float]]:
        """Every rank asks the same questions, and all answer together."""
        from v4train.evaluation.harness import HarnessModel, run_tasks

        sizes = (stage.sequence_length, self.settings.micro_batch(stage))
        asked = HarnessModel(None, self.data.tokenizer, self._whole_scores, *sizes, even=True)
        config = self.config
        return gathered(run_tasks(asked, config.tasks, config.task_path, config.few_shot, config.task_limit))[0]

    def _whole_scores(self, batch: Batch) -> Scores:
        """Of rows that all data ranks have, on every rank."""
        own = torch.stack([of.double() for of in self._scores(batch)])
        if self.topology.index("data"):
            own = torch.zeros_like(own)
        nats, likeliest, counted = self._over_ranks(own)
        return Scores(nats, likeliest > 0, counted > 0)

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
