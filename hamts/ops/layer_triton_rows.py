"""What moves entries about, each in one or two passes: which row comes where, when it leaves, and the rows themselves.

As operations of PyTorch these are dozens of launches on lists of a few thousand numbers, which take longer than they
run. A program goes through the list of one item.

B items · J rows · M places · R numbers of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_rows_", "close_rows", "end_rows", "take_rows"]

# numbers of a program, and most of one row that it takes at once
TILE, WIDEST = 4096, 1024
VARYING = ("n_rows", "n_places", "n_all")
# rows that a program takes at once, at most
STRIDE = 4096
NEVER: tl.constexpr = tl.constexpr(2**40)


def close_rows(alive: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where rows that are alive, [B, J] bool, come when gaps are closed: see ``hamts.nn.rows.RowMove``.

    Returns:
        source [B, M] int64 and filled [B, M] bool; place [B, J] int64 and kept [B, J] bool.
    """
    B, J = alive.shape
    source = torch.empty(B, places, dtype=torch.int64, device=alive.device)
    filled = torch.empty(B, places, dtype=torch.bool, device=alive.device)
    place, kept = torch.empty(B, J, dtype=torch.int64, device=alive.device), torch.empty_like(alive)
    flags = (x.view(torch.uint8) for x in (alive.contiguous(), filled, kept))
    closing_kernel[(B,)](next(flags), source, next(flags), place, next(flags), J, places, **_stride(max(J, places)))
    return source, filled, place, kept


def end_rows(
    must_keep: torch.Tensor, alive: torch.Tensor, appears: torch.Tensor, *, cap_kept: int | None, cap_must: int | None
) -> torch.Tensor:
    """When entries leave two lists of the newest: the twin of ``hamts.nn.scratchpad.lifetimes``, [B, M] int64.

    must_keep and alive [B, M] bool; appears [B, M] int64: first query that sees the entry.
    """
    B, M = alive.shape
    until = torch.empty(B, M, dtype=torch.int64, device=alive.device)
    if M == 0:
        return until
    rank = torch.empty(B, M, dtype=torch.int32, device=alive.device)
    order, count = appears.new_empty(B, 2, M), torch.empty(B, 2, dtype=torch.int32, device=alive.device)
    lists = must_keep.contiguous().view(torch.uint8), alive.contiguous().view(torch.uint8)
    rank_kernel[(B, 2)](*lists, appears.contiguous(), rank, order, count, M, **_stride(M))
    caps = [-1 if cap is None else cap for cap in (cap_kept, cap_must)]
    stride = _stride(M)
    end_kernel[(B, triton.cdiv(M, stride["BJ"]))](*lists, rank, order, count, until, M, *caps, **stride)
    return until


