"""What the ops take and give back.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["Attended", "GatedDelta", "ScratchKeys", "UnreadDelta", "compute_dtype"]


@dataclass(frozen=True)
class GatedDelta:
    """Result of the gated delta rule. ``state`` stays in the dtype of the recurrence, float32 or float64."""

    output: torch.Tensor  # [B, N, H, V]
    prediction: torch.Tensor  # [B, N, H, V]
    error: torch.Tensor  # [B, N, H, V]
    state: torch.Tensor  # [B, H, K, V]

    def over(self, items: int, channels: int) -> GatedDelta:
        """The same of B = items x channels streams, [items, channels, ...]."""
        grid = (items, channels)
        return GatedDelta(*(x.unflatten(0, grid) for x in (self.output, self.prediction, self.error, self.state)))


class UnreadDelta(GatedDelta):
    """A ``GatedDelta`` whose error and prediction are worked out when they are first read, without a gradient.

    ``written`` is what went into the state, [B, N, H, V], the write gate ``beta`` [B, N, H] times the error.
    """

    values: torch.Tensor
    written: torch.Tensor
    beta: torch.Tensor

    def __init__(
        self, output: torch.Tensor, state: torch.Tensor, values: torch.Tensor, written: torch.Tensor, beta: torch.Tensor
    ) -> None:
        self.__dict__.update(output=output, state=state, values=values, written=written, beta=beta)

    def __getattr__(self, name: str) -> Any:
        known = self.__dict__
        if name == "error":
            kind = known["values"].dtype
            known[name] = torch.div(known["written"], known["beta"][..., None]).to(kind)  # [B, N, H, V]
        elif name == "prediction":
            known[name] = known["values"].detach() - self.error  # [B, N, H, V]
        else:
            raise AttributeError(name)
        return known[name]

    def over(self, items: int, channels: int) -> GatedDelta:
        tensors = (self.__dict__[name] for name in ("output", "state", "values", "written", "beta"))
        return UnreadDelta(*(x.unflatten(0, (items, channels)) for x in tensors))


@dataclass(frozen=True)
class ScratchKeys:
    """Scratchpad entries of every item, compacted and padded to the same M.

    Entries are sorted by ``visible_from`` within each item; padding rows have a ``visible_from`` beyond every query,
    finite keys and values, and any valid channel.

    Attributes:
        channel: channel each entry came from, int64.
        bias: added to the logits of the entry, for all heads alike or for each.
        visible_from: first query (index in this chunk) that sees the entry, int64; 0 or less: from the start.
        visible_until: first query that no longer sees it, int64.
        marks: what ``Attended.marks`` averages.
        rows: where entries lie in a pool that all items share: keys, values and marks are then its rows, [P, ...].
    """

    keys: torch.Tensor  # [B, M, H, K]
    values: torch.Tensor  # [B, M, H, V]
    channel: torch.Tensor  # [B, M]
    bias: torch.Tensor  # [B, M] or [B, M, H]
    visible_from: torch.Tensor  # [B, M]
    visible_until: torch.Tensor  # [B, M]
    marks: torch.Tensor | None = None  # [B, M, R]
    rows: torch.Tensor | None = None  # [B, M] int64

    def side_by_side(self) -> ScratchKeys:
        """The same entries out of the pool, [B, M, ...]; as they are where there is none."""
        if self.rows is None:
            return self
        marks = None if self.marks is None else self.marks[self.rows]  # [B, M, R]
        return replace(self, keys=self.keys[self.rows], values=self.values[self.rows], marks=marks, rows=None)


@dataclass(frozen=True)
class Attended:
    """Result of the read. ``scratch_mass`` and ``local_mass`` carry no gradient.

    Attributes:
        marks: sum of probability times marks over keys of the query's own channel.
        scratch_mass: probability each entry received, summed over queries and heads; None without a scratchpad.
        local_mass: the same for the window patches and the chunk's own.
    """

    output: torch.Tensor  # [B, N, C, H, V]
    marks: torch.Tensor | None  # [B, N, C, H, R]
    scratch_mass: torch.Tensor | None  # [B, M]
    local_mass: torch.Tensor  # [B, W+N, C]


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
