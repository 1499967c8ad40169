"""Micro-batches of training rows for one data rank, with a position that fits in a line of JSON."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from v4train.data.corpus import Corpus
from v4train.data.packing import IGNORED_TARGET, Packing, Row
from v4train.data.tokenizer import Tokenizer
from v4train.errors import ConfigError


@dataclass
class Batch:
    """int64 tensors [B, S], from the loader on the CPU."""

    input_ids: torch.Tensor
    document_ids: torch.Tensor  # constant within a document, changing at each start; -1 is padding
    targets: torch.Tensor  # the next token of the same document, -100 where there is none; [B, S + 1] of a shard

    @property
    def own_targets(self) -> torch.Tensor:
        """Targets [B, S] of the tokens at hand."""
        return self.targets[:, : self.input_ids.shape[1]]

    def shard(self, index: int, count: int, device: torch.device) -> "Batch":
        """One of `count` shards of each row, all as long, in order.

        With two look-ahead tokens: the target of its last token is the first, and behind that one's target, -100 where
        the row ends, is the second. A target that isn't -100 says that its token belongs to the same document.
        """
        if count == 1:
            return Batch(*(x.to(device) for x in (self.input_ids, self.document_ids, self.targets)))
        length = self.input_ids.shape[1] // count
        begin, targets = index * length, F.pad(self.targets, (0, 1), value=IGNORED_TARGET)
        own = [x[:, begin : begin + length] for x in (self.input_ids, self.document_ids)]
        return Batch(*(x.contiguous().to(device) for x in (*own, targets[:, begin : begin + length + 1])))


def stack_rows(rows: Iterable[Row]) -> Batch:
    return Batch(*(torch.from_numpy(np.stack(field)) for field in zip(*rows, strict=True)))


class Loader:
    """This rank's share of the global sequence of rows.

    Step s trains on rows [s*G, (s+1)*G) of the sequence, whatever the number of ranks; micro-batch a of rank r takes
    the `micro_batch_size` rows from s*G + (a*data_world + r)*micro_batch_size. All sizes count rows.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_world: int,
        seed: int,
    ) -> None:
        """Raises ConfigError (train.sequence_length, train.global_batch_size, train.micro_batch_size, seed)."""
        sizes = {"sequence_length": sequence_length, "micro_batch_size": micro_batch_size}
        for key, value, least in [("seed", seed, 0), *((f"train.{name}", size, 1) for name, size in sizes.items())]:
            if value < least:
                raise ConfigError(key, value, f"at least {least}", f"for example {key}={least}")
        per_pass = micro_batch_size * data_world
        if global_batch_size < 1 or global_batch_size % per_pass:
            raise ConfigError(
                "train.global_batch_size",
                global_batch_size,
                f"a multiple of micro_batch_size x data ranks = {micro_batch_size} x {data_world}",
                f"for example {max(1, round(global_batch_size / per_pass)) * per_pass}",
            )
        self.corpus, self.seed = corpus, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.data_rank, self.data_world = data_rank, data_world
        self.packing = Packing(corpus.train, sequence_length, seed, Tokenizer.pad_id)
        self.rows_consumed = 0

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step, [micro_batch_size, S] each, in order."""
        batches = []
        for offset in range(0, self.global_batch_size, self.micro_batch_size * self.data_world):
            first = self.rows_consumed + offset + self.data_rank * self.micro_batch_size
            batches.append(stack_rows(map(self.packing.row, range(first, first + self.micro_batch_size))))
        self.rows_consumed += self.global_batch_size
        return batches

    @property
    def epoch(self) -> float:
        """Passes over the training documents so far, all ranks together."""
        return self.rows_consumed / self.packing.rows_per_epoch

    @property
    def data_tokens(self) -> dict[str, int]:
        """Tokens trained on so far by source, all ranks together."""
        return {self.corpus.source: self.rows_consumed * self.packing.sequence_length}

    def state_dict(self) -> dict[str, Any]:
        """The position: the same on every rank, for any number of ranks and any batch size; can go into JSON."""
        return {
            "corpus": self.corpus.fingerprint,
            "seed": self.seed,
            "sequence_length": self.packing.sequence_length,
            "rows_consumed": self.rows_consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, at no cost. Raises ConfigError where its rows would be other rows."""
        mine = self.state_dict()
        keys = {"corpus": "data", "seed": "seed", "sequence_length": "train.sequence_length"}
        for name, key in keys.items():
            if state[name] != mine[name]:
                raise ConfigError(
                    key,
                    mine[name],
                    f"the saved data position belongs to {name}={state[name]}",
                    "resume with the data, tokenizer, seed and length it was saved with, or start another run",
                )
        self.rows_consumed = int(state["rows_consumed"])
