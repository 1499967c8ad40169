"""Micro-batches of training rows for one data rank, with a position that fits in a few lines of JSON."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from math import ceil, gcd
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from v4train.data.config import DataConfig
from v4train.data.corpus import Corpus
from v4train.data.lanes import LaneReader, LaneRow, Packer, PackerState, RowConfig
from v4train.data.mixture import Mixture
from v4train.data.packing import IGNORED_TARGET, Packed, Row
from v4train.data.prefetch import Prefetch
from v4train.data.streams import WINDOW_ROWS, Lane
from v4train.data.tokenizer import Tokenizer
from v4train.errors import ConfigError

STEPS_AHEAD = 2  # that are put together, and at least as many of rows that are read
READ_AHEAD = 1 << 26  # bytes of rows that are read ahead, up to a window


class EndOfData(Exception):
    """A source ran dry, and data.when_dry=stop; or all did."""


@dataclass
class Batch:
    """int64 tensors [B, S], from the loader on the CPU."""

    input_ids: torch.Tensor
    document_ids: torch.Tensor  # constant within a document, changing at each start; -1 is padding
    targets: torch.Tensor  # the next token of the same document, -100 where there is none; [B, S + 2] of a shard

    @property
    def own_targets(self) -> torch.Tensor:
        """Targets [B, S] of the tokens at hand."""
        return self.targets[:, : self.input_ids.shape[1]]

    def shard(self, index: int, count: int, device: torch.device) -> "Batch":
        """One of `count` shards of each row, all as long, in order.

        Behind its targets are, for MTP, the target of the token after its last one, and that token: as the row has it
        there, and -100 where it belongs to another document. The last target alone doesn't tell: a document may be cut
        there and go on in another row, or the token be no target.
        """
        if count == 1:
            return Batch(*(x.to(device) for x in (self.input_ids, self.document_ids, self.targets)))
        length = self.input_ids.shape[1] // count
        begin, end = index * length, (index + 1) * length
        own = [x[:, begin:end] for x in (self.input_ids, self.document_ids, self.targets)]
        if index + 1 < count:
            ahead = torch.stack([self.targets[:, end], self.input_ids[:, end]], 1)
            ahead = ahead.where(self.document_ids[:, end : end + 1] == own[1][:, -1:], IGNORED_TARGET)
        else:  # behind the row nothing but its last target is known
            ahead = F.pad(own[2][:, -1:], (1, 0), value=IGNORED_TARGET)
        own[2] = torch.cat([own[2], ahead], 1)
        return Batch(*(x.contiguous().to(device) for x in own))


def stack_rows(rows: Iterable[Row]) -> Batch:
    rows = list(rows)
    fields = np.empty((3, len(rows), len(rows[0].input_ids)), dtype=np.int64)
    for number, row in enumerate(rows):  # several times as fast as a stack of each field
        fields[0, number], fields[1, number], fields[2, number] = row
    return Batch(*torch.from_numpy(fields))


@dataclass(frozen=True)
class BatchConfig:
    """Whose rows of a step these are, in rows. Step s trains on rows [s*G, (s+1)*G) of the sequence.

    Micro-batch a of rank r takes the `micro` rows from s*G + (a*world + r)*micro.
    """

    total: int  # G, over all ranks
    micro: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        """Raises ConfigError (train.global_batch_size, train.micro_batch_size)."""
        if self.micro < 1:
            raise ConfigError(
                "train.micro_batch_size", self.micro, "at least 1", "for example train.micro_batch_size=1"
            )
        per_pass = self.micro * self.world
        if self.total < 1 or self.total % per_pass:
            raise ConfigError(
                "train.global_batch_size",
                self.total,
                f"a multiple of micro_batch_size x data ranks = {self.micro} x {self.world}",
                f"for example {max(1, round(self.total / per_pass)) * per_pass}",
            )

    def rows(self, first: int) -> list[range]:
        """Rows of each micro-batch of this rank in the step that begins with row `first`."""
        starts = range(first + self.rank * self.micro, first + self.total, self.micro * self.world)
        return [range(start, start + self.micro) for start in starts]

    def wanted(self, first: int) -> Callable[[int], bool]:
        """Whether a row is among this rank's of the steps from row `first` on."""
        return lambda number: (number - first) % self.total // self.micro % self.world == self.rank


