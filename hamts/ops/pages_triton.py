"""Where rows of a step go among pages, by one kernel: pages given back, pages taken, and the row of each new entry.

``PagedStore`` says in torch operations what happens; some sixty of them are launched for a step, each over a number or
two for a stream. Here one program does it, in the same order, so that it takes the same pages.

S streams · E entries of a page · P pages · T pages that a stream may hold · J rows that come in a step
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError(
        "The Triton kernels need the package triton, 3.7.1 or later. Install it with: pip install 'hamts[gpu]'."
    ) from missing

__all__ = ["place_rows"]

# numbers that the program holds at once
AT_ONCE = 1024


@triton.jit
def _bounds(past_ptr, first_ptr, accepted_ptr, stream, inside, cap, J: tl.constexpr, BJ: tl.constexpr):
    """Entries before and after of some streams [BS], and which rows they accept [BS, BJ]."""
    row = tl.arange(0, BJ)
    accepted = tl.load(
        accepted_ptr + stream[:, None] * J + row[None, :], mask=inside[:, None] & (row < J)[None, :], other=0
    ).to(tl.int32)  # fmt: skip
    past = tl.load(past_ptr + stream, mask=inside, other=0)
    first = tl.load(first_ptr + stream, mask=inside, other=0)
    then = past + tl.sum(accepted, 1)
    begins = first
    if cap > 0:
        begins = tl.maximum(first, then - cap)
    return accepted, past, then, first, begins


@triton.jit(do_not_specialize=("n_streams", "n_pages", "width", "cap", "most"))
def place_kernel(
    past_ptr, first_ptr, accepted_ptr, table_ptr, free_ptr, n_free_ptr, lost_ptr, over_ptr, slot_ptr, n_streams,
    n_pages, width, cap, most, E: tl.constexpr, J: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """One program for all streams; the pile of free pages is changed in the order of streams."""
    span = tl.maximum(width, 1)
    n_free = tl.load(n_free_ptr)
    lost = tl.load(lost_ptr)
    over = tl.load(over_ptr)
    if cap > 0:
        # everybody gives back before anybody takes
        for start in tl.range(0, n_streams, BS):
            stream = start + tl.arange(0, BS)
            inside = stream < n_streams
            _, _, _, first, begins = _bounds(past_ptr, first_ptr, accepted_ptr, stream, inside, cap, J, BJ)
            turn = tl.arange(0, TURNS)
            number = (first // E)[:, None] + turn[None, :]
            gone = (number < (begins // E)[:, None]) & inside[:, None]
            page = tl.load(table_ptr + stream[:, None] * (width + 1) + number % span, mask=gone, other=0)
            # where none was free nothing was taken, and nothing comes back
            gone = gone & (page < n_pages)
            counts = gone.to(tl.int64)
            before = tl.cumsum(tl.sum(counts, 1), 0) - tl.sum(counts, 1)
            rank = before[:, None] + tl.cumsum(counts, 1) - 1
            tl.store(free_ptr + n_free + rank, page, mask=gone)
            n_free += tl.sum(tl.sum(counts, 1), 0)
        tl.debug_barrier()
    for start in tl.range(0, n_streams, BS):
        stream = start + tl.arange(0, BS)
        inside = stream < n_streams
        accepted, past, then, first, begins = _bounds(
            past_ptr, first_ptr, accepted_ptr, stream, inside, cap, J, BJ
        )  # fmt: skip
        ends = begins // E + width
        turn = tl.arange(0, TURNS)
        number = ((past + E - 1) // E)[:, None] + turn[None, :]
        wanted = (number < ((then + E - 1) // E)[:, None]) & (number < ends[:, None]) & inside[:, None]
        counts = wanted.to(tl.int64)
        before = tl.cumsum(tl.sum(counts, 1), 0) - tl.sum(counts, 1)
        place = n_free - (before[:, None] + tl.cumsum(counts, 1))
        got = wanted & (place >= 0)
        page = tl.load(free_ptr + place, mask=got, other=0)
        page = tl.where(got, page, n_pages.to(page.dtype))
        tl.store(table_ptr + stream[:, None] * (width + 1) + number % span, page, mask=wanted)
        n_free -= tl.sum(tl.sum(got.to(tl.int64), 1), 0)
        # what was taken just now is read below
        tl.debug_barrier()
        row = tl.arange(0, BJ)
        here = inside[:, None] & (row < J)[None, :]
        entry = past[:, None] + tl.maximum(tl.cumsum(accepted, 1) - 1, 0)
        kept = here & (accepted > 0) & (entry // E < ends[:, None])
        page = tl.load(table_ptr + stream[:, None] * (width + 1) + entry // E % span, mask=kept, other=0).to(tl.int64)
        slot = tl.where(kept, page * E + entry % E, n_pages.to(tl.int64) * E)
        tl.store(slot_ptr + stream[:, None] * J + row[None, :], slot, mask=here)
        astray = here & (accepted > 0) & (slot >= n_pages.to(tl.int64) * E)
        lost += tl.sum(tl.sum(astray.to(tl.int64), 1), 0)
        over = tl.maximum(over, tl.max(tl.where(inside, then - begins - most, 0), 0))
        tl.store(past_ptr + stream, then, mask=inside)
        tl.store(first_ptr + stream, begins, mask=inside)
    tl.store(n_free_ptr, n_free)
    tl.store(lost_ptr, lost)
    tl.store(over_ptr, over)


def place_rows(
    accepted: torch.Tensor,
    *,
    past: torch.Tensor,
    first: torch.Tensor,
    table: torch.Tensor,
    free: torch.Tensor,
    n_free: torch.Tensor,
    lost: torch.Tensor,
    over: torch.Tensor,
    pages: int,
    page: int,
    cap: int | None,
    most: int,
) -> torch.Tensor:
    """Row of the pools for each row that comes, accepted bool [S, J] -> [S, J]; everything else is changed in place."""
    S, J = accepted.shape
    slot = torch.empty(S, J, dtype=torch.int64, device=accepted.device)  # [S, J]
    if not slot.numel():
        return slot
    turns = triton.next_power_of_2((J + page - 1) // page)
    rows = triton.next_power_of_2(J)
    side = max(1, min(AT_ONCE // max(rows, turns), triton.next_power_of_2(S)))
    place_kernel[(1,)](
        past, first, accepted.contiguous().view(torch.int8), table, free, n_free, lost, over, slot,
        S, pages, table.shape[1] - 1, cap or 0, most, E=page, J=J, BJ=rows, BS=side, TURNS=turns, num_warps=4,
    )  # fmt: skip
    return slot
