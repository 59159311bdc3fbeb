"""Closing the gaps between rows that are alive: a prefix sum and a scatter of row numbers, then one gather per tensor.

B items · J rows · M rows that are left
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hamts.ops.compact import bucket, compact

__all__ = ["ROOM_WITHOUT_ASKING", "RowMove", "pays_to_ask", "rows_for"]

WORD = 8
# lists of so many rows are given all their room, whoever reads them
ROOM_WITHOUT_ASKING = 8192


def rows_for(alive: torch.Tensor, most: int | None = None, *, skips_padding: bool = False) -> int:
    """Rows that hold all that are alive in any item: their largest number, or a bound where that must be waited for.

    On a GPU asking stops it for as long as the host takes to go on. Where the read skips padding every list gets the
    room that it may ever need instead: one row for each candidate, or the budget's cap where that is less. What chunks
    carry from one to the next is cut later, see ``hamts.rollout_room``. A read that computes with padding asks once for
    a list of more than 8,192 rows, and gives it one of few sizes.

    Args:
        alive: bool [B, J].
        most: more than so many are never alive in an item; None: all may be.
        skips_padding: whether the read passes over padding, as kernels do, instead of computing with it.
    """
    size = alive.shape[1]
    most = size if most is None else min(most, size)
    if not size:
        return 0
    if not alive.is_cuda:
        return min(int(alive.sum(dim=1).max()), most)
    if not pays_to_ask(most, recorded=torch.cuda.is_current_stream_capturing(), skips_padding=skips_padding):
        return most
    return min(bucket(int(alive.sum(dim=1).max())), most)


def pays_to_ask(most: int, *, recorded: bool, skips_padding: bool) -> bool:
    """Whether a GPU is asked how many of at most ``most`` rows are alive, instead of giving room for all of them."""
    # a graph cannot wait
    return not recorded and not skips_padding and most > ROOM_WITHOUT_ASKING


@dataclass(frozen=True)
class RowMove:
    """Which row comes where."""

    source: torch.Tensor  # [B, M] int64: the row that fills each place; any row where none does
    filled: torch.Tensor  # [B, M] bool
    place: torch.Tensor  # [B, J] int64: the place of each row; any where it has none
    kept: torch.Tensor  # [B, J] bool
    fused: bool = False  # wide rows move by a kernel: one pass instead of two or three, for the same numbers

    @staticmethod
    def closing(alive: torch.Tensor, rows: int, *, fused: bool = False) -> RowMove:
        """Rows that are alive, [B, J], in their order and without gaps; those beyond ``rows`` are left out."""
        if fused:
            from hamts.ops.layer_triton_rows import close_rows

            return RowMove(*close_rows(alive, rows), fused)
        packed = compact(alive, rows)
        place = alive.cumsum(1) - 1  # [B, J]
        kept = alive & (place < rows)  # [B, J]
        return RowMove(packed.source, packed.filled, place.clamp(0, max(rows - 1, 0)), kept, fused)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, J, ...] -> [B, M, ...]; padding holds some row of the item, or nothing."""
        if not rows.requires_grad:
            return _take(rows, self.source, self.filled, fused=self.fused)
        moved: torch.Tensor = _MoveRows.apply(rows, self.source, self.filled, self.place, self.kept, self.fused)
        return moved

    def shared(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows themselves, for another reader, and as ``__call__`` moves them; by kernels only.

        Gradients of both readers then meet in one pass over the rows that moved.
        """
        same, moved = _ShareRows.apply(rows, self.source, self.filled, self.place, self.kept)
        return same, moved


def _take(
    rows: torch.Tensor, index: torch.Tensor, there: torch.Tensor, *, fused: bool, clear: bool = False
) -> torch.Tensor:
    """Row numbers [B, M] of rows [B, J, ...] -> [B, M, ...]; where nothing is to be, any row, or with ``clear`` 0."""
    if fused and rows.dim() > 2:
        from hamts.ops.layer_triton_rows import take_rows

        return take_rows(rows, index, there)
    if rows.is_cuda and _of_words(rows):
        # four numbers of two bytes at once
        taken = _gathered(rows.view(torch.int64), index).view(rows.dtype)
    else:
        taken = _gathered(rows, index)
    return torch.where(there.reshape(*there.shape, *(1,) * (rows.dim() - 2)), taken, 0.0) if clear else taken


def _of_words(rows: torch.Tensor) -> bool:
    """Whether narrow numbers can be read as whole words."""
    # a tensor of nothing may have any strides
    whole = rows.numel() > 0 and rows.shape[-1] * rows.element_size() % WORD == 0
    return rows.dim() > 2 and rows.element_size() < WORD and whole and rows.is_contiguous()


def _gathered(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    index = index.reshape(*index.shape, *(1,) * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)


class _MoveRows(torch.autograd.Function):
    """A gather whose gradient is a gather too: every row has one place at most, so nothing is added up."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: torch.Tensor,
        source: torch.Tensor,
        filled: torch.Tensor,
        place: torch.Tensor,
        kept: torch.Tensor,
        fused: bool,
    ) -> torch.Tensor:
        return _take(rows, source, filled, fused=fused)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[3:5])
        ctx.fused = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        place, kept = ctx.saved_tensors
        if grad.shape[1] == 0:
            return grad.new_zeros(*kept.shape, *grad.shape[2:]), None, None, None, None, None
        return _take(grad, place, kept, fused=ctx.fused, clear=True), None, None, None, None, None


class _ShareRows(torch.autograd.Function):
    """Rows as they are, and moved: the gradient of what moved is added to that of what stayed, where it lies."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        source: torch.Tensor,
        filled: torch.Tensor,
        place: torch.Tensor,
        kept: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(source, filled, place, kept)
        ctx.set_materialize_grads(False)
        return rows.view_as(rows), _take(rows, source, filled, fused=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, stayed: torch.Tensor | None, moved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        from hamts.ops.layer_triton_rows import add_rows_

        source, filled, place, kept = ctx.saved_tensors
        if moved is None or moved.shape[1] == 0:
            return stayed, None, None, None, None
        if stayed is None:
            return _take(moved, place, kept, fused=True, clear=True), None, None, None, None
        # the read made this gradient for these rows alone, so nobody else looks at it
        return add_rows_(stayed.contiguous(), moved, source, filled), None, None, None, None