@dataclass
class Progress:
    """What all ranks have trained on so far: plain values, in a checkpoint."""

    rows: int = 0  # of the sequence so far
    tokens: int = 0  # positions, padding included
    passed_over: int = 0  # positions of rows that were left out
    by_source: Counter = field(default_factory=Counter)  # tokens of documents
    padding: int = 0
    documents: int = 0
    fitting: int = 0
    truncated: int = 0
    hash_high: int = 0  # of the tokens of all rows and their numbers, in two halves of 32 bits
    hash_low: int = 0

    @property
    def data_hash(self) -> str:
        """16 hex digits: the same for the same sequence of tokens, whatever the ranks and interruptions."""
        return f"{self.hash_high:08x}{self.hash_low:08x}"


class Step(NamedTuple):
    """One rank's part of an optimizer step. first: its first row. states, epochs: by lane, behind the rows."""

    first: int
    batches: list[Batch]
    states: dict[int, dict[str, Any]]
    epochs: dict[int, dict[str, float]]
    counts: Counter


def _sequence(corpus: Corpus, data: DataConfig, seed: int) -> dict[str, Any]:
    """What the sequence of rows depends on."""
    lanes = data.lanes or corpus.default_lanes
    recipe = f"lanes {lanes}, {data.packing}, fill-in-middle {data.fim_rate}"
    return {"corpus": corpus.fingerprint, "seed": seed, "recipe": recipe}


def check_position(state: dict[str, Any], corpus: Corpus, data: DataConfig, seed: int) -> None:
    """Raise ConfigError where what follows a loader's saved `state` would be other rows than before."""
    for name, mine in _sequence(corpus, data, seed).items():
        if state[name] != mine:
            rule = f"the saved data position belongs to {name}={state[name]}"
            remedy = "resume with the data, tokenizer and seed it was saved with, or start another run"
            raise ConfigError("seed" if name == "seed" else "data", mine, rule, remedy)


