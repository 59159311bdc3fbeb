"""Close the gaps between kept tokens: a prefix sum and one scatter, no sort, no wait for the device.

B items · J candidates · M capacity
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Compacted", "bucket", "compact"]

# capacities are multiples of it, so that tiles of a kernel fill
STEP = 128


@dataclass(frozen=True)
class Compacted:
    """Where each slot of the compacted rows comes from.

    Attributes:
        source: index of the candidate in each slot, 0 for empty slots, int64.
        filled: bool.
        count: kept candidates of each item, beyond the capacity too, int64.
    """

    source: torch.Tensor  # [B, M]
    filled: torch.Tensor  # [B, M]
    count: torch.Tensor  # [B]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Candidates [B, J, ...] -> compacted rows [B, M, ...]; empty slots hold 0. The gradient scatters back."""
        index = self.source.reshape(*self.source.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        filled = self.filled.reshape(index.shape[:2] + (1,) * (x.dim() - 2))
        return torch.where(filled, x.gather(1, index), torch.zeros((), dtype=x.dtype, device=x.device))


def bucket(count: int) -> int:
    """The next capacity of a short list: powers of the square root of 2, as multiples of 128.

    A buffer of such a size is at most 41 % (below 1,024: 127 rows) too large, and a growing count meets few sizes.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more. Got {count}.")
    if count <= STEP:
        return STEP if count else 0
    size = 2.0 ** (math.ceil(2 * math.log2(count) - 1e-9) / 2)
    return math.ceil(round(size, 6) / STEP) * STEP


def compact(kept: torch.Tensor, capacity: int) -> Compacted:
    """Give every kept candidate its slot, in order; those beyond the capacity have none.

    Args:
        kept: bool [B, J].
        capacity: M, slots of each item, the same for all; known before the device is, so that nothing waits for it.
    """
    if capacity < 0:
        raise ValueError(f"capacity must be 0 or more. Got {capacity}.")
    slot = kept.cumsum(1) - 1  # [B, J]
    # one column too many takes the writes of candidates that are dropped
    slot = torch.where(kept & (slot < capacity), slot, capacity)  # [B, J]
    candidate = torch.arange(kept.shape[1], device=kept.device).expand_as(slot)  # [B, J]
    source = torch.zeros(kept.shape[0], capacity + 1, dtype=torch.int64, device=kept.device)  # [B, M + 1]
    source.scatter_(1, slot, candidate)
    count = kept.sum(1)  # [B]
    filled = torch.arange(capacity, device=kept.device) < count[:, None]  # [B, M]
    return Compacted(source[:, :capacity], filled, count)
