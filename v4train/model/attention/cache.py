"""What each layer keeps of the tokens it has seen, for generation: exactly what its mechanism needs, and no more.

    mha mqa gqa   keys and values of every KV head; the last `window` tokens only where there is a window
    mla dsa       one latent and one rotated key a token; dsa also its index keys
    swa           the last `window` shared KV heads
    csa hca       those, the compressed entries, and the tokens that wait for their block to be complete

`model.new_cache(batch, max_length)` makes one. `v4train.analysis.kv_cache` has the same sizes in closed form.

Shapes: B batch, G KV heads, T tokens stored, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from v4train.errors import ConfigError


class TokenBuffer:
    """The last `capacity` tokens of something a token has [B, G, ., D], oldest first."""

    def __init__(self, batch: int, groups: int, capacity: int, width: int) -> None:
        self.data = torch.zeros(batch, groups, capacity, width)
        self.length = 0

    @property
    def tensors(self) -> list[Tensor]:
        return [self.data]

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        self.data = torch.zeros_like(self.data, device=device, dtype=dtype)

    def extend(self, new: Tensor) -> Tensor:
        """What was stored, followed by `new` [B, G, S, D]; the last tokens of that are stored from now on."""
        total, capacity = self.length + new.shape[2], self.data.shape[2]
        if total <= capacity:
            self.data[:, :, self.length : total] = new
            self.length = total
            return self.data[:, :, :total].to(new.dtype)
        whole = torch.cat([self.data[:, :, : self.length].to(new.dtype), new], dim=2)
        self.data.copy_(whole[:, :, total - capacity :])
        self.length = capacity
        return whole

    def keep_first(self, new: Tensor) -> Tensor:
        """As `extend`, but the first tokens stay and later ones are dropped."""
        room = min(self.data.shape[2] - self.length, new.shape[2])
        return self.extend(new[:, :, :room])


class BlockTail:
    """Tokens that wait for their compression block of m to be complete, and what the next block needs of the last one.

    Holds the compressor's projections of a token, kv and gate [B, ., P * c] (P = 2 with overlap, else 1).
    """

    def __init__(self, batch: int, ratio: int, parts: int, width: int) -> None:
        self.waiting = torch.zeros(2, batch, ratio - 1, parts * width)  # kv and gate
        self.previous = torch.zeros(2, batch, ratio if parts == 2 else 0, width)  # of the last complete block
        self.count = 0  # tokens waiting
        self.blocks = 0  # complete blocks so far

    @property
    def tensors(self) -> list[Tensor]:
        return [self.waiting, self.previous]

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        self.waiting = torch.zeros_like(self.waiting, device=device, dtype=dtype)
        self.previous = torch.zeros_like(self.previous, device=device, dtype=dtype)


@dataclass
class LayerCache:
    """The buffers of one layer by name, and how many tokens it has seen."""

    buffers: dict[str, TokenBuffer | BlockTail]
    length: int = 0

    def __getitem__(self, name: str) -> TokenBuffer | BlockTail:
        return self.buffers[name]


@dataclass
class Cache:
    """State of a whole model after `length` tokens of each of `batch` rows, every row being one document."""

    batch: int
    max_length: int
    layers: list[LayerCache] = field(default_factory=list)
    length: int = 0

    def check(self, input_ids: Tensor, document_ids: Tensor | None) -> None:
        """Raise ConfigError for tokens [B, S] that don't fit."""
        batch, new = input_ids.shape
        if batch != self.batch:
            raise ConfigError(
                "input_ids", list(input_ids.shape), f"the cache holds {self.batch} rows", "make a new one"
            )
        if self.length + new > self.max_length:
            rule = f"the cache has room for {self.max_length} tokens a row and holds {self.length}"
            raise ConfigError(
                "input_ids", list(input_ids.shape), rule, "make a longer one: new_cache(batch, max_length)"
            )
        if document_ids is not None and bool((document_ids != document_ids[:, :1]).any() | (document_ids < 0).any()):
            rule = "with a cache a row is one document without padding"
            raise ConfigError("document_ids", list(document_ids.shape), rule, "leave it out")

    def buffers(self) -> list[TokenBuffer | BlockTail]:
        return [buffer for layer in self.layers for buffer in layer.buffers.values()]

    def allocate(self, device: torch.device, dtype: torch.dtype) -> "Cache":
        """Give buffers made on the meta device their memory; returns itself."""
        for buffer in self.buffers():
            buffer.allocate(device, dtype)
        return self

    def nbytes(self) -> int:
        """Bytes of all buffers, which are allocated at once for `max_length` tokens."""
        return sum(tensor.numel() * tensor.element_size() for buffer in self.buffers() for tensor in buffer.tensors)


def window_capacity(window: int | None, dilation: int, max_length: int) -> int:
    """Tokens a layer must keep: the reach of its window, or all."""
    return max_length if window is None else min((window - 1) * dilation + 1, max_length)