class Loader:
    """This rank's share of the global sequence of rows, which is the same for any number of ranks and workers.

    Row n lies in lane n modulo `data.lanes`. Threads read the lanes of this rank ahead, and one more puts their rows
    together to steps.
    """

    def __init__(
        self,
        corpus: Corpus,
        data: DataConfig,
        tokenizer: Tokenizer,
        sequence_length: int,
        batch: BatchConfig,
        seed: int,
    ) -> None:
        """Raises ConfigError (train.sequence_length, seed, data.*)."""
        if sequence_length < 1:
            raise ConfigError("train.sequence_length", sequence_length, "at least 1", "for example 512")
        if seed < 0:
            raise ConfigError("seed", seed, "at least 0", "for example seed=0")
        self.corpus, self.data, self.tokenizer, self.seed = corpus, data, tokenizer, seed
        self.batch, self.sequence_length = batch, sequence_length
        self.num_lanes = data.lanes or corpus.default_lanes
        corpus.check_lanes(self.num_lanes)
        self.mixture = Mixture(list(corpus.sources), data.weights)
        self.progress = Progress()
        self._states: dict[int, dict[str, Any]] = {}  # of lanes, as far as rows of them were trained on
        self._before = self._place()  # of the last step
        self._epochs: dict[int, dict[str, float]] = {}  # by lane
        self._gaps: list[list[int]] = []  # [first, end) of the rows that are passed over
        self._ahead: deque[Step] = deque()  # taken from the threads before their time
        self._rows: Prefetch | None = None  # by lane
        self._steps: Prefetch | None = None
        self.counts: Counter = Counter()

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step, [micro, S] each, in order.

        `counts` are its figures. Raises EndOfData on a rank whose rows are not there; nothing is taken then, and where
        another rank has taken its own, it is to `take_back`.
        """
        self.look_ahead(0)
        step = self._ahead.popleft()
        self._before = self._place()
        self._states = self._states | step.states
        self._epochs |= step.epochs
        self.counts = step.counts
        self.progress.passed_over += (step.first - self.progress.rows) * self.sequence_length
        self.progress.rows = step.first + self.batch.total
        self.progress.tokens += self.batch.total * self.sequence_length
        return step.batches

    def look_ahead(self, steps: int) -> list[Batch]:
        """What `next_step` will give after so many more steps. Raises EndOfData as that does.

        The position stays, and whatever sets another one also forgets what was looked at.
        """
        while len(self._ahead) <= steps:
            first = self._ahead[-1].first + self.batch.total if self._ahead else self.progress.rows
            after = self._behind_gaps(first)
            if after != first:
                self._stop_threads()
            if self._steps is None:
                self._start(after)
            try:
                self._ahead.append(self._steps.take(0))
            except BaseException:
                self.close()  # a further call begins anew at the same row
                raise
        return self._ahead[steps].batches

    def take_back(self) -> None:
        """The last step was not trained on: go back to before it."""
        self.close()
        self._states, self.progress.rows, self.progress.tokens, self.progress.passed_over = self._before

    def pass_over(self, first: int, end: int) -> None:
        """Leave rows [first, end) of the sequence out, which were not trained on yet. Same call on every rank.

        A step doesn't begin before them and end behind them: where the batch has another size by then, up to a step of
        rows in front of them is left out too.
        """
        self.close()
        self._gaps.append([first, end])

    @property
    def gaps(self) -> list[list[int]]:
        """[first, end) of all rows that were passed over, and are to be: in front of the position and behind it."""
        return [list(gap) for gap in self._gaps]

    def steps_before(self, row: int) -> int:
        """How many of the next steps take rows before `row` only."""
        steps, first = 0, self._behind_gaps(self.progress.rows)
        while first + self.batch.total <= row:
            steps, first = steps + 1, self._behind_gaps(first + self.batch.total)
        return steps

    def _behind_gaps(self, row: int) -> int:
        """The first row from `row` on that a step can begin with."""
        for first, end in sorted(self._gaps):
            if first < row + self.batch.total and row < end:
                row = end
        return row

    def _place(self) -> tuple[dict[int, dict[str, Any]], int, int, int]:
        return self._states, self.progress.rows, self.progress.tokens, self.progress.passed_over

    def count(self, everyones: dict[str, float]) -> None:
        """Add the last step's `counts`, summed over the data ranks, to `progress`."""
        for name, value in everyones.items():
            what, _, source = name.partition("/")
            if what == "tokens":
                self.progress.by_source[source] += int(value)
            else:
                total = getattr(self.progress, what) + int(value)
                setattr(self.progress, what, total % (1 << 32) if what.startswith("hash") else total)

    def epochs(self) -> dict[str, float]:
        """Passes over each source's documents so far: the mean over the lanes that this rank has read."""
        lanes = self._epochs.values()
        return {name: sum(of[name] for of in lanes) / len(lanes) for name in self.corpus.sources} if lanes else {}

    def set_sequence_length(self, length: int) -> None:
        """From the next step on. No token is lost or seen twice: what was packed and not trained on is packed anew.

        Of several ranks each must have loaded the `merged_states` of all before.
        """
        self.close()
        self.sequence_length = length

    def set_batch(self, batch: BatchConfig) -> None:
        """From the next step on, with the next row of the sequence.

        Of several ranks each must have loaded the `merged_states` of all before: the rows, and so the lanes, of a rank
        are others.
        """
        self.close()
        self.batch = batch

    def close(self) -> None:
        """End the threads. What was read ahead is read again where there is another step."""
        self._stop_threads()
        self._ahead.clear()

    def _stop_threads(self) -> None:
        for prefetch in (self._rows, self._steps):  # in this order: the second may be waiting for the first
            if prefetch is not None:
                prefetch.stop()
        self._rows = self._steps = None

    def state_dict(self) -> dict[str, Any]:
        """The position as this rank knows it; those of all ranks together are a run's, by `merged_states`."""
        return {
            **_sequence(self.corpus, self.data, self.seed),
            "progress": vars(self.progress) | {"by_source": dict(self.progress.by_source)},
            "lanes": {str(lane): state for lane, state in self._states.items()},
            "gaps": [list(gap) for gap in self._gaps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, whatever the number of ranks and workers.

        Raises ConfigError where its rows would be other rows.
        """
        check_position(state, self.corpus, self.data, self.seed)
        self.close()
        progress = dict(state["progress"])
        self.progress = Progress(**progress | {"by_source": Counter(progress["by_source"])})
        self._states = {int(lane): own for lane, own in state["lanes"].items()}
        self._epochs = {}
        self._gaps = [list(gap) for gap in state.get("gaps", [])]  # absent: saved by an older version

    def _step(self, first: int) -> Step:
        """Of the step that begins with row `first`."""
        taken = [[self._take(number) for number in rows] for rows in self.batch.rows(first)]
        rows = [row for micro in taken for row in micro]
        lanes = [row.number % self.num_lanes for row in rows]
        states = {lane: row.state for lane, row in zip(lanes, rows, strict=True)}
        epochs = {lane: row.epochs for lane, row in zip(lanes, rows, strict=True)}
        batches = [stack_rows(row.row for row in micro) for micro in taken]
        return Step(first, batches, states, epochs, self._counted(rows))

    def _take(self, number: int) -> LaneRow:
        row = self._rows.take(number % self.num_lanes)
        if row is None:
            raise EndOfData
        return row

    def _counted(self, rows: list[LaneRow]) -> Counter:
        counts = dict.fromkeys((f"tokens/{name}" for name in self.corpus.sources), 0)
        for row in rows:
            counts[f"tokens/{row.source}"] += row.packed.tokens
        others = map(sum, zip(*((*row.packed[1:], *row.digest) for row in rows), strict=True))
        return Counter(counts | dict(zip((*Packed._fields[1:], "hash_high", "hash_low"), others, strict=True)))

    def _start(self, first: int) -> None:
        lanes = self.num_lanes
        steps = range(first, first + self.batch.total * lanes // gcd(self.batch.total, lanes), self.batch.total)
        own = {number % lanes for step in steps for rows in self.batch.rows(step) for number in rows}
        readers = {lane: self._reader(lane) for lane in sorted(own)}
        wanted = self.batch.wanted(first)
        tasks = {lane: (lambda reader=reader: reader.read(wanted, first)) for lane, reader in readers.items()}
        step = self.batch.total // self.batch.world / len(own)  # rows of a lane
        ahead = max(2, ceil(STEPS_AHEAD * step), min(WINDOW_ROWS, READ_AHEAD // (24 * self.sequence_length * len(own))))
        self._rows = Prefetch(tasks, self.data.workers, ahead)
        starts = count(first, self.batch.total)
        self._steps = Prefetch({0: lambda: self._step(next(starts))}, min(self.data.workers, 1), STEPS_AHEAD)

    def _reader(self, lane: int) -> LaneReader:
        fim = self.tokenizer.fim_ids
        config = RowConfig(
            self.sequence_length, self.data.packing, self.data.fim_rate, fim, self.tokenizer.pad_id, self.seed
        )
        saved, packers = self._states.get(lane), {}
        for number, (name, source) in enumerate(self.corpus.sources.items()):
            stream = source.stream(Lane(lane, self.num_lanes, self.seed, number))
            packers[name] = Packer(stream, config, PackerState(**saved["sources"][name]) if saved else None)
        before, length = self.progress.rows, self.sequence_length
        tokens = self.progress.tokens + self.progress.passed_over
        reached = lambda number: tokens + (number - before) * length  # noqa: E731
        return LaneReader(lane, self.num_lanes, packers, self.mixture, reached, self.data.when_dry, saved)


def merged_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One position from those of all ranks: of each lane the place furthest on.

    `left_out`: bad data among what was read up to there, by source and kind.
    """
    lanes: dict[str, Any] = {}
    for state in states:
        for lane, own in state["lanes"].items():
            if lane not in lanes or own["next"] > lanes[lane]["next"]:
                lanes[lane] = own
    left_out: dict[str, Counter] = {}
    for own in lanes.values():
        for name, kinds in own["left_out"].items():
            left_out.setdefault(name, Counter()).update(kinds)
    return states[0] | {"lanes": lanes, "left_out": {name: dict(kinds) for name, kinds in left_out.items()}}
