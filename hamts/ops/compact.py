"""Close the gaps between kept tokens, or append them in place: prefix sums and scatters, no sort, no wait.

B items · J candidates · M capacity
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Compacted", "append_", "bucket", "compact", "recorded_length"]

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

    A buffer of such a size is at most 41 % (below 1,024: 127 rows) too large, and a growing count meets few sizes. The
    bucket of such a size is itself.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more. Got {count}.")
    if count <= STEP:
        return STEP if count else 0
    power = math.ceil(2 * math.log2(count) - 1e-9)
    # the power below, made a whole multiple, may be large enough
    below, size = (math.ceil(round(2.0 ** (half / 2), 6) / STEP) * STEP for half in (power - 1, power))
    return below if below >= count else size


def recorded_length(entries: int) -> int:
    """The length to which a recorded step pads a list. What reads lists cuts them by it, launched or recorded, so that
    both add up the same parts."""
    return bucket(max(1, entries))


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


def append_(
    buffers: dict[str, torch.Tensor], rows: dict[str, torch.Tensor], accepted: torch.Tensor, count: torch.Tensor
) -> None:
    """Write accepted rows behind the ones a buffer holds, in order, and raise the count; a CUDA graph can hold it.

    Rows that are not accepted are written too, behind the accepted, where the count says that nothing is: so no slot
    is written twice, and no row is left out by a mask.

    Args:
        buffers: [B, M, ...] each; M must be at least the largest count + J, which the host knows a bound of: what it
            saw last, and J for every step since.
        rows: under the same names, [B, J, ...].
        accepted: bool [B, J].
        count: rows that each buffer holds, int64 [B]; raised in place.
    """
    if set(buffers) != set(rows):
        raise ValueError(f"rows must have the names of buffers, {sorted(buffers)}. Got {sorted(rows)}.")
    added = accepted.sum(1, keepdim=True)  # [B, 1]
    place = torch.where(accepted, accepted.cumsum(1) - 1, added + (~accepted).cumsum(1) - 1)  # [B, J]
    slot = count[:, None] + place  # [B, J]
    item = torch.arange(len(count), device=count.device)[:, None]  # [B, 1]
    for name, buffer in buffers.items():
        buffer[item, slot] = rows[name].to(buffer.dtype)
    count += added[:, 0]
