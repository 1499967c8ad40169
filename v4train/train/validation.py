"""Loss on held-out text, over all ranks."""

import math
from collections.abc import Callable
from typing import Any

import torch

from v4train.config import Settings
from v4train.data import (
    Corpus,
    TokenizedDocuments,
    Tokenizer,
    target_bytes,
    target_counts,
    unigram_entropy,
    validation_batches,
)
from v4train.parallel.engine import Engine
from v4train.train.distributed import all_sum, all_sum_tensor
from v4train.train.phases import Stage


class Validation:
    """Of one run, on every rank. `beat` is called for each batch."""

    def __init__(
        self, settings: Settings, engine: Engine, corpus: Corpus, tokenizer: Tokenizer, beat: Callable[[], None]
    ) -> None:
        self.settings, self.train, self.topology = settings, settings.train, settings.topology
        self.vocab_size = settings.model.vocab_size
        self.engine, self.corpus, self.tokenizer, self.beat = engine, corpus, tokenizer, beat
        # Of ranks with the same tokens one counts
        self.counts = not self.topology.index("tensor")

    def figures(self, stage: Stage) -> dict[str, float]:
        """Loss, bits per byte, and the entropy of the tokens, which is the loss of a model without context; on rows as
        long as those of `stage`."""
        model = self.engine.model
        model.eval()
        model.losses.denominators = {"lm_loss": 1.0, "mtp_loss": 1.0}  # sums, divided below by global counts
        sources = self.corpus.sources.values()
        share = -(-self.train.validation_tokens // len(sources))
        sizes = (stage.sequence_length, self.settings.micro_batch(stage), share)
        parts = {source.name: self._source(source.validation, sizes) for source in sources}
        nats, text_bytes = (sum(part[i] for part in parts.values()) for i in range(2))
        counts = sum(part[2] for part in parts.values())
        loss, entropy = nats / int(counts.sum()), unigram_entropy(counts)
        figures = {
            "val_loss": loss,
            "val_bits_per_byte": nats / math.log(2) / text_bytes,
            "val_tokens": int(counts.sum()),
            "unigram_entropy": entropy,
            "val_gain_over_unigram": entropy - loss,
        }
        if len(parts) > 1:
            figures |= {f"val_loss/{name}": part[0] / int(part[2].sum()) for name, part in parts.items()}
        return figures

    def _source(self, documents: TokenizedDocuments, sizes: tuple[int, int, int]) -> tuple[float, float, torch.Tensor]:
        """(nats, bytes, targets by token [V]) of held-out documents, over all ranks. sizes: length of the rows, rows of
        a batch, most tokens."""
        counts = torch.zeros(self.vocab_size, dtype=torch.long)
        sums: dict[str, Any] = {"nats": 0.0, "bytes": 0.0}
        of_rank = (self.topology.index("data"), self.topology.sizes.data)
        for batch in validation_batches(documents, *sizes, *of_rank, self.tokenizer.pad_id):
            self.beat()
            batch = batch.shard(self.topology.index("context"), self.topology.sizes.context, self.topology.device)
            if self.counts and not self.topology.index("pipeline"):
                counts += target_counts(batch.own_targets.cpu(), len(counts))
                sums["bytes"] += target_bytes(batch.own_targets.cpu(), self.tokenizer.bytes_per_token)
            sums["nats"] += self.engine.validation_loss(batch).double() * self.counts
        counts = all_sum_tensor(counts.to(self.topology.device)).cpu()
        totals = all_sum(sums, self.topology.device)
        return totals["nats"], totals["bytes"], counts
