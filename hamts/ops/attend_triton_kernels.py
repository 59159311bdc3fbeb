"""Triton kernels of the read: forward, gradient of queries, gradient of keys, masses.

A row is a query (patch n, channel c), row n C + c. A column is a key: an entry of the scratchpad, or a place of the
window, l C + d. No kernel adds into memory that another program writes: results do not depend on the order in which
programs run.

What every logit adds for its row or column rides along as features of a second, narrow product, for the arithmetic of
single numbers is what these kernels run out of first. A float32 number there is the sum of three in bfloat16:

    of a column    bias (3 parts), 1, 1, 1
    of a row       1, 1, 1, minus log of the softmax's sum (3 parts; 0 in the forward pass)

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
BM rows of a tile · BN columns of a tile · BK, BV widths of a tile · RP marks of a tile · Q tiles of rows

Source: the running softmax of FlashAttention-2 (arXiv 2307.08691); the compacted prefix and its union with the window
in one softmax are ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ABSENT", "FEATURES", "LOG2E", "VARYING", "bounds_kernel", "forward_kernel"]

# sizes that change from call to call: no kernel is compiled anew for them
VARYING = ("n_rows", "n_local", "n_entries", "n_columns", "window", "span", "words")
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# finite, so that a row which has seen nothing yet never subtracts infinities
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
# bias of a key that is never seen, and log of the sum of a row that sees nothing, but for its sign
ABSENT: tl.constexpr = tl.constexpr(-4.0e30)
# width of the features of biases
FEATURES: tl.constexpr = tl.constexpr(16)


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


@triton.jit
def _tile_state(from_ptr, until_ptr, number, first, last, n_entries, BN: tl.constexpr):
    """Is any entry of each tile seen by a row, and is every living entry seen by all of them?"""
    entry = number[:, None] * BN + tl.arange(0, BN)[None, :]
    since = tl.load(from_ptr + entry, mask=entry < n_entries, other=0)
    until = tl.load(until_ptr + entry, mask=entry < n_entries, other=0)
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
def _allowed(bits_ptr, reader, source, words, C: tl.constexpr):
    """May the reader's channel read the source's? Both of shape [x, 1] or [1, y]."""
    word = tl.load(bits_ptr + reader * words + source // 32)
    return ((word >> (source % 32)) & 1) != 0


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


@triton.jit
def _row_features(lse, NARROW: tl.constexpr):
    """Features of rows, [BM, FEATURES]: ones, then minus the log of the softmax's sum."""
    number = tl.arange(0, FEATURES)[None, :]
    of_sum = tl.where(number < 6, _part(-lse[:, None] + 0.0 * number, number - 3, NARROW).to(tl.float32), 0.0)
    features = tl.where(number < 3, 1.0, of_sum)
    if NARROW:
        features = features.to(tl.bfloat16)
    return features


