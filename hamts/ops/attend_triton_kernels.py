"""Triton kernel of the read, forward. Its gradients and masses are in files beside it.

A row is a query (patch n, channel c), row n C + c. A column is a key: an entry of the scratchpad, or a place of the
window, l C + d. Logits, biases and the log of the softmax's sum are in powers of 2. No kernel adds into memory that
another program writes: results do not depend on the order in which programs run.

Keys and values come from the second-level cache, once for every tile of rows: its bandwidth is the bound of small
tiles. Where EVEN, every tile lies inside its tensor, and no load needs a mask.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
BM rows of a tile · BN columns of a tile · BK, BV widths of a tile · RP marks of a tile · Q tiles of rows

Source: the running softmax of FlashAttention-2 (arXiv 2307.08691); the compacted prefix and its union with the window
in one softmax are ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamts.ops.attend_triton_prepare import ABSENT, LOG2E, VARYING, _life, _store, _tile

__all__ = ["forward_kernel"]

# finite, so that a row which has seen nothing yet never subtracts infinities
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
# a sum of the softmax outside of them may have overflowed, or hide what has vanished
SMALLEST: tl.constexpr = tl.constexpr(2.0**-64)
LARGEST: tl.constexpr = tl.constexpr(2.0**64)


@triton.jit
def _allowed(bits_ptr, reader, source, words, C: tl.constexpr):
    """May the reader's channel read the source's? Both of shape [x, 1] or [1, y]."""
    word = tl.load(bits_ptr + reader * words + source // 32)
    return ((word >> (source % 32)) & 1) != 0


@triton.jit
def _entry_logits(
    s, row, ends, sources, bits_ptr, channel_bias, words, C: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Logits of entries, and which are of the row's own channel. ``row`` and the entry's tensors broadcast to s."""
    own = row >= 0
    if C > 1:
        own = (row % C) == sources
        s = tl.where(own, s + channel_bias, s)
        s = tl.where(own | _allowed(bits_ptr, row % C, sources, words, C), s, float("-inf"))
    if MASKED:
        since, length = ends
        # what is not yet there has a negative age, which is huge without a sign; rows beyond the last see nothing, for
        # no entry is there for longer
        age = (row // C - since).to(tl.uint32, bitcast=True)
        s = tl.where(age < length.to(tl.uint32, bitcast=True), s, float("-inf"))
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
    total, top, output, marked, x, own, v, marks, C: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    """Fold a tile of logits into the running softmax; where FIXED they are relative to ``top``, which stays."""
    if FIXED:
        p = tl.exp2(x)
    else:
        new_top = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink
        output = output * shrink[:, None]
        marked = marked * shrink[:, None]
        top = new_top
    if C > 1 or R == 0:
        total += tl.sum(p, 1)
    output = tl.dot(p.to(v.dtype), v, output, input_precision=PRECISION)
    if R > 0:  # noqa: SIM102
        if C > 1:
            p = tl.where(own, p, 0.0)
        # every part of a mark meets the same rounded probability, so differences of marks stay exact; a column of ones
        # beside them gives the total
        marked = tl.dot(p.to(marks.dtype), marks, marked, input_precision=PRECISION)
    return total, top, output, marked


@triton.jit
def _forward_entries(
    total, top, output, marked, q, row, begin, end, keys_ptr, values_ptr, marks_ptr, bias_ptr, from_ptr,
    until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, FIXED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(begin, end):
        entry = tile * BN + tl.arange(0, BN)
        # beyond the last entry, the last again: nobody sees it
        at = entry
        if MASKED and not EVEN:
            at = tl.minimum(entry, n_entries - 1)
        k = _tile(keys_ptr, at, n_entries, H * K, K, BK, False)
        bias = tl.load(bias_ptr + at)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if FIXED:
            x = s * LOG2E + (bias[None, :] - top[:, None])
        else:
            x = s * LOG2E + bias[None, :]
        since, length, sources = entry[None, :], entry[None, :], entry[None, :]
        if MASKED:
            since, until = _life(from_ptr, until_ptr, entry, n_entries)
            since, length = since[None, :], tl.maximum(until - since, 0)[None, :]
        if C > 1:
            sources = tl.load(source_ptr + at)[None, :]
        x, own = _entry_logits(x, row, (since, length), sources, bits_ptr, channel_bias, words, C, MASKED)
        v = _tile(values_ptr, at, n_entries, H * V, V, BV, False)
        marks = v
        if R > 0:
            marks = _tile(marks_ptr, at, n_entries, RP * 4, RP * 4, RP * 4, False)
        total, top, output, marked = _accumulate(total, top, output, marked, x, own, v, marks, C, R, PRECISION, FIXED)
    return total, top, output, marked


@triton.jit
def _forward_window(
    q, row, begin, end, keys_ptr, values_ptr, marks_ptr, bias_ptr, bits_ptr, channel_bias, n_local, window, span,
    words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A softmax that has seen the window alone."""
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    output = tl.zeros([BM, BV], tl.float32)
    marked = tl.zeros([BM, RP * 4], tl.float32)
    for start in tl.range(begin, end, BN):
        place = start + tl.arange(0, BN)
        # beyond the last place, the last again: no row sees so far ahead
        at = place
        if not EVEN:
            at = tl.minimum(place, n_local - 1)
        k = _tile(keys_ptr, at, n_local, H * K, K, BK, False)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E + tl.load(bias_ptr + at)[None, :]
        x, own = _local_logits(x, row, place[None, :], bits_ptr, channel_bias, window, span, words, C)
        v = _tile(values_ptr, at, n_local, H * V, V, BV, False)
        marks = v
        if R > 0:
            marks = _tile(marks_ptr, at, n_local, RP * 4, RP * 4, RP * 4, False)
        total, top, output, marked = _accumulate(total, top, output, marked, x, own, v, marks, C, R, PRECISION, False)
    return total, top, output, marked


@triton.jit
def _total(total, marked, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """Sum of the softmax; beside marks of one channel it is the last of their columns."""
    if (C == 1) and (R > 0):
        total = tl.sum(tl.where(tl.arange(0, RP * 4)[None, :] == RP * 4 - 1, marked, 0.0), 1)
    return total


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_ptr, local_keys_ptr, local_values_ptr, local_marks_ptr, local_bias_ptr, keys_ptr, values_ptr, marks_ptr, bias_ptr,
    from_ptr, until_ptr, source_ptr, bounds_ptr, bits_ptr, channel_bias_ptr, output_ptr, marked_ptr, lse_ptr,
    n_rows, n_local, n_entries, window, span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr, ENTRIES: tl.constexpr,
    FIXED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Output [B, NC, H, V], marks [B, NC, H, R] and log of the softmax's sum [B, H, NC], in powers of 2.

    The window is read first. Its largest logit then stands for the largest of all (where FIXED), which saves the
    running maximum of the entries: right as long as sums neither overflow nor vanish, which is looked at in the end.
    A tile of rows where that fails is read once more with a running maximum.
    """
    n_tiles = tl.cdiv(n_rows, BM)
    # late tiles see most entries: they go first
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    item = (tl.program_id(0) // n_tiles // H).to(tl.int64)
    head = tl.program_id(0) // n_tiles % H
    rows = tile * BM + tl.arange(0, BM)
    row = rows[:, None]
    q = _tile(q_ptr + (item * n_rows * H + head) * K, rows, n_rows, H * K, K, BK, not EVEN)
    bits_ptr += item * C * words
    channel_bias = tl.load(channel_bias_ptr + head).to(tl.float32) * LOG2E
    local_keys_ptr += (item * n_local * H + head) * K
    local_values_ptr += (item * n_local * H + head) * V
    local_marks_ptr += item * n_local * RP * 4
    local_bias_ptr += item * n_local
    first_place = (tile * BM // C + 1) * C
    if EVEN and C == 1:
        first_place = tile * BM
    past_place = ((tl.minimum(tile * BM + BM, n_rows) - 1) // C + window + 1) * C
    total, top, output, marked = _forward_window(
        q, row, first_place, past_place, local_keys_ptr, local_values_ptr, local_marks_ptr, local_bias_ptr,
        bits_ptr, channel_bias, n_local, window, span, words, H, C, K, V, R, BK, BV, RP, BM, BN, PRECISION, EVEN,
    )  # fmt: skip
    if ENTRIES:
        keys_ptr += (item * n_entries * H + head) * K
        values_ptr += (item * n_entries * H + head) * V
        marks_ptr += item * n_entries * RP * 4
        bias_ptr += (item * H + head) * n_entries
        from_ptr += item * n_entries
        until_ptr += item * n_entries
        source_ptr += item * n_entries
        bounds_ptr += (item * n_tiles + tile) * 4
        begin, full_begin = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
        full_end, end = tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
        if FIXED:
            top = tl.where(top > LOWEST, top, 0.0)
        total, top, output, marked = _forward_entries(
            total, top, output, marked, q, row, begin, full_begin, keys_ptr, values_ptr, marks_ptr, bias_ptr,
            from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H, C, K, V, R, BK, BV,
            RP, BN, PRECISION, True, FIXED, EVEN,
        )  # fmt: skip
        total, top, output, marked = _forward_entries(
            total, top, output, marked, q, row, full_begin, full_end, keys_ptr, values_ptr, marks_ptr, bias_ptr,
            from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H, C, K, V, R, BK, BV,
            RP, BN, PRECISION, False, FIXED, EVEN,
        )  # fmt: skip
        total, top, output, marked = _forward_entries(
            total, top, output, marked, q, row, full_end, end, keys_ptr, values_ptr, marks_ptr, bias_ptr,
            from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H, C, K, V, R, BK, BV,
            RP, BN, PRECISION, True, FIXED, EVEN,
        )  # fmt: skip
        if FIXED:
            sums = _total(total, marked, C, R, RP)
            sound = ((sums > SMALLEST) & (sums < LARGEST)) | (rows >= n_rows)
            if tl.min(sound.to(tl.int32)) == 0:
                total, top, output, marked = _forward_window(
                    q, row, first_place, past_place, local_keys_ptr, local_values_ptr, local_marks_ptr,
                    local_bias_ptr, bits_ptr, channel_bias, n_local, window, span, words, H, C, K, V, R, BK, BV, RP,
                    BM, BN, PRECISION, EVEN,
                )  # fmt: skip
                total, top, output, marked = _forward_entries(
                    total, top, output, marked, q, row, begin, end, keys_ptr, values_ptr, marks_ptr, bias_ptr,
                    from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words, H, C, K, V, R,
                    BK, BV, RP, BN, PRECISION, True, False, EVEN,
                )  # fmt: skip
    total = _total(total, marked, C, R, RP)
    part = tl.arange(0, RP * 4)[None, :]
    # a row that saw nothing gives 0, and probabilities of 0 in the backward pass
    seen = total > 0
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    _store(output_ptr + (item * n_rows * H + head) * V, rows, n_rows, H * V, V, BV, output * share)
    if R > 0:  # noqa: SIM102
        parts = tl.sum(tl.reshape(tl.where(part % 4 < 3, marked * share, 0.0), [BM, RP, 4]), 2)
        _store(marked_ptr + (item * n_rows * H + head) * R, rows, n_rows, H * R, R, RP, parts)
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), -ABSENT)
    tl.store(lse_ptr + (item * H + head) * n_rows + rows, lse, mask=rows < n_rows)
