"""Triton kernels of the read's gradient and masses. Words and letters as in ``attend_triton_kernels.py``.

A tile of rows gathers the gradient of its queries; a tile of columns that of its keys, values, biases and marks, from
all rows that see it, in one program or in parts that are added afterwards in a fixed order.

Source: FlashAttention-2 (arXiv 2307.08691), with the two gradients in kernels of their own, hence no atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamts.ops.attend_triton_kernels import _entry_logits, _local_logits
from hamts.ops.attend_triton_prepare import ABSENT, LOG2E, VARYING, _life, _part, _store, _tile

__all__ = ["column_grad_kernel", "query_grad_kernel"]


@triton.jit
def _slope_features(
    grad_marks_ptr, through, rows, n_rows, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr,
    DX: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Features of rows that meet the marks of columns, [BM, DX]; see ``mark_kernel``.

    What meets the ones: minus output x gradient with one channel, and the gradient of a last mark that is 1.
    """
    number = tl.arange(0, DX)[None, :]
    which = number % 6
    count: tl.constexpr = R - 1 if SHARE else R
    keep = (rows < n_rows)[:, None] & (number < 6 * count)
    grad = tl.load(grad_marks_ptr + rows[:, None] * H * R + number // 6, mask=keep, other=0.0)
    # products of the parts (0 0) (1 0) (2 0) (0 1) (1 1) (0 2)
    part = tl.where(which < 3, which, tl.where(which == 4, 1, 0))
    if NARROW:
        features = _part(grad, part, NARROW).to(tl.float32)
    else:
        features = tl.where(which == 0, grad, 0.0)
    if (C == 1) or SHARE:
        of_ones = 0.0 * through
        if C == 1:
            of_ones -= through
        if SHARE:
            of_ones += tl.load(grad_marks_ptr + rows * H * R + R - 1, mask=rows < n_rows, other=0.0)
        of_ones = _part(of_ones[:, None] + 0.0 * number, number - 6 * count, NARROW).to(tl.float32)
        features = tl.where((number >= 6 * count) & (number < 6 * count + 3), of_ones, features)
    if NARROW:
        features = features.to(tl.bfloat16)
    return features


@triton.jit
def _query_grad_tile(
    grad, own_sum, q, lse, grad_output, slope_features, through, row, column, ends, sources, k, v, bias, marks,
    bits_ptr, channel_bias, window, span, words, C: tl.constexpr, R: tl.constexpr, ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one tile of columns gives to the gradient of queries."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E + (bias[None, :] - lse[:, None])
    if ENTRIES:
        x, own = _entry_logits(x, row, ends, sources, bits_ptr, channel_bias, words, C, MASKED)
    else:
        x, own = _local_logits(x, row, column, bits_ptr, channel_bias, window, span, words, C)
    p = tl.exp2(x)
    products = tl.dot(grad_output, tl.trans(v), input_precision=PRECISION)
    if C == 1:
        products = tl.dot(slope_features, tl.trans(marks), products, input_precision=PRECISION)
    else:
        products -= through[:, None]
        if R > 0:
            of_marks = tl.dot(slope_features, tl.trans(marks), input_precision=PRECISION)
            products += tl.where(own, of_marks, 0.0)
    slope = p * products
    if C > 1:
        own_sum += tl.sum(tl.where(own, slope, 0.0), 1)
    grad = tl.dot(slope.to(k.dtype), k, grad, input_precision=PRECISION)
    return grad, own_sum


@triton.jit
def _query_grad_entries(
    grad, own_sum, q, lse, grad_output, slope_features, through, row, begin, end, keys_ptr, values_ptr,
    marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DX: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(begin, end):
        entry = tile * BN + tl.arange(0, BN)
        # beyond the last entry, the last again: nobody sees it
        at = entry
        if MASKED and not EVEN:
            at = tl.minimum(entry, n_entries - 1)
        k = _tile(keys_ptr, at, n_entries, H * K, K, BK, False)
        v = _tile(values_ptr, at, n_entries, H * V, V, BV, False)
        bias = tl.load(bias_ptr + at)
        marks = _tile(marks_ptr, at, n_entries, DX, DX, DX, False)
        since, length, sources = entry[None, :], entry[None, :], entry[None, :]
        if MASKED:
            since, until = _life(from_ptr, until_ptr, entry, n_entries)
            since, length = since[None, :], tl.maximum(until - since, 0)[None, :]
        if C > 1:
            sources = tl.load(source_ptr + at)[None, :]
        grad, own_sum = _query_grad_tile(
            grad, own_sum, q, lse, grad_output, slope_features, through, row, entry[None, :], (since, length),
            sources, k, v, bias, marks, bits_ptr, channel_bias, words, words, words, C, R, True, PRECISION, MASKED,
        )  # fmt: skip
    return grad, own_sum


@triton.jit(do_not_specialize=VARYING)
def query_grad_kernel(
    q_ptr, local_keys_ptr, local_values_ptr, local_marks_ptr, local_bias_ptr, keys_ptr, values_ptr, marks_ptr, bias_ptr,
    from_ptr, until_ptr, source_ptr, bounds_ptr, bits_ptr, channel_bias_ptr, output_ptr, marked_ptr, lse_ptr,
    grad_output_ptr, grad_marks_ptr, slope_features_ptr, through_ptr, grad_q_ptr, own_ptr, n_rows, n_local,
    n_entries, window, span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DX: tl.constexpr, ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr, SHARE: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries [B, NC, H, K] and the channel bias's part [B, H, Q].

    Also, for the gradient of columns: features of rows [B, H, NC, DX] and output x gradient [B, H, NC].
    """
    n_tiles = tl.cdiv(n_rows, BM)
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    item = (tl.program_id(0) // n_tiles // H).to(tl.int64)
    head = tl.program_id(0) // n_tiles % H
    rows = tl.multiple_of(tile * BM, BM) + tl.arange(0, BM)
    row = rows[:, None]
    q = _tile(q_ptr + (item * n_rows * H + head) * K, rows, n_rows, H * K, K, BK, not EVEN)
    of_values = (item * n_rows * H + head) * V
    grad_output = _tile(grad_output_ptr + of_values, rows, n_rows, H * V, V, BV, not EVEN)
    output = _tile(output_ptr + of_values, rows, n_rows, H * V, V, BV, not EVEN)
    through = tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)
    of_marks = (item * n_rows * H + head) * R
    for r in tl.static_range(R):
        marked = tl.load(marked_ptr + of_marks + rows * H * R + r, mask=rows < n_rows, other=0.0)
        through += marked * tl.load(grad_marks_ptr + of_marks + rows * H * R + r, mask=rows < n_rows, other=0.0)
    of_head = (item * H + head) * n_rows
    lse = tl.load(lse_ptr + of_head + rows, mask=rows < n_rows, other=-ABSENT)
    slope_features = _slope_features(grad_marks_ptr + of_marks, through, rows, n_rows, H, C, R, SHARE, DX, NARROW)
    _store(slope_features_ptr + of_head * DX, rows, n_rows, DX, DX, DX, slope_features)
    if C > 1:
        tl.store(through_ptr + of_head + rows, through, mask=rows < n_rows)
    bits_ptr += item * C * words
    channel_bias = tl.load(channel_bias_ptr + head).to(tl.float32) * LOG2E
    grad = tl.zeros([BM, BK], tl.float32)
    own_sum = tl.zeros([BM], tl.float32)
    if ENTRIES:
        keys_ptr += (item * n_entries * H + head) * K
        values_ptr += (item * n_entries * H + head) * V
        marks_ptr += item * n_entries * DX
        bias_ptr += (item * H + head) * n_entries
        from_ptr += item * n_entries
        until_ptr += item * n_entries
        source_ptr += item * n_entries
        bounds_ptr += (item * n_tiles + tile) * 4
        begin, full_begin = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
        full_end, end = tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
        grad, own_sum = _query_grad_entries(
            grad, own_sum, q, lse, grad_output, slope_features, through, row, begin, full_begin, keys_ptr,
            values_ptr, marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries,
            words, H, C, K, V, R, BK, BV, DX, BN, PRECISION, True, EVEN,
        )  # fmt: skip
        grad, own_sum = _query_grad_entries(
            grad, own_sum, q, lse, grad_output, slope_features, through, row, full_begin, full_end, keys_ptr,
            values_ptr, marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries,
            words, H, C, K, V, R, BK, BV, DX, BN, PRECISION, False, EVEN,
        )  # fmt: skip
        grad, own_sum = _query_grad_entries(
            grad, own_sum, q, lse, grad_output, slope_features, through, row, full_end, end, keys_ptr,
            values_ptr, marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries,
            words, H, C, K, V, R, BK, BV, DX, BN, PRECISION, True, EVEN,
        )  # fmt: skip
    local_keys_ptr += (item * n_local * H + head) * K
    local_values_ptr += (item * n_local * H + head) * V
    local_marks_ptr += item * n_local * DX
    local_bias_ptr += item * n_local
    first_place = (tile * BM // C + 1) * C
    if EVEN and C == 1:
        first_place = tile * BM
    last = tl.minimum(tile * BM + BM, n_rows) - 1
    for start in tl.range(first_place, (last // C + window + 1) * C, BN):
        place = start + tl.arange(0, BN)
        # beyond the last place, the last again: no row sees so far ahead
        at = place
        if not EVEN:
            at = tl.minimum(place, n_local - 1)
        k = _tile(local_keys_ptr, at, n_local, H * K, K, BK, False)
        v = _tile(local_values_ptr, at, n_local, H * V, V, BV, False)
        bias = tl.load(local_bias_ptr + at)
        marks = _tile(local_marks_ptr, at, n_local, DX, DX, DX, False)
        nothing = (place[None, :], place[None, :])
        grad, own_sum = _query_grad_tile(
            grad, own_sum, q, lse, grad_output, slope_features, through, row, place[None, :], nothing,
            place[None, :], k, v, bias, marks, bits_ptr, channel_bias, window, span, words, C, R, False, PRECISION,
            True,
        )  # fmt: skip
    _store(grad_q_ptr + (item * n_rows * H + head) * K, rows, n_rows, H * K, K, BK, grad)
    if C > 1:
        tl.store(own_ptr + (item * H + head) * n_tiles + tile, tl.sum(own_sum))


@triton.jit
def _column_weights(
    x, rows, columns, since, until, sources, bits_ptr, channel_bias, window, span, words, C: tl.constexpr,
    ENTRIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Probabilities, columns first [BN, BM], and which are of the row's own channel."""
    if ENTRIES:
        length = tl.maximum(until - since, 0)
        x, own = _entry_logits(
            x, rows[None, :], (since[:, None], length[:, None]), sources[:, None], bits_ptr, channel_bias, words, C,
            MASKED,
        )  # fmt: skip
    else:
        x, own = _local_logits(x, rows[None, :], columns[:, None], bits_ptr, channel_bias, window, span, words, C)
    return tl.exp2(x), own


@triton.jit
def _column_grad_rows(
    grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, begin, end, q_ptr, lse_ptr,
    slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr, channel_bias, n_rows,
    window, span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RM: tl.constexpr, DX: tl.constexpr, ENTRIES: tl.constexpr,
    MARKS_GRAD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # from the last row back: nearly all programs begin there, so that they ask for the same rows at about the same
    # time, and main memory is asked once for all of them
    for done in tl.range(0, end - begin, BM):
        rows = tl.multiple_of(end - BM - done, BM) + tl.arange(0, BM)
        q = _tile(q_ptr, rows, n_rows, H * K, K, BK, MASKED and not EVEN)
        grad_output = _tile(grad_output_ptr, rows, n_rows, H * V, V, BV, MASKED and not EVEN)
        if MASKED and not EVEN:
            lse = tl.load(lse_ptr + rows, mask=rows < n_rows, other=-ABSENT)
        else:
            lse = tl.load(lse_ptr + rows)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * LOG2E + (bias[:, None] - lse[None, :])
        p, own = _column_weights(
            x, rows, columns, since, until, sources, bits_ptr, channel_bias, window, span, words, C, ENTRIES, MASKED,
        )  # fmt: skip
        # logits and probabilities in full are gone before the next product's result comes: registers are what bounds
        # how many programs share a multiprocessor
        grad_v = tl.dot(p.to(q.dtype), grad_output, grad_v, input_precision=PRECISION)
        products = tl.dot(v, tl.trans(grad_output), input_precision=PRECISION)
        if (C == 1) or (R > 0):
            slope_features = _tile(slope_features_ptr, rows, n_rows, DX, DX, DX, MASKED and not EVEN)
        if C == 1:
            products = tl.dot(marks, tl.trans(slope_features), products, input_precision=PRECISION)
        else:
            products -= tl.load(through_ptr + rows, mask=rows < n_rows, other=0.0)[None, :]
            if R > 0:
                of_marks = tl.dot(marks, tl.trans(slope_features), input_precision=PRECISION)
                products += tl.where(own, of_marks, 0.0)
        slope = p * products
        if ENTRIES:
            grad_bias += tl.sum(slope, 1)
        grad_k = tl.dot(slope.to(q.dtype), q, grad_k, input_precision=PRECISION)
        if MARKS_GRAD:
            r = tl.arange(0, RM)
            keep = (rows < n_rows)[:, None] & (r < R)[None, :]
            grad = tl.load(grad_marks_ptr + rows[:, None] * H * R + r[None, :], mask=keep, other=0.0)
            if C > 1:
                p = tl.where(own, p, 0.0)
            grad_mark = tl.dot(p.to(q.dtype), grad.to(q.dtype), grad_mark, input_precision=PRECISION)
    return grad_k, grad_v, grad_bias, grad_mark


@triton.jit
def _row_range(since, until, columns, n_rows, n_columns, window, part, PARTS: tl.constexpr, C: tl.constexpr,
               ENTRIES: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Rows of this part that may see a tile of columns: first, first needing no mask, past those, past all."""
    if ENTRIES:
        living = (since < until) & (columns < n_columns)
        first = tl.min(tl.where(living, since, n_rows // C)) * C
        past = tl.max(tl.where(living, until, 0)) * C
        # dead entries carry a bias of -inf and need no mask; columns beyond the last one do
        full = tl.max(tl.where(living, since, 0)) * C
        full_past = tl.min(tl.where(living, until, n_rows // C)) * C
        full_past = tl.where(tl.max(columns) < n_columns, full_past, 0)
    else:
        first = tl.maximum(tl.min(columns) // C - window, 0) * C
        past = (tl.max(columns) // C) * C
        full = n_rows
        full_past = 0
    past = tl.minimum(past, n_rows)
    begin = tl.minimum(first, past) // BM
    end = tl.maximum(tl.cdiv(past, BM), begin)
    share = tl.cdiv(end - begin, PARTS)
    begin = tl.minimum(begin + part * share, end)
    end = tl.minimum(begin + share, end)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(full, BM), begin), end)
    full_end = tl.maximum(tl.minimum(full_past // BM, end), full_begin)
    return begin * BM, full_begin * BM, full_end * BM, end * BM


@triton.jit(do_not_specialize=VARYING)
def column_grad_kernel(
    q_ptr, keys_ptr, values_ptr, marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias_ptr,
    grad_output_ptr, grad_marks_ptr, lse_ptr, slope_features_ptr, through_ptr, grad_keys_ptr, grad_values_ptr,
    grad_bias_ptr, grad_mark_ptr, n_rows, n_columns, window, span, words, H: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RM: tl.constexpr,
    DX: tl.constexpr, ENTRIES: tl.constexpr, MARKS_GRAD: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of entries, or of the window's places: keys, values, biases [B, H, M] and marks [B, H, R, M].

    A leading axis of PARTS holds what each part of the rows gives.
    """
    n_tiles, part = tl.cdiv(n_columns, BN), tl.program_id(1)
    n_items = tl.num_programs(0) // n_tiles // H
    if ENTRIES:
        # early entries are seen by most rows: those of all heads go first, and the last programs are short
        tile = tl.program_id(0) // (n_items * H)
        item = (tl.program_id(0) % (n_items * H) // H).to(tl.int64)
        head = tl.program_id(0) % H
    else:
        tile = tl.program_id(0) % n_tiles
        item = (tl.program_id(0) // n_tiles // H).to(tl.int64)
        head = tl.program_id(0) // n_tiles % H
    columns = tile * BN + tl.arange(0, BN)
    inside = columns < n_columns
    of_keys, of_values = (item * n_columns * H + head) * K, (item * n_columns * H + head) * V
    k = _tile(keys_ptr + of_keys, columns, n_columns, H * K, K, BK, True)
    v = _tile(values_ptr + of_values, columns, n_columns, H * V, V, BV, True)
    marks = _tile(marks_ptr + item * n_columns * DX, columns, n_columns, DX, DX, DX, True)
    since, until, sources = columns, columns, columns
    if ENTRIES:
        bias_ptr += (item * H + head) * n_columns
        base = item * n_columns
        since, until = _life(from_ptr + base, until_ptr + base, columns, n_columns)
        if C > 1:
            sources = tl.load(source_ptr + item * n_columns + columns, mask=inside, other=0)
    else:
        bias_ptr += item * n_columns
    bias = tl.load(bias_ptr + columns, mask=inside, other=ABSENT)
    q_ptr += (item * n_rows * H + head) * K
    grad_output_ptr += (item * n_rows * H + head) * V
    grad_marks_ptr += (item * n_rows * H + head) * R
    lse_ptr += (item * H + head) * n_rows
    slope_features_ptr += (item * H + head) * n_rows * DX
    through_ptr += (item * H + head) * n_rows
    bits_ptr += item * C * words
    channel_bias = tl.load(channel_bias_ptr + head).to(tl.float32) * LOG2E
    grad_k = tl.zeros([BN, BK], tl.float32)
    grad_v = tl.zeros([BN, BV], tl.float32)
    grad_bias = tl.zeros([BN], tl.float32)
    grad_mark = tl.zeros([BN, RM], tl.float32)
    begin, full_begin, full_end, end = _row_range(
        since, until, columns, n_rows, n_columns, window, part, PARTS, C, ENTRIES, BM
    )
    if ENTRIES:
        grad_k, grad_v, grad_bias, grad_mark = _column_grad_rows(
            grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, full_end, end,
            q_ptr, lse_ptr, slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr, channel_bias,
            n_rows, window, span, words, H, C, K, V, R, BK, BV, RM, DX, ENTRIES, MARKS_GRAD, PRECISION, BM, True, EVEN,
        )  # fmt: skip
        grad_k, grad_v, grad_bias, grad_mark = _column_grad_rows(
            grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, full_begin,
            full_end, q_ptr, lse_ptr, slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr,
            channel_bias, n_rows, window, span, words, H, C, K, V, R, BK, BV, RM, DX, ENTRIES, MARKS_GRAD, PRECISION,
            BM, False, EVEN,
        )  # fmt: skip
    grad_k, grad_v, grad_bias, grad_mark = _column_grad_rows(
        grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, begin, full_begin,
        q_ptr, lse_ptr, slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr, channel_bias,
        n_rows, window, span, words, H, C, K, V, R, BK, BV, RM, DX, ENTRIES, MARKS_GRAD, PRECISION, BM, True, EVEN,
    )  # fmt: skip
    offset = (part * n_items).to(tl.int64) * n_columns * H
    _store(grad_keys_ptr + offset * K + of_keys, columns, n_columns, H * K, K, BK, grad_k)
    _store(grad_values_ptr + offset * V + of_values, columns, n_columns, H * V, V, BV, grad_v)
    if ENTRIES:
        tl.store(grad_bias_ptr + offset + (item * H + head) * n_columns + columns, grad_bias, mask=inside)
    if MARKS_GRAD:
        r = tl.arange(0, RM)
        place = grad_mark_ptr + offset * R + (item * H + head) * R * n_columns + r[None, :] * n_columns
        tl.store(place + columns[:, None], grad_mark, mask=inside[:, None] & (r < R)[None, :])
