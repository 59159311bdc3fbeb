"""Attention over many entries whose softmax is shared with a few logits computed elsewhere.

B items · H heads · T queries (patches x channels) · K key · V value · M entries · J other logits
b items and m entries of one group
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["JointSoftmax"]

# logits in the buffer at once: on a CPU they should stay in its second-level cache, elsewhere few groups are best, but
# a gradient holds four such buffers
GROUP_LOGITS_CPU = 1 << 18
GROUP_LOGITS = 1 << 27


class JointSoftmax(torch.autograd.Function):
    """Attention over entries whose softmax is shared with logits computed elsewhere.

    Takes queries [B, H, T, K], keys [B, H, M, K], values [B, H, M, V], the other logits [B, H, T, J], -inf where
    hidden, which entries are hidden, [B, T, M], and how many entries each item has. Every query must see a key.
    Gives the entries' part of the output [B, H, T, V], the probabilities of the other logits [B, H, T, J] and those of
    the entries summed over queries and heads [B, M].

    Written out so that the probabilities live in one buffer small enough for the cache, a few items at a time, and
    are computed again for the gradient instead of being kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        other: torch.Tensor,
        hidden: torch.Tensor,
        counts: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = q.new_empty(*q.shape[:3], v.shape[-1])  # [B, H, T, V]
        weight_other = torch.empty_like(other)  # [B, H, T, J]
        mass = q.new_zeros(k.shape[0], k.shape[2])  # [B, M]
        n_other = other.shape[-1]
        for items, m in _groups(counts, q, n_other):
            keys, values = _padded(k, items, m, n_other), _padded(v, items, m, n_other)  # [b, H, J+m, K]
            weight = _weights(q, keys, other, hidden, items)  # [b, H, T, J+m]
            output[items] = weight @ values
            weight_other[items] = weight[..., :n_other]
            mass[items, :m] = weight[..., n_other:].sum((1, 2))
        ctx.save_for_backward(q, k, v, other, hidden, output, weight_other)
        ctx.counts = counts
        ctx.mark_non_differentiable(mass)
        return output, weight_other, mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor, grad_other: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, other, hidden, output, weight_other = ctx.saved_tensors
        grad_q, grad_logits = torch.empty_like(q), torch.empty_like(other)  # [B, H, T, K], [B, H, T, J]
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)  # [B, H, M, K], [B, H, M, V]
        n_other = other.shape[-1]
        for items, m in _groups(ctx.counts, q, n_other):
            keys, values = _padded(k, items, m, n_other), _padded(v, items, m, n_other)  # [b, H, J+m, K]
            weight = _weights(q, keys, other, hidden, items)  # [b, H, T, J+m]
            through = (output[items] * grad_output[items]).sum(-1, keepdim=True)  # [b, H, T, 1]
            through += (weight_other[items] * grad_other[items]).sum(-1, keepdim=True)
            grad = grad_output[items] @ values.mT  # [b, H, T, J+m]
            grad[..., :n_other] += grad_other[items]
            grad.sub_(through).mul_(weight)
            grad_q[items] = grad @ keys
            grad_k[items, :, :m] = (grad.mT @ q[items])[:, :, n_other:]
            grad_v[items, :, :m] = (weight.mT @ grad_output[items])[:, :, n_other:]
            grad_logits[items] = grad[..., :n_other]
        return grad_q, grad_k, grad_v, grad_logits, None, None


def _groups(counts: list[int], q: torch.Tensor, n_other: int) -> list[tuple[slice, int]]:
    """Runs of items whose logits fit the buffer, each with its largest number of entries."""
    limit = GROUP_LOGITS_CPU if q.device.type == "cpu" else GROUP_LOGITS
    room = limit // (q.shape[1] * q.shape[2])
    groups, first = [], 0
    while first < len(counts):
        last, most = first + 1, counts[first]
        while last < len(counts) and (last + 1 - first) * (max(most, counts[last]) + n_other) <= room:
            most, last = max(most, counts[last]), last + 1
        groups.append((slice(first, last), most))
        first = last
    return groups


def _padded(x: torch.Tensor, items: slice, m: int, n_other: int) -> torch.Tensor:
    """Entries of some items behind rows of zeros, room for the other logits, so that nothing is copied to join them."""
    return torch.nn.functional.pad(x[items, :, :m], (0, 0, n_other, 0))  # [b, H, J+m, K]


def _weights(
    q: torch.Tensor, keys: torch.Tensor, other: torch.Tensor, hidden: torch.Tensor, items: slice
) -> torch.Tensor:
    """Probabilities of the other keys, then of the entries, [b, H, T, J+m]."""
    n_other = other.shape[-1]
    m = keys.shape[2] - n_other
    logits = q[items] @ keys.mT  # [b, H, T, J+m]
    logits[..., :n_other] = other[items]
    # adding -inf hides as surely as a fill, and runs over all heads four times faster
    barrier = torch.zeros(hidden[items].shape[:2] + (n_other + m,), dtype=q.dtype, device=q.device)  # [b, T, J+m]
    barrier[..., n_other:].masked_fill_(hidden[items, :, :m], -torch.inf)
    return torch.softmax(logits.add_(barrier[:, None]), -1)