@triton.jit
def _entry_logits(
    s, row, ends, sources, bits_ptr, channel_bias, n_rows, words, C: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Logits of entries, and which are of the row's own channel. ``row`` and the entry's tensors broadcast to s."""
    own = row >= 0
    if C > 1:
        own = (row % C) == sources
        s = tl.where(own, s + channel_bias, s)
        s = tl.where(own | _allowed(bits_ptr, row % C, sources, words, C), s, float("-inf"))
    if MASKED:
        since, until = ends
        s = tl.where((since <= row // C) & (row // C < until) & (row < n_rows), s, float("-inf"))
    return s, own


@triton.jit
def _local_logits(s, row, column, bits_ptr, channel_bias, window, span, words, C: tl.constexpr):
    """Logits of the window's places, and which are of the row's own channel; absent ones have a bias of ABSENT."""
    # what is not yet there has a negative age, which is huge without a sign
    age = (row // C + (window - column // C)).to(tl.uint32, bitcast=True)
    own = (row % C) == (column % C)
    seen = age < window.to(tl.uint32)
    if C > 1:
        s = tl.where(own, s + channel_bias, s)
        allowed = _allowed(bits_ptr, row % C, column % C, words, C)
        seen = (own & seen) | ((age < span.to(tl.uint32)) & allowed)
    return tl.where(seen, s, float("-inf")), own


@triton.jit
def _accumulate(
    total, top, output, marked, s, own, v, marks, C: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Fold a tile of logits into the running softmax; ``top`` is in powers of 2."""
    new_top = tl.maximum(top, tl.max(s, 1) * LOG2E)
    p = tl.exp2(s * LOG2E - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    if C > 1 or R == 0:
        total = total * shrink + tl.sum(p, 1)
    output = output * shrink[:, None]
    output = tl.dot(p.to(v.dtype), v, output, input_precision=PRECISION)
    if R > 0:
        if C > 1:
            p = tl.where(own, p, 0.0)
        marked = marked * shrink[:, None]
        # every part of a mark meets the same rounded probability, so differences of marks stay exact; a column of ones
        # beside them gives the total
        marked = tl.dot(p.to(marks.dtype), marks, marked, input_precision=PRECISION)
    return total, new_top, output, marked


@triton.jit
def _forward_entries(
    total, top, output, marked, q, ones, row, begin, end, keys_ptr, values_ptr, marks_ptr, bias_ptr, from_ptr,
    until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(begin, end):
        entry = tile * BN + tl.arange(0, BN)
        inside = entry < n_entries
        k = _tile(keys_ptr, entry, n_entries, H * K, K, BK, MASKED)
        bias = _tile(bias_ptr, entry, n_entries, FEATURES, FEATURES, FEATURES, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.dot(ones, tl.trans(bias), s, input_precision=PRECISION)
        since, until, sources = entry[None, :], entry[None, :], entry[None, :]
        if MASKED:
            since = tl.load(from_ptr + entry, mask=inside, other=0)[None, :]
            until = tl.load(until_ptr + entry, mask=inside, other=0)[None, :]
        if C > 1:
            sources = tl.load(source_ptr + entry, mask=inside, other=0)[None, :]
        s, own = _entry_logits(s, row, (since, until), sources, bits_ptr, channel_bias, n_rows, words, C, MASKED)
        v = _tile(values_ptr, entry, n_entries, H * V, V, BV, MASKED)
        marks = v
        if R > 0:
            marks = _tile(marks_ptr, entry, n_entries, RP * 4, RP * 4, RP * 4, MASKED)
        total, top, output, marked = _accumulate(total, top, output, marked, s, own, v, marks, C, R, PRECISION)
    return total, top, output, marked


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_ptr, local_keys_ptr, local_values_ptr, local_marks_ptr, local_bias_ptr, keys_ptr, values_ptr, marks_ptr, bias_ptr,
    from_ptr, until_ptr, source_ptr, bounds_ptr, bits_ptr, channel_bias_ptr, output_ptr, marked_ptr, lse_ptr,
    n_rows, n_local, n_entries, window, span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr, ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output [B, NC, H, V], marks [B, NC, H, R] and log of the softmax's sum [B, H, NC]."""
    n_tiles = tl.cdiv(n_rows, BM)
    # late tiles see most entries: they go first
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    item = (tl.program_id(0) // n_tiles // H).to(tl.int64)
    head = tl.program_id(0) // n_tiles % H
    rows = tile * BM + tl.arange(0, BM)
    row = rows[:, None]
    q = _tile(q_ptr + (item * n_rows * H + head) * K, rows, n_rows, H * K, K, BK, True)
    bits_ptr += item * C * words
    channel_bias = tl.load(channel_bias_ptr + head).to(tl.float32)
    ones = tl.where(tl.arange(0, FEATURES)[None, :] < 3, tl.full([BM, FEATURES], 1.0, tl.float32), 0.0)
    ones = ones.to(local_bias_ptr.dtype.element_ty)
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    output = tl.zeros([BM, BV], tl.float32)
    marked = tl.zeros([BM, RP * 4], tl.float32)
    if ENTRIES:
        keys_ptr += (item * n_entries * H + head) * K
        values_ptr += (item * n_entries * H + head) * V
        marks_ptr += item * n_entries * RP * 4
        bias_ptr += (item * H + head) * n_entries * FEATURES
        from_ptr += item * n_entries
        until_ptr += item * n_entries
        source_ptr += item * n_entries
        bounds_ptr += (item * n_tiles + tile) * 4
        begin, full_begin = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
        full_end, end = tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
        total, top, output, marked = _forward_entries(
            total, top, output, marked, q, ones, row, begin, full_begin, keys_ptr, values_ptr, marks_ptr, bias_ptr,
            from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H, C, K, V, R, BK, BV,
            RP, BN, PRECISION, True,
        )  # fmt: skip
        total, top, output, marked = _forward_entries(
            total, top, output, marked, q, ones, row, full_begin, full_end, keys_ptr, values_ptr, marks_ptr, bias_ptr,
            from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H, C, K, V, R, BK, BV,
            RP, BN, PRECISION, False,
        )  # fmt: skip
        total, top, output, marked = _forward_entries(
            total, top, output, marked, q, ones, row, full_end, end, keys_ptr, values_ptr, marks_ptr, bias_ptr,
            from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H, C, K, V, R, BK, BV,
            RP, BN, PRECISION, True,
        )  # fmt: skip
    local_keys_ptr += (item * n_local * H + head) * K
    local_values_ptr += (item * n_local * H + head) * V
    local_marks_ptr += item * n_local * RP * 4
    local_bias_ptr += item * n_local * FEATURES
    last = tl.minimum(tile * BM + BM, n_rows) - 1
    for start in tl.range((tile * BM // C + 1) * C, (last // C + window + 1) * C, BN):
        place = start + tl.arange(0, BN)
        k = _tile(local_keys_ptr, place, n_local, H * K, K, BK, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        bias = _tile(local_bias_ptr, place, n_local, FEATURES, FEATURES, FEATURES, True)
        s = tl.dot(ones, tl.trans(bias), s, input_precision=PRECISION)
        s, own = _local_logits(s, row, place[None, :], bits_ptr, channel_bias, window, span, words, C)
        v = _tile(local_values_ptr, place, n_local, H * V, V, BV, True)
        marks = v
        if R > 0:
            marks = _tile(local_marks_ptr, place, n_local, RP * 4, RP * 4, RP * 4, True)
        total, top, output, marked = _accumulate(total, top, output, marked, s, own, v, marks, C, R, PRECISION)
    part = tl.arange(0, RP * 4)[None, :]
    if (C == 1) and (R > 0):
        total = tl.sum(tl.where(part == RP * 4 - 1, marked, 0.0), 1)
    # a row that saw nothing gives 0, and probabilities of 0 in the backward pass
    seen = total > 0
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    _store(output_ptr + (item * n_rows * H + head) * V, rows, n_rows, H * V, V, BV, output * share)
    if R > 0:
        parts = tl.sum(tl.reshape(tl.where(part % 4 < 3, marked * share, 0.0), [BM, RP, 4]), 2)
        _store(marked_ptr + (item * n_rows * H + head) * R, rows, n_rows, H * R, R, RP, parts)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, -ABSENT)
    tl.store(lse_ptr + (item * H + head) * n_rows + rows, lse, mask=rows < n_rows)
