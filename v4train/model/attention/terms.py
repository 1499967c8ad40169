"""What the queries of one chunk look at: the terms that their joint softmax is made of, each a set of keys.

    Tokens    the document's tokens before each query, or a window of them, in one product
    Window    a window, block by block: few keys are computed only to be masked
    InReach   entries, all of those that some query of the chunk may see in one product, the others masked
    Gathered  K selected entries of each query, which is then a small product of its own

Each arranges the chunk's [B, Q, H, ...] as its own product wants it, and adds gradients of its keys to the whole.

Shapes: B batch, S queries, Q queries of a chunk, H heads, G key-value heads (R = H / G heads share one), D head
width, E value width, T tokens that keys exist for, N entries, n keys of a term, K selected entries, b queries of a
block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from v4train.model.attention.selection import IndexUse, add_rows, take_rows
from v4train.model.attention.softmax import Term
from v4train.model.config import BLOCK_ROWS, LEAST_BLOCK
from v4train.model.documents import in_window
from v4train.model.precision import full_dtype
from v4train.model.seams import Heads


@dataclass
class Local:
    """Tokens of the sequence that a query sees. Keys [B, G, T, D] and values [B, G, T, E]; the last S are the queries'.

    values None: the first E channels of the keys. starts: [B, S] first token of each query's document, as an index into
    the keys.
    window: how many tokens a query sees, every `dilation`-th one back from itself; None is the whole document.
    """

    keys: Tensor
    values: Tensor | None
    starts: Tensor
    window: int | None
    dilation: int = 1


class Seen(Protocol):
    def reach(self, begin: int, stop: int) -> slice:
        """Entries that some query of begin..stop-1 may see: no other one does."""

    def visible(self, begin: int, stop: int, entries: slice) -> Tensor:
        """Which of these entries queries begin..stop-1 see: [B, stop - begin, n] bool."""


@dataclass
class Entries:
    """Keys [B, G, N, D] and values [B, G, N, E] beside the sequence; values None: the first E channels of the keys."""

    keys: Tensor
    values: Tensor | None
    seen: Seen


class Inputs(NamedTuple):
    """The tensors with gradients of one attention: local keys [B, G, T, D], entries [B, G, N, D], values of both."""

    query: Tensor
    keys: Tensor | None
    entries: Tensor | None
    values: Tensor | None
    entry_values: Tensor | None
    sink: Tensor | None
    index_query: Tensor | None
    index_keys: Tensor | None
    head_weight: Tensor | None


class Layout:
    """What is seen from where: everything about one attention that has no gradient."""

    def __init__(
        self,
        local: Local | None,
        seen: Seen | None,
        index: IndexUse | None,
        chunk: int,
        scale: float,
        width: int,
        heads: Heads,
    ):
        self.has_local = local is not None
        if local is not None:  # not the tensors with gradients, which autograd must be able to free
            self.starts, self.window, self.dilation = local.starts, local.window, local.dilation
            self.before = local.keys.shape[2] - local.starts.shape[1]  # keys older than the first query
        self.seen, self.index, self.chunk, self.scale, self.width = seen, index, chunk, scale, width
        self.heads = heads

    @property
    def selects(self) -> bool:
        return self.index is not None and self.index.select

    @property
    def learns(self) -> bool:
        return self.index is not None and self.index.with_loss

    def local_keys(self, begin: int, stop: int) -> slice:
        """Local keys that queries begin..stop-1 can reach."""
        if self.window is not None:
            first = self.before + begin - (self.window - 1) * self.dilation
        else:  # on a GPU reading a number back would hold up its queue
            first = int(self.starts[:, begin:stop].min()) if self.starts.device.type == "cpu" else 0
        return slice(max(first, 0), self.before + stop)

    def local_mask(self, begin: int, stop: int) -> Tensor:
        """Which of them each query sees: [B, Q, n] bool."""
        reach, device = self.local_keys(begin, stop), self.starts.device
        key = torch.arange(reach.start, reach.stop, device=device)
        distance = torch.arange(self.before + begin, self.before + stop, device=device)[:, None] - key
        near = distance >= 0 if self.window is None else in_window(distance, self.window, self.dilation)
        return near & (key >= self.starts[:, begin:stop, None])

    def block(self, heads_per_key: int, queries: int) -> int | None:
        """Queries in a block of `Window` for a chunk of so many; None where blocks gain nothing."""
        if not self.has_local or self.window is None or self.dilation > 1:
            return None
        block = max(LEAST_BLOCK, BLOCK_ROWS // heads_per_key)
        return block if queries >= 2 * block else None

    def blocks_back(self, block: int) -> int:
        """Blocks of `Window` that a query sees before its own: r."""
        return -(-(self.window - 1) // block)

    def entries(self, begin: int, stop: int) -> slice:
        return slice(0, 0) if self.seen is None else self.seen.reach(begin, stop)


class Part(Protocol):
    """A term of the joint softmax of queries begin..stop-1, or of `some` of them."""

    term: Term

    def arrange(self, x: Tensor) -> Tensor:
        """[B, Q, H, ...] as the term has it."""

    def restore(self, x: Tensor) -> Tensor:
        """The inverse."""

    def add(self, gradients: list[Tensor | None], keys: Tensor, values: Tensor | None) -> None:
        """Add gradients of the term's keys and values to those of `Inputs`' local keys, entries and their values."""


class _OneProduct:
    """Heads by queries by keys, as they stand in a slice of the inputs."""

    def __init__(
        self,
        layout: Layout,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None,
        at: slice,
        seen: Callable[[], Tensor],
        slot: int,
        may_see_nothing: bool = False,
    ):
        """query: [B, Q, H, D]; keys, values: all of them, read at `at`; seen: gives [B, Q, n]; slot: of gradients."""
        self.at, self.slot = at, slot
        values = None if values is None else values[:, :, at]
        additive = lambda: _additive(seen(), keys)[:, None]  # noqa: E731
        query = query.transpose(1, 2)
        self.term = Term(query, keys[:, :, at], values, layout.width, additive, layout.scale, may_see_nothing)

    def arrange(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    restore = arrange

    def add(self, gradients: list[Tensor | None], keys: Tensor, values: Tensor | None) -> None:
        gradients[self.slot][:, :, self.at] += keys
        if values is not None:
            gradients[self.slot + 2][:, :, self.at] += values


class Tokens(_OneProduct):
    """Local tokens in reach."""

    def __init__(self, inputs: Inputs, layout: Layout, begin: int, stop: int):
        seen = partial(layout.local_mask, begin, stop)
        query, at = inputs.query[:, begin:stop], layout.local_keys(begin, stop)
        super().__init__(layout, query, inputs.keys, inputs.values, at, seen, slot=0)


class InReach(_OneProduct):
    """Entries in reach, those that `attended` says, [B, Q, n]; of all queries of the chunk or `some`."""

    def __init__(
        self,
        inputs: Inputs,
        layout: Layout,
        begin: int,
        stop: int,
        attended: Callable[[], Tensor],
        some: slice = slice(None),  # noqa: B008
    ):
        query, at = inputs.query[:, begin:stop][:, some], layout.entries(begin, stop)
        seen = lambda: attended()[:, some]  # noqa: E731
        super().__init__(layout, query, inputs.entries, inputs.entry_values, at, seen, slot=1, may_see_nothing=True)

    def entry_probabilities(self, normaliser: Tensor) -> Tensor:
        """Weights of the entries [B, Q, n], summed over heads, in a softmax with normaliser [B, Q, H]."""
        return self.term.weights(self.arrange(normaliser)).sum(1)


class Window:
    """Local tokens of a window, blocks of b queries each against the window before it and itself.

    The keys are a strided view of one copy: block j reads b (r + 1) of them from b j on, r b >= window - 1. The R heads
    of a key-value head are rows of its block, B and G one dimension: query [B G, blocks, b R, D].
    """

    def __init__(self, inputs: Inputs, layout: Layout, begin: int, stop: int, block: int):
        self.groups, tokens = inputs.keys.shape[1:3]
        self.block, self.queries = block, stop - begin
        self.blocks, self.back = -(-self.queries // block), layout.blocks_back(block)
        first = layout.before + begin - self.back * block
        last = first + (self.back + self.blocks) * block
        self.at, self.pad = slice(max(first, 0), min(last, tokens)), (max(-first, 0), max(last - tokens, 0))
        keys = self._strided(inputs.keys)
        values = None if inputs.values is None else self._strided(inputs.values)
        rows = inputs.query.shape[2] // self.groups
        additive = partial(_window_mask, layout, begin, stop, block, self.groups, rows, inputs.keys)
        query = self.arrange(inputs.query[:, begin:stop])
        self.term = Term(query, keys, values, layout.width, additive, layout.scale)

    def arrange(self, x: Tensor) -> Tensor:
        missing = self.blocks * self.block - self.queries
        x = F.pad(x, (*[0, 0] * (x.dim() - 2), 0, missing)) if missing else x
        x = x.unflatten(1, (self.blocks, self.block)).unflatten(3, (self.groups, -1))  # [B, blocks, b, G, R, ...]
        return x.movedim(3, 1).flatten(0, 1).flatten(2, 3)

    def restore(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.groups)).unflatten(3, (self.block, -1)).movedim(1, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, : self.queries]

    def add(self, gradients: list[Tensor | None], keys: Tensor, values: Tensor | None) -> None:
        for slot, change in ((0, keys), (2, values)):
            if change is None:
                continue
            shape = (change.shape[0], self.back + self.blocks, self.block, change.shape[-1])
            total = torch.zeros(shape, dtype=full_dtype(change), device=change.device)
            for i, part in enumerate(change.split(self.block, dim=2)):  # keys that the blocks share
                total[:, i : i + self.blocks] += part
            whole = total.view(-1, self.groups, total.shape[1] * self.block, change.shape[-1])
            gradients[slot][:, :, self.at] += whole[:, :, self.pad[0] : whole.shape[2] - self.pad[1]]

    def _strided(self, x: Tensor) -> Tensor:
        """[B, G, T, D] as [B G, blocks, b (r + 1), D], zeros where no token is."""
        x = F.pad(x[:, :, self.at], (0, 0, *self.pad)).flatten(0, 1)
        x = x.contiguous()
        length, width = x.shape[1:]
        shape = (x.shape[0], self.blocks, self.block * (self.back + 1), width)
        return x.as_strided(shape, (length * width, self.block * width, width, 1))


def _window_mask(layout: Layout, begin: int, stop: int, block: int, groups: int, rows: int, like: Tensor) -> Tensor:
    """Of `Window`: [B G or 1, blocks or 1, b R, n]. Queries beyond the chunk see a window of anything."""
    device, back, blocks = layout.starts.device, layout.blocks_back(block), -(-(stop - begin) // block)
    query, key = torch.arange(block, device=device), torch.arange((back + 1) * block, device=device) - back * block
    near = in_window(query[:, None] - key, layout.window, 1)
    starts = layout.starts[:, begin:stop]
    position = torch.arange(layout.before + begin, layout.before + stop, device=device)
    # Reading a number back would hold up a GPU's queue
    if device.type == "cpu" and bool((starts <= position - (layout.window - 1)).all()):
        seen = near[None, None]
    else:
        starts = F.pad(starts, (0, blocks * block - starts.shape[1]), value=-(2**31))
        starts = starts.unflatten(1, (blocks, block))[..., None]
        index = layout.before + begin + torch.arange(blocks, device=device)[:, None, None] * block + key
        seen = near & (index >= starts)  # [B, blocks, b, n]
        seen = seen[:, None].expand(-1, groups, -1, -1, -1).flatten(0, 1)
    mask = _additive(seen, like)[:, :, :, None]
    return mask.expand(-1, -1, -1, rows, -1).flatten(2, 3)


class Gathered:
    """Entries `chosen` [B, Q, K], -1 for none: every query a batch of its own, heads its rows."""

    def __init__(self, inputs: Inputs, layout: Layout, begin: int, stop: int, chosen: Tensor):
        self.chosen, self.shape = chosen, (*chosen.shape[:2], inputs.query.shape[2])
        rows = take_rows(inputs.entries[:, 0], chosen)
        values = None if inputs.entry_values is None else take_rows(inputs.entry_values[:, 0], chosen)[:, None]
        query = self.arrange(inputs.query[:, begin:stop])
        additive = lambda: _additive(chosen >= 0, rows).flatten(0, 1)[:, None, None]  # noqa: E731
        self.term = Term(query, rows[:, None], values, layout.width, additive, layout.scale, may_see_nothing=True)

    def arrange(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[:, None]

    def restore(self, x: Tensor) -> Tensor:
        return x[:, 0].unflatten(0, self.shape[:2])

    def entry_probabilities(self, normaliser: Tensor) -> Tensor:
        """Weights of the chosen entries [B, Q, K], summed over heads, in a softmax with normaliser [B, Q, H]."""
        return self.restore(self.term.weights(self.arrange(normaliser))).sum(2)

    def add(self, gradients: list[Tensor | None], keys: Tensor, values: Tensor | None) -> None:
        add_rows(gradients[1][:, 0], self.chosen, keys)
        if values is not None:
            add_rows(gradients[3][:, 0], self.chosen, values)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """0 where the mask holds, -inf elsewhere, in the precision of logits."""
    zeros = torch.zeros(mask.shape, dtype=full_dtype(like), device=mask.device)
    return zeros.masked_fill_(~mask, -torch.inf)
