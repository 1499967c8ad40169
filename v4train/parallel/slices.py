"""Tensors in pieces: what one rank holds of a whole one, said so that any layout can put it together again.

A layout cuts a tensor into blocks (of heads, channels, experts), and ZeRO a block's flat values into ranges. A piece is
one range of one block; it is named after both.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Box = tuple[slice, ...]  # of a whole tensor, start and stop in each dimension

_KEY = re.compile(r"(?P<name>.+)\[(?P<box>[\d:,]*)\]\+(?P<begin>\d+)")


class Slice(NamedTuple):
    """Values from `begin` on of the flat block of tensor `name` that lies at `box`."""

    name: str
    box: Box
    begin: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the block."""
        return shape_of(self.box)

    def key(self) -> str:
        """For instance `blocks.0.ffn.experts.down[4:8,0:64,0:32]+512`."""
        return f"{self.name}[{','.join(f'{side.start}:{side.stop}' for side in self.box)}]+{self.begin}"

    @classmethod
    def of_key(cls, key: str) -> "Slice | None":
        """Of a `key()`, or None for a name."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        sides = [side.split(":") for side in match["box"].split(",") if side]
        return cls(match["name"], tuple(slice(int(start), int(stop)) for start, stop in sides), int(match["begin"]))


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)


def assembled(pieces: Iterable[tuple[Slice, Tensor]], box: Box | None = None) -> Tensor:
    """What lies at `box` of the tensor (all of it: None) that is cut into these pieces, each a flat tensor.

    Blocks outside the box are not read. Raises ValueError where values are missing.
    """
    blocks: dict[tuple, list[tuple[Slice, Tensor]]] = defaultdict(list)
    for piece, values in pieces:
        blocks[tuple((side.start, side.stop) for side in piece.box)].append((piece, values))
    if box is None:
        box = tuple(slice(0, max(stop for _, stop in sides)) for sides in zip(*blocks, strict=True))
    some = next(iter(blocks.values()))[0]
    whole, filled = torch.empty(shape_of(box), dtype=some[1].dtype), 0
    for parts in blocks.values():
        own = parts[0][0].box
        shared = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(own, box, strict=True)]
        if any(side.stop <= side.start for side in shared):
            continue
        into = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(shared, box, strict=True))
        out = tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(shared, own, strict=True))
        whole[into] = _block(parts)[out]
        filled += prod(shape_of(tuple(shared)))
    if filled != whole.numel():
        raise ValueError(f"{some[0].name}: {whole.numel() - filled} of {whole.numel()} values are missing")
    return whole


def _block(parts: list[tuple[Slice, Tensor]]) -> Tensor:
    first, values = parts[0]
    size = prod(first.shape)
    if values.numel() == size:
        return values.view(first.shape)
    if sum(values.numel() for _, values in parts) != size:
        raise ValueError(f"{first.name}: pieces of {first.key()} are missing")
    flat = torch.empty(size, dtype=values.dtype)
    for piece, values in parts:
        flat[piece.begin : piece.begin + values.numel()] = values
    return flat.view(first.shape)
