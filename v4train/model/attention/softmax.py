"""One term of a joint softmax: values and log-sum-exp over one set of keys, to be joined with other terms.

With the output and log-sum-exp of the whole joint softmax, the backward pass of each term stands alone, and computes
its weights again. On the CPU both ways are torch's own fused kernel; elsewhere plain products.

Shapes: B batch, H heads, G key-value heads (H a multiple; head h reads h // (H / G)), Q queries, n keys, D key width,
E value width. fp32 throughout, fp64 for fp64 inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from v4train.model.precision import full

FEW_ROWS = 16  # queries x heads of a small product, where batched products beat the fused kernel


@dataclass
class Term:
    """What a set of queries looks at."""

    query: Tensor  # [B, H, Q, D]
    keys: Tensor  # [B, G, n, D]
    values: Tensor | None  # [B, G, n, E]; None: the keys are values too
    mask: Tensor | None  # [B, 1, Q, n] added to the logits, -inf where unseen
    scale: float  # of the logits

    @property
    def fused(self) -> bool:
        return self.query.device.type == "cpu" and self.query.shape[2] * self.query.shape[1] > FEW_ROWS

    def softmax(self) -> tuple[Tensor, Tensor]:
        """(output [B, H, Q, E], log-sum-exp [B, H, Q]) over these keys alone; 0 and -inf where nothing is seen."""
        return _fused_softmax(self) if self.fused else plain_softmax(self)

    def backward(self, gradient: Tensor, output: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of query [B, H, Q, D], keys [B, G, n, D] and values (None where they are the keys, added there).

        Args:
            gradient, output: [B, H, Q, E] of the joint softmax; normaliser: [B, H, Q] its log-sum-exp.
        """
        arguments = (self, gradient, output, normaliser)
        query, keys, values = (_fused_backward if self.fused else plain_backward)(*arguments)
        return (query, keys + values, None) if self.values is None else (query, keys, values)

    def logits(self) -> Tensor:
        """[B, H, Q, n] fp32, -inf where unseen."""
        products = torch.matmul(_by_group(self.query * self.scale, self.keys), self.keys.mT)
        logits = full(products).view(*self.query.shape[:3], -1)
        return logits if self.mask is None else logits + self.mask

    def values_or_keys(self) -> Tensor:
        return self.keys if self.values is None else self.values


def join(normalisers: list[Tensor], sink: Tensor | None) -> Tensor:
    """Log-sum-exp of several terms [..., H] and the sink [H]."""
    if sink is not None:
        normalisers = [*normalisers, full(sink).expand_as(normalisers[0])]
    return normalisers[0] if len(normalisers) == 1 else torch.stack(normalisers).logsumexp(0)


def plain_softmax(term: Term) -> tuple[Tensor, Tensor]:
    """`Term.softmax` by plain products."""
    logits, values = term.logits(), term.values_or_keys()
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    output = full(torch.matmul(_by_group(weights.to(values.dtype), values), values)).view(*weights.shape[:3], -1)
    return output / total.clamp(min=torch.finfo(total.dtype).tiny), (top + total.log())[..., 0]


def plain_backward(term: Term, gradient: Tensor, output: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Term.backward` by plain products; keys and values apart."""
    keys, values, shape = term.keys, term.values_or_keys(), term.query.shape
    weights = (term.logits() - normaliser[..., None]).exp_()
    gradient = full(gradient)
    correction = (gradient * full(output)).sum(-1, keepdim=True)  # sum over keys of weight * its gradient
    gradient = _by_group(gradient.to(values.dtype), values)
    change = full(torch.matmul(gradient, values.mT)).view_as(weights)
    change = ((change - correction) * weights).mul_(term.scale)
    change, weights = (_by_group(x.to(keys.dtype), keys) for x in (change, weights))
    query_gradient = torch.matmul(change, keys).view(shape)
    key_gradient = torch.matmul(change.mT, _by_group(term.query, keys).to(keys.dtype))
    return query_gradient, key_gradient, torch.matmul(weights.mT, gradient)


def _fused_softmax(term: Term) -> tuple[Tensor, Tensor]:
    query, keys, values, mask, width = _padded(term)
    output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, attn_mask=mask, scale=term.scale
    )
    return output[..., :width], normaliser


def _fused_backward(term: Term, gradient: Tensor, output: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, keys, values, mask, width = _padded(term)
    padding = (0, values.shape[-1] - width)
    gradient, output = (
        torch.nn.functional.pad(full(x), padding) if padding[1] else full(x) for x in (gradient, output)
    )
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, keys, values, output, normaliser, 0.0, False, attn_mask=mask, scale=term.scale
    )
    groups = term.keys.shape[1]
    key_gradient, value_gradient = (x.unflatten(1, (groups, -1)).sum(2) for x in gradients[1:])
    return (
        gradients[0][..., : term.query.shape[-1]],
        key_gradient[..., : term.keys.shape[-1]],
        value_gradient[..., :width],
    )


def _padded(term: Term) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """Inputs as the kernel wants them: a key head for each head, one width for keys and values; and the values' own."""
    values = term.values_or_keys()
    inputs, heads, width = (
        [term.query, term.keys, values],
        term.query.shape[1],
        max(term.keys.shape[-1], values.shape[-1]),
    )
    for position, x in enumerate(inputs):
        x = full(x)
        if x.shape[-1] < width:
            x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        if x.shape[1] < heads:  # a view where there is one key-value head
            x = x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)
        inputs[position] = x
    return *inputs, term.mask, values.shape[-1]


def _by_group(x: Tensor, keys: Tensor) -> Tensor:
    """[B, H, Q, .] as [B, G, R*Q, .], where R = H / G heads share the keys [B, G, n, .]."""
    return x.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
