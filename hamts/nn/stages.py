"""What a layer makes of its tokens before its two branches.

B items · C channels · N patches · D width · H heads · K key (= V value) · G width of a head's state · W window patches
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Inputs", "Products"]


@dataclass(frozen=True)
class Products:
    """A chunk's tokens, and what the layer's maps make of them."""

    narrow: torch.Tensor  # [B, C, N, D] in what products run in
    gates: torch.Tensor  # [B, C, N, 4 H] in full precision
    mixed: torch.Tensor  # [B, C, N, 3 D or 3 H G + 2 D] queries, keys and values of both branches' memory
    queries: torch.Tensor  # [B, C, N, D] of the read
    opened: torch.Tensor  # [B, C, N, D] of the output gate
    begun: list[torch.Tensor] | None = None  # [B, C, N, hidden] what the router's learners make of it first


@dataclass(frozen=True)
class Inputs:
    """What both branches take of a chunk's projections."""

    # of the recurrence: convolved queries and keys of length 1, values
    q: torch.Tensor  # [B C, N, H, G]
    k: torch.Tensor  # [B C, N, H, G]
    v: torch.Tensor  # [B C, N, H, G]
    # of the read: keys, normed and turned, and values, of the window and the chunk
    keys: torch.Tensor  # [B, W + N, C, H, K]
    values: torch.Tensor  # [B, W + N, C, H, K]
    tail: torch.Tensor  # [B, C, taps - 1, 3 H G] to carry on
