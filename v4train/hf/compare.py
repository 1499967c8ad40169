"""Whether transformers computes what we compute: the logits of both on the same tokens.

Both make hard choices: a router's experts, an indexer's entries. Between candidates that are equal but for rounding
(ReLU makes index scores exactly equal, and transformers' top-k leaves open which one wins) either choice is right, and
everything behind it differs. So where the two chose differently, transformers is given our choice; logits must then
agree everywhere, and choices nearly everywhere.

Shapes: B batch, S sequence, N entries, K chosen ones, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from v4train.data import Tokenizer
from v4train.errors import ConfigError
from v4train.model import Transformer
from v4train.model.attention.selection import index_scores, select_top_k, selection_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOUND = 2e-5  # of a logit's difference, for logits up to 1; larger ones are rounded as much more
CHOICES_ALIKE = 0.99  # share that must be
TIE = 1e-4  # of the largest index score: what rounding may make of two equal ones
MOST_CHARACTERS = 16  # of a token, on average


class Agreement(NamedTuple):
    """What `compare` found."""

    tokens: int
    difference: float  # the largest of all logits
    bound: float  # that it must not exceed
    choices: int  # of experts and entries, over tokens and layers
    alike: int  # made as we made them, or as well

    def __str__(self) -> str:
        text = (
            f"largest difference of a logit {self.difference:.1e} over {self.tokens:,} tokens (bound {self.bound:.1e})"
        )
        return text + (f", {self.alike:,} of {self.choices:,} top-k choices alike" if self.choices else "")


def sample_texts() -> tuple[str, ...]:
    """Some 100,000 characters each, found with every Python."""
    import argparse
    import typing

    return tuple(inspect.getsource(module) for module in (argparse, typing))


def sample_ids(model: Transformer, tokenizer: Tokenizer) -> Tensor:
    """Token ids [B, S] of real text, long enough that every mechanism of the model is at work."""
    reach = max(_reach(model))
    length = reach + reach // 4 + 64
    texts = [text[: MOST_CHARACTERS * length] for text in sample_texts()]
    rows = [[tokenizer.bos_id, *tokenizer.encode(text).tolist()][:length] for text in texts]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def _reach(model: Transformer) -> list[int]:
    """Of each layer, the tokens within which it sees all: its window, one entry, or entries that are all selected."""
    attention, selects = model.config.attention, model.attention_mode == "sparse"
    entries = {
        "csa": attention.csa_compression * (attention.indexer.top_k if selects else 1),
        "hca": attention.hca_compression,
        "dsa": attention.dsa.top_k if selects else 0,
    }
    return [max(entries.get(layer.kind, 0), getattr(layer.options, "window", 0) or 0) for layer in model.config.layers]


@torch.no_grad()
def compare(model: Transformer, peer: PreTrainedModel, input_ids: Tensor) -> Agreement:
    """Logits of both, in eval mode and fp32, on tokens [B, S].

    Raises:
        ConfigError: they differ, or transformers' are no numbers.
    """
    routers = _pairs(model, peer, ".ffn.router", (".mlp.gate", ".mlp.router"))
    indexers = _pairs(model, peer, ".attention.indexer", (".self_attn.indexer", ".compressor.indexer"))
    choices: list[_Choice] = [_Experts(*pair) for pair in routers]
    if model.attention_mode == "sparse":
        choices += [_Entries(*pair, model) for pair in indexers]
    with ExitStack() as hooks:
        for choice in choices:
            hooks.enter_context(choice.ours.register_forward_hook(choice.record))
            hooks.enter_context(choice.theirs.register_forward_hook(choice.share))
        ours = model(input_ids).logits
        theirs = peer(input_ids, use_cache=False).logits
    result = Agreement(
        input_ids.numel(),
        float((ours - theirs).abs().max()),  # NaN if theirs has one
        BOUND * max(1.0, float(ours.abs().max())),
        sum(choice.total for choice in choices),
        sum(choice.alike for choice in choices),
    )
    if not result.difference <= result.bound or result.alike < CHOICES_ALIKE * result.choices:
        rule = f"transformers' {peer.config.model_type} computes something else ({result})"
        raise ConfigError("logits", "different", rule, "nothing is written; please report the model's configuration")
    return result


def _pairs(
    model: Transformer, peer: PreTrainedModel, our_end: str, their_ends: tuple[str, ...]
) -> list[tuple[nn.Module, nn.Module]]:
    """Modules that do the same, layer by layer."""
    ours = [module for name, module in model.blocks.named_modules() if name.endswith(our_end)]
    theirs = [module for name, module in peer.named_modules() if name.endswith(their_ends)]
    return list(zip(ours, theirs, strict=True))


class _Choice(ABC):
    """One layer's: `record` hooks our module, `share` theirs, whose output is ours where it was another choice."""

    def __init__(self, ours: nn.Module, theirs: nn.Module) -> None:
        self.ours, self.theirs = ours, theirs
        self.total = self.alike = 0

    @abstractmethod
    def record(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """Keep what ours has chosen: a forward hook."""

    @abstractmethod
    def share(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        """Count where theirs has chosen as well; its output, with our choice elsewhere: a forward hook."""

    def _count(self, alike: Tensor) -> None:
        self.total += alike.numel()
        self.alike += int(alike.sum())


class _Experts(_Choice):
    def record(self, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.chosen, self.weights = (x.flatten(0, 1) for x in output)

    def share(
        self, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = output
        same = (chosen.sort(-1).values == self.chosen.sort(-1).values).all(-1, keepdim=True)
        self._count(same)
        return logits, torch.where(same, weights, self.weights), torch.where(same, chosen, self.chosen)


class _Entries(_Choice):
    def __init__(self, ours: nn.Module, theirs: nn.Module, model: Transformer) -> None:
        super().__init__(ours, theirs)
        attention = model.config.attention
        compressed = hasattr(ours, "compressor")  # csa; a dsa layer selects tokens
        self.ratio = attention.csa_compression if compressed else 1
        self.top_k = attention.indexer.top_k if compressed else attention.dsa.top_k

    def record(self, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.scores = index_scores(*output).scores  # [B, S, N]

    def share(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """[B, S, K] entries; of a query that sees fewer the rest is -1 in csa, and in dsa anything it doesn't see."""
        length, count = self.scores.shape[1:]
        ends = torch.arange(1, length + 1)[:, None] // self.ratio
        visible = (torch.arange(count) < ends).expand_as(self.scores)
        chosen = select_top_k(self.scores, visible, self.top_k)
        ours, theirs = selection_mask(chosen, count), selection_mask(output.long(), count) & visible
        lowest = [self.scores.masked_fill(~mask, torch.inf).amin(-1) for mask in (ours, theirs)]
        as_good = (ours.sum(-1) == theirs.sum(-1)) & (lowest[0] - lowest[1] <= TIE * self.scores.abs().max())
        selects = (ends > self.top_k)[:, 0]
        self._count(as_good[:, selects] | (ours == theirs).all(-1)[:, selects])
        if self.ratio == 1:
            chosen = chosen.clamp(min=0)  # the first token, which is seen, instead of none
        return torch.where((ours == theirs).all(-1, keepdim=True), output, chosen.to(output))