def _stride(rows: int) -> dict[str, int]:
    """Rows that a program takes at once, and its warps: the steps of a long list follow one another."""
    stride = min(STRIDE, max(128, triton.next_power_of_2(rows)))
    return {"BJ": stride, "num_warps": 8 if stride > STRIDE // 4 else 4}


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


def add_rows_(sums: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Rows [B, M, ...] added in place to those of ``sums``, [B, J, ...], that ``take_rows`` took them from."""
    (B, M), width = rows.shape[:2], rows.shape[2:].numel()
    if rows.numel():
        BW = min(WIDEST, triton.next_power_of_2(width))
        BM = max(1, TILE // BW)
        add_kernel[(triton.cdiv(B * M, BM), triton.cdiv(width, BW))](
            rows.contiguous(), index.contiguous(), there.contiguous().view(torch.uint8), sums, sums.shape[1], M, B * M,
            R=width, BW=BW, BM=BM,
        )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=VARYING)
def add_kernel(
    rows_ptr, index_ptr, there_ptr, sums_ptr, n_rows, n_places, n_all, R: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    there = tl.load(there_ptr + place, mask=place < n_all, other=0) != 0
    target = tl.load(index_ptr + place, mask=there, other=0) + place // n_places * n_rows
    use = there[:, None] & (column < R)[None, :]
    row = tl.load(rows_ptr + place[:, None] * R + column[None, :], mask=use, other=0.0)
    target = sums_ptr + target[:, None] * R + column[None, :]
    tl.store(target, tl.load(target, mask=use, other=0.0) + row, mask=use)


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


@triton.jit(do_not_specialize=("n_rows", "n_places"))
def closing_kernel(alive_ptr, source_ptr, filled_ptr, place_ptr, kept_ptr, n_rows, n_places, BJ: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    before = tl.zeros([], tl.int32)
    for start in tl.range(0, n_rows, BJ):
        row = start + tl.arange(0, BJ)
        inside = row < n_rows
        alive = tl.load(alive_ptr + item * n_rows + row, mask=inside, other=0).to(tl.int32)
        place = before + tl.cumsum(alive, 0) - 1
        kept = (alive != 0) & (place < n_places)
        tl.store(kept_ptr + item * n_rows + row, kept.to(tl.uint8), mask=inside)
        bounded = tl.maximum(tl.minimum(place, n_places - 1), 0)
        tl.store(place_ptr + item * n_rows + row, bounded.to(tl.int64), mask=inside)
        tl.store(source_ptr + item * n_places + place, row.to(tl.int64), mask=kept)
        before += tl.sum(alive, 0)
    for start in tl.range(0, n_places, BJ):
        place = start + tl.arange(0, BJ)
        filled = place < before
        tl.store(filled_ptr + item * n_places + place, filled.to(tl.uint8), mask=place < n_places)
        empty = (place < n_places) & (place >= before)
        tl.store(source_ptr + item * n_places + place, tl.zeros([BJ], tl.int64), mask=empty)


@triton.jit(do_not_specialize=("n_rows",))
def rank_kernel(must_ptr, alive_ptr, appears_ptr, rank_ptr, order_ptr, count_ptr, n_rows, BJ: tl.constexpr):
    """Ranks on the list kept by score (0) and on the must-keep list (1), and when the entry of each rank appears."""
    item, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    before = tl.zeros([], tl.int32)
    for start in tl.range(0, n_rows, BJ):
        row = start + tl.arange(0, BJ)
        inside = row < n_rows
        alive = tl.load(alive_ptr + item * n_rows + row, mask=inside, other=0) != 0
        must = tl.load(must_ptr + item * n_rows + row, mask=inside, other=0) != 0
        member = alive & (must == (number == 1))
        rank = before + tl.cumsum(member.to(tl.int32), 0) - 1
        tl.store(rank_ptr + item * n_rows + row, rank, mask=member)
        when = tl.load(appears_ptr + item * n_rows + row, mask=member, other=0)
        tl.store(order_ptr + (item * 2 + number) * n_rows + rank, when, mask=member)
        before += tl.sum(member.to(tl.int32), 0)
    tl.store(count_ptr + item * 2 + number, before)


@triton.jit(do_not_specialize=("n_rows", "cap_kept", "cap_must"))
def end_kernel(
    must_ptr, alive_ptr, rank_ptr, order_ptr, count_ptr, until_ptr, n_rows, cap_kept, cap_must, BJ: tl.constexpr
):
    """An entry leaves when as many more as the cap have appeared; a cap of -1 is none."""
    item = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BJ + tl.arange(0, BJ)
    inside = row < n_rows
    alive = tl.load(alive_ptr + item * n_rows + row, mask=inside, other=0) != 0
    must = tl.load(must_ptr + item * n_rows + row, mask=inside, other=0).to(tl.int32)
    cap = tl.where(must != 0, cap_must, cap_kept)
    later = tl.load(rank_ptr + item * n_rows + row, mask=alive, other=0) + cap
    size = tl.load(count_ptr + item * 2 + must, mask=inside, other=0)
    bounded = alive & (cap >= 0) & (later < size)
    until = tl.load(order_ptr + (item * 2 + must) * n_rows + later, mask=bounded, other=NEVER)
    tl.store(until_ptr + item * n_rows + row, until, mask=inside)
