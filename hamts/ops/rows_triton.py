"""Rows taken by number in one pass over memory: what has no row is zero, and is not read.

B items · J rows · M places · R numbers of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["take_rows"]

# numbers of a program, and most of one row that it takes at once
TILE, WIDEST = 4096, 1024
VARYING = ("n_rows", "n_places", "n_all")


def take_rows(rows: torch.Tensor, index: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Row numbers [B, M] of rows [B, J, ...] -> [B, M, ...]; zero where ``there``, [B, M] bool, says so."""
    (B, J), M = rows.shape[:2], index.shape[1]
    width = rows.shape[2:].numel()
    taken = rows.new_empty(B, M, *rows.shape[2:])
    if taken.numel() == 0:
        return taken
    BW = min(WIDEST, triton.next_power_of_2(width))
    BM = max(1, TILE // BW)
    rows_kernel[(triton.cdiv(B * M, BM), triton.cdiv(width, BW))](
        rows.contiguous(), index.contiguous(), there.contiguous().view(torch.uint8), taken, J, M, B * M, R=width, BW=BW,
        BM=BM,
    )  # fmt: skip
    return taken


@triton.jit(do_not_specialize=VARYING)
def rows_kernel(
    rows_ptr, index_ptr, there_ptr, out_ptr, n_rows, n_places, n_all, R: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = place < n_all
    there = tl.load(there_ptr + place, mask=inside, other=0) != 0
    source = tl.load(index_ptr + place, mask=there, other=0) + place // n_places * n_rows
    good = (column < R)[None, :]
    row = tl.load(rows_ptr + source[:, None] * R + column[None, :], mask=there[:, None] & good, other=0.0)
    tl.store(out_ptr + place[:, None] * R + column[None, :], row, mask=inside[:, None] & good)
