"""How sharply the read asks, by how much there is to read: a softmax over more keys needs logits further apart.

Source: scalable softmax, Nakanishi, arXiv 2501.19399: logits times the logarithm of the number of keys, which keeps the
probability of a key that matches from sinking as others are added. Scaling queries does the same to their products,
whatever runs the read; biases of keys stay as they are.

B items · C channels · N patches · M entries · H heads · K key
"""

from __future__ import annotations

import math

import torch

from hamts.ops.types import ScratchKeys

__all__ = ["readable_keys", "sharpened"]


def readable_keys(scratch: ScratchKeys, readable: torch.Tensor, patches: int) -> torch.Tensor:
    """Entries that every query may read, [B, N, C].

    Args:
        readable: may the query's channel (row) read the key's (column)? The own one always, [B or 1, C, C].
        patches: N.
    """
    B, C = scratch.channel.shape[0], readable.shape[-1]
    own = torch.eye(C, dtype=torch.bool, device=readable.device)  # [C, C]
    # one where an entry comes into sight, minus one where it goes; those that never come have no room here
    begin, end = scratch.visible_from.clamp(0, patches), scratch.visible_until.clamp(0, patches)  # 2 x [B, M]
    end = torch.maximum(begin, end)
    change = torch.zeros(B, (patches + 1) * C, device=readable.device)  # [B, (N + 1) C]
    one = torch.ones_like(begin, dtype=change.dtype)  # [B, M]
    change.scatter_add_(1, begin * C + scratch.channel, one)
    change.scatter_add_(1, end * C + scratch.channel, -one)
    there = change.view(B, patches + 1, C).cumsum(1)[:, :patches]  # [B, N, C]
    # not as a product of matrices, which mixed precision would round
    return (there[:, :, None] * (readable | own)[:, None]).sum(-1)  # [B, N, C]


def sharpened(
    queries: torch.Tensor, scratch: ScratchKeys, readable: torch.Tensor, *, window: int, cross_span: int, reference: int
) -> torch.Tensor:
    """Queries [B, N, C, H, K] times log(keys) / log(reference), of the keys that each may read, where they are more.

    Short lists are read as they would be without: logits below those would only take longer to learn a match.

    Args:
        window, cross_span: patches of the own channel and of each other one, that count as there from the start.
        reference: number of keys up to which queries stay as they are; 0: they always do.
    """
    if not reference:
        return queries
    local = window + cross_span * (queries.shape[2] - 1)
    keys = readable_keys(scratch, readable, queries.shape[1]) + local  # [B, N, C]
    scale = (keys.log() / math.log(reference)).clamp_min(1.0)  # [B, N, C]
    return queries * scale.to(queries.dtype)[..., None, None]
