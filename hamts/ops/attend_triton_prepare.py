"""Small Triton kernels that prepare a read: lives of entries, which tiles need them, biases and features of marks.

Marks ride along as features of a second, narrow product, for the arithmetic of single numbers is what the kernels of
the read run out of first. A float32 number there is the sum of three in bfloat16. Words and letters as in
``attend_triton_kernels.py``; logits and biases are in powers of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ABSENT", "LOG2E", "VARYING", "bounds_kernel", "column_kernel", "life_kernel", "mark_kernel"]

# sizes that change from call to call: no kernel is compiled anew for them
VARYING = ("n_rows", "n_local", "n_entries", "n_columns", "window", "span", "words")
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# bias of a key that is never seen, and log of the sum of a row that sees nothing, but for its sign; finite, so that
# differences are numbers
ABSENT: tl.constexpr = tl.constexpr(-4.0e30)


@triton.jit(do_not_specialize=VARYING)
def bounds_kernel(
    from_ptr, until_ptr, bounds_ptr, n_rows, n_entries, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Which tiles of entries a tile of rows needs, [B, Q, 4]: first, first needing no mask, past those, past all."""
    tile, item = tl.program_id(0), tl.program_id(1)
    first = (tile * BM) // C
    last = (tl.minimum(tile * BM + BM, n_rows) - 1) // C
    n_tiles = tl.cdiv(n_entries, BN)
    begin, end, full_end = n_tiles, 0, 0
    base = item.to(tl.int64) * n_entries
    for start in tl.range(0, n_tiles, 16):
        number = start + tl.arange(0, 16)
        needed, full = _tile_state(from_ptr + base, until_ptr + base, number, first, last, n_entries, BN)
        begin = tl.minimum(begin, tl.min(tl.where(needed, number, n_tiles)))
        end = tl.maximum(end, tl.max(tl.where(needed, number + 1, 0)))
        full_end = tl.maximum(full_end, tl.max(tl.where(needed & full, number + 1, 0)))
    begin = tl.minimum(begin, end)
    full_begin = begin
    for start in tl.range(0, full_end, 16):
        number = start + tl.arange(0, 16)
        needed, full = _tile_state(from_ptr + base, until_ptr + base, number, first, last, n_entries, BN)
        full_begin = tl.maximum(full_begin, tl.max(tl.where((number < full_end) & (full == 0), number + 1, 0)))
    full_end = tl.maximum(full_end, full_begin)
    place = bounds_ptr + (item * tl.num_programs(0) + tile) * 4
    tl.store(place, begin)
    tl.store(place + 1, full_begin)
    tl.store(place + 2, full_end)
    tl.store(place + 3, end)


@triton.jit(do_not_specialize=("n_patches", "n_lives"))
def life_kernel(from_ptr, until_ptr, life_ptr, n_patches, n_lives, BN: tl.constexpr):
    """First query that sees each entry, and first that no longer does, in 0 .. N; N and 0 if none ever does."""
    entry = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    since = tl.load(from_ptr + entry, mask=entry < n_lives, other=0)
    until = tl.load(until_ptr + entry, mask=entry < n_lives, other=0)
    since = tl.minimum(tl.maximum(since, 0), n_patches).to(tl.int32)
    until = tl.minimum(tl.maximum(until, 0), n_patches).to(tl.int32)
    dead = since >= until
    tl.store(life_ptr + entry, tl.where(dead, n_patches, since), mask=entry < n_lives)
    tl.store(life_ptr + n_lives + entry, tl.where(dead, 0, until), mask=entry < n_lives)


@triton.jit
def _life(from_ptr, until_ptr, entry, n_entries):
    """What ``life_kernel`` found; entries beyond the last are seen by none."""
    since = tl.load(from_ptr + entry, mask=entry < n_entries, other=0)
    return since, tl.load(until_ptr + entry, mask=entry < n_entries, other=0)


@triton.jit
def _tile_state(from_ptr, until_ptr, number, first, last, n_entries, BN: tl.constexpr):
    """Is any entry of each tile seen by a row, and is every living entry seen by all of them?"""
    entry = number[:, None] * BN + tl.arange(0, BN)[None, :]
    since, until = _life(from_ptr, until_ptr, entry, n_entries)
    needed = (since < until) & (since <= last) & (until > first)
    # dead entries carry a bias of -inf and need no mask; a tile that ends beyond the last entry does
    full = ((since >= until) | ((since <= first) & (until > last))) & (entry < n_entries)
    return tl.max(needed.to(tl.int32), 1) > 0, tl.min(full.to(tl.int32), 1) > 0


