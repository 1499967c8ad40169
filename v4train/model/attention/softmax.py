"""One term of a joint softmax: values and log-sum-exp over one set of keys, to be joined with other terms.

With the output and log-sum-exp of the whole joint softmax, the backward pass of each term stands alone, and computes
its weights again where they were not kept. Both ways are plain products, which are fast, while the weights of all
queries and keys fit in a CPU's cache; torch's own fused kernel beyond that, which never holds them.

Shapes: B batch, H heads, G key-value heads (H a multiple; head h reads h // (H / G)), Q queries, n keys, D key width,
E value width. Logits, weights and sums are fp32, fp64 for fp64 inputs; bf16 ones multiply weights rounded to bf16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from v4train.model.config import HELD
from v4train.model.precision import full, full_product


@dataclass
class Term:
    """What a set of queries looks at."""

    query: Tensor  # [B, H, Q, D]
    keys: Tensor  # [B, G, n, D]
    values: Tensor | None  # [B, G, n, E]; None: the first E channels of the keys
    width: int  # E
    additive: Callable[[], Tensor]  # makes what is added to the logits, [B, 1, Q, n], -inf where unseen
    scale: float  # of the logits
    may_see_nothing: bool = False
    kept: tuple[Tensor, Tensor] | None = None  # by plain products: weights of this term alone and its log-sum-exp

    @cached_property
    def mask(self) -> Tensor:
        return self.additive()

    @property
    def fused(self) -> bool:
        return self.query.device.type == "cpu" and self.query[..., 0].numel() * self.keys.shape[2] > HELD

    def softmax(self) -> tuple[Tensor, Tensor]:
        """(output [B, H, Q, E], log-sum-exp [B, H, Q]) over these keys alone; finite and -inf where nothing is seen."""
        return _fused_softmax(self) if self.fused else plain_softmax(self)

    def backward(
        self, gradient: Tensor, normaliser: Tensor, output: Tensor, correction: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of query [B, H, Q, D], keys [B, G, n, D] and values (None where they are the keys': added there).

        Args:
            gradient, output: [B, H, Q, E] of the joint softmax; normaliser: [B, H, Q] its log-sum-exp.
            correction: [B, H, Q], both multiplied and summed over E: of each query sum of weight x its gradient.
        """
        if self.fused:
            query, keys, values = _fused_backward(self, gradient, normaliser, output)
        else:
            query, keys, values = plain_backward(self, gradient, normaliser, correction)
        if self.values is None and values is not None:
            keys[..., : self.width] += values
            values = None
        return query, keys, values

    def logits(self) -> Tensor:
        """[B G, Q R, n] fp32, -inf where unseen, to be changed in place."""
        query, keys = by_group(self.query, self.keys), self.keys.flatten(0, 1)
        (batch, heads, queries), groups = self.query.shape[:3], self.keys.shape[1]
        if heads == groups and query.device.type == "cpu":
            one = self.mask.shape[:2].numel() == 1
            mask = self.mask[0] if one else self.mask.expand(batch, groups, -1, -1).flatten(0, 1)
            return torch.baddbmm(mask, full(query), full(keys).mT, alpha=self.scale)
        logits = full_product(query, keys.mT)
        by_query = logits.view(batch, groups, queries, heads // groups, keys.shape[1])
        torch.add(self.mask[:, :, :, None], by_query, alpha=self.scale, out=by_query)
        return logits

    def weights(self, normaliser: Tensor) -> Tensor:
        """exp(logits - normaliser) [B, H, Q, n], from what `softmax` has left behind, if it has."""
        if self.kept is None:
            return by_head(self.logits(), self).sub_(normaliser[..., None]).exp_()
        weights, own = (by_head(x, self) for x in self.kept)
        return weights * torch.exp(own - normaliser[..., None])

    def own_values(self) -> Tensor:
        return self.keys[..., : self.width] if self.values is None else self.values


def join(normalisers: list[Tensor], sink: Tensor | None) -> Tensor:
    """Log-sum-exp of several terms [..., H] and the sink [H]."""
    if sink is not None:
        normalisers = [*normalisers, full(sink).expand_as(normalisers[0])]
    return normalisers[0] if len(normalisers) == 1 else torch.stack(normalisers).logsumexp(0)


def plain_softmax(term: Term) -> tuple[Tensor, Tensor]:
    """`Term.softmax` by plain products."""
    normaliser, values = plain_normaliser(term), term.own_values().flatten(0, 1)
    weights, _ = term.kept
    return by_head(full(torch.bmm(weights.to(values.dtype), values)), term), normaliser


def plain_normaliser(term: Term) -> Tensor:
    """The log-sum-exp [B, H, Q] of `Term.softmax`; the weights stay with the term."""
    logits = term.logits()
    if term.may_see_nothing:  # no NaN: such weights come to nothing by their log-sum-exp
        logits.clamp_(min=torch.finfo(logits.dtype).min)
    top = logits.amax(-1, keepdim=True)
    weights = torch.softmax(logits, -1, out=logits)
    # The largest weight is at least 1 / n, so this is exact
    normaliser = top - weights.amax(-1, keepdim=True).log()
    if term.may_see_nothing:
        normaliser.masked_fill_(top == torch.finfo(top.dtype).min, -torch.inf)
    term.kept = weights, normaliser
    return by_head(normaliser, term)[..., 0]


def plain_backward(
    term: Term, gradient: Tensor, normaliser: Tensor, correction: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Term.backward` by plain products; values' gradient is None where the keys' holds it."""
    query, keys = by_group(term.query, term.keys), term.keys.flatten(0, 1)
    values, gradient = term.own_values().flatten(0, 1), by_group(gradient, term.keys)
    normaliser, correction = (by_group(x[..., None], term.keys) for x in (normaliser, correction))
    if term.kept is None:
        weights = term.logits().sub_(normaliser).exp_()
    else:  # of this term alone: the factor that a row lacks goes to its gradient, which is smaller
        weights, own = term.kept
        factor = torch.exp(own - normaliser)
        gradient, correction = gradient * factor, correction * factor
    # Unrounded, since the two may be nearly equal
    change = full_product(gradient, values.mT).sub_(correction).mul_(weights).to(keys.dtype)
    query_gradient = by_head(torch.bmm(change, keys).mul_(term.scale), term)
    of_values = torch.bmm(weights.to(values.dtype).mT, gradient.to(values.dtype))
    if term.values is None and term.width == keys.shape[-1]:
        of_keys = torch.baddbmm(of_values, change.mT, query.to(keys.dtype), alpha=term.scale)
        return query_gradient, of_keys.view(term.keys.shape), None
    of_keys = torch.bmm(change.mT, query.to(keys.dtype)).mul_(term.scale).view(term.keys.shape)
    return query_gradient, of_keys, of_values.view(*term.keys.shape[:3], -1)


def _fused_softmax(term: Term) -> tuple[Tensor, Tensor]:
    output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_kernel_inputs(term), attn_mask=term.mask, scale=term.scale
    )
    if term.may_see_nothing:  # the kernel says 0 (torch 2.13)
        normaliser = normaliser.masked_fill(term.mask.amax(-1) == -torch.inf, -torch.inf)
    return output[..., : term.width], normaliser


def _fused_backward(term: Term, gradient: Tensor, normaliser: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _kernel_inputs(term)
    gradient, output = (_widened(full(x), inputs[0].shape[-1]) for x in (gradient, output))
    query, *others = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, *inputs, output, normaliser, 0.0, False, attn_mask=term.mask, scale=term.scale
    )
    groups = term.keys.shape[1]
    keys, values = (x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2) for x in others)
    width = term.query.shape[-1]
    return query[..., :width], keys[..., :width], values[..., : term.width]


def _kernel_inputs(term: Term) -> list[Tensor]:
    """Query, keys and values as the kernel wants them: a key head for each head, one width for all."""
    values = term.keys if term.values is None else term.values
    heads, width = term.query.shape[1], max(term.keys.shape[-1], values.shape[-1])
    inputs = [_widened(full(x), width) for x in (term.query, term.keys, values)]
    # A view where there is one key-value head
    return [x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2) for x in inputs]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _fused_flops(query, keys, values, *_, **__) -> int:  # shapes: what torch's FlopCounterMode has no formula for
    return 2 * math.prod(query[:3]) * keys[2] * (query[3] + values[3])


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _fused_backward_flops(gradient, query, keys, values, *_, **__) -> int:
    return 2 * math.prod(query[:3]) * keys[2] * (3 * query[3] + 2 * values[3])


def by_group(x: Tensor, keys: Tensor) -> Tensor:
    """[B, H, Q, .] as [B G, Q R, .], where R = H / G heads share the keys [B, G, n, .].

    No copy where x is [B, Q, H, .] transposed and all heads share one, or each has its own and x is contiguous.
    """
    return x.unflatten(1, (keys.shape[1], -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def by_head(x: Tensor, term: Term) -> Tensor:
    """The inverse of `by_group` for what is of the term's queries."""
    (batch, heads, queries), groups = term.query.shape[:3], term.keys.shape[1]
    return x.view(batch, groups, queries, heads // groups, x.shape[-1]).transpose(2, 3).flatten(1, 2)