@triton.jit
def _tile(ptr, index, n, stride, width: tl.constexpr, padded: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``index`` of a matrix [n, width], 0 beyond it."""
    column = tl.arange(0, padded)
    place = ptr + index[:, None] * stride + column[None, :]
    if width == padded:
        if MASKED:
            tile = tl.load(place, mask=(index < n)[:, None], other=0.0)
        else:
            tile = tl.load(place)
    else:
        tile = tl.load(place, mask=(index < n)[:, None] & (column < width)[None, :], other=0.0)
    return tile


@triton.jit
def _store(ptr, index, n, stride, width: tl.constexpr, padded: tl.constexpr, tile):
    column = tl.arange(0, padded)
    keep = (index < n)[:, None] & (column < width)[None, :]
    tl.store(ptr + index[:, None] * stride + column[None, :], tile.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def _part(x, number, NARROW: tl.constexpr):
    """Part 0, 1 or 2 of a float32 number: bfloat16 numbers that add up to it; all of it in part 0 if not NARROW."""
    if NARROW:
        high = x.to(tl.bfloat16).to(tl.float32)
        middle = (x - high).to(tl.bfloat16).to(tl.float32)
        part = tl.where(number == 0, high, tl.where(number == 1, middle, x - high - middle)).to(tl.bfloat16)
    else:
        part = tl.where(number == 0, x, 0.0)
    return part


@triton.jit(do_not_specialize=VARYING)
def column_kernel(
    present_ptr, from_ptr, until_ptr, bias_ptr, marks_ptr, raised_ptr, packed_ptr, n_columns, stride_column,
    stride_head, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ENTRIES: tl.constexpr,
    NARROW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Biases of columns in powers of 2, [B, H, M] of entries, [B, LC] of places, and marks [B, X, RP, 4].

    Biases [B, M, H] have strides; the last of the marks' columns is 1.
    """
    tile, item, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    columns = tile * BN + tl.arange(0, BN)
    inside = columns < n_columns
    if ENTRIES:
        base = item * n_columns
        since, until = _life(from_ptr + base, until_ptr + base, columns, n_columns)
        place = (item * n_columns + columns) * stride_column + head * stride_head
        bias = tl.load(bias_ptr + place, mask=inside, other=0.0).to(tl.float32)
        bias = tl.where(since < until, bias * LOG2E, ABSENT)
        raised_ptr += (item * H + head) * n_columns
    else:
        present = tl.load(present_ptr + item * n_columns + columns, mask=inside, other=0)
        bias = tl.where(present != 0, 0.0, ABSENT)
        raised_ptr += item * n_columns
    tl.store(raised_ptr + columns, bias, mask=inside)
    if R > 0:  # noqa: SIM102
        # one head writes what all share; kept apart from what is known when compiling
        if head == 0:  # noqa: SIM102
            at = tl.arange(0, RP * 4)[None, :]
            keep = inside[:, None] & (at // 4 < R) & (at % 4 < 3)
            marks = tl.load(marks_ptr + (item * n_columns + columns[:, None]) * R + at // 4, mask=keep, other=0.0)
            packed = tl.where(at == RP * 4 - 1, 1.0, _part(marks, at % 4, NARROW).to(tl.float32))
            packed_ptr += item * n_columns * RP * 4
            _store(packed_ptr, columns, n_columns, RP * 4, RP * 4, RP * 4, packed)


@triton.jit(do_not_specialize=VARYING)
def mark_kernel(
    marks_ptr, features_ptr, n_columns, C: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, DX: tl.constexpr,
    NARROW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Marks as columns of the backward product, [B, X, DX]; see ``_slope_features`` for their partners.

    Six features for each mark, then three ones; a last mark that is 1 (where SHARE) needs no others.
    """
    item = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    number = tl.arange(0, DX)[None, :]
    which = number % 6
    count: tl.constexpr = R - 1 if SHARE else R
    keep = (columns < n_columns)[:, None] & (number < 6 * count)
    marks = tl.load(marks_ptr + (item * n_columns + columns[:, None]) * R + number // 6, mask=keep, other=0.0)
    if NARROW:
        part = tl.where(which < 3, 0, tl.where(which == 5, 2, 1))
        features = _part(marks, part, NARROW).to(tl.float32)
    else:
        features = tl.where(which == 0, marks, 0.0)
    if (C == 1) or SHARE:
        features = tl.where((number >= 6 * count) & (number < 6 * count + 3), 1.0, features)
    _store(features_ptr + item * n_columns * DX, columns, n_columns, DX, DX, DX, features)
