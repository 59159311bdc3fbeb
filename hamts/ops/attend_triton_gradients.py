"""Triton kernels of the read's gradient and masses. Words and letters as in ``attend_triton_kernels.py``.

A tile of rows gathers the gradient of its queries; a tile of columns that of its keys, values, biases and marks, from
all rows that see it, in one program or in parts that are added afterwards in a fixed order.

Source: FlashAttention-2 (arXiv 2307.08691), with the two gradients in kernels of their own, hence no atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamts.ops.attend_triton_kernels import (
    ABSENT,
    FEATURES,
    LOG2E,
    VARYING,
    _entry_logits,
    _local_logits,
    _part,
    _row_features,
    _store,
    _tile,
)

__all__ = ["column_grad_kernel", "query_grad_kernel"]


@triton.jit
def _slope_features(
    grad_marks_ptr, through, rows, n_rows, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, DX: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Features of rows that meet the marks of columns, [BM, DX]; with one channel also minus output x gradient."""
    number = tl.arange(0, DX)[None, :]
    which = number % 6
    keep = (rows < n_rows)[:, None] & (number < 6 * R)
    grad = tl.load(grad_marks_ptr + rows[:, None] * H * R + number // 6, mask=keep, other=0.0)
    # products of the parts (0 0) (1 0) (2 0) (0 1) (1 1) (0 2); see _mark_features in attend_triton.py
    part = tl.where(which < 3, which, tl.where(which == 4, 1, 0))
    if NARROW:
        features = _part(grad, part, NARROW).to(tl.float32)
    else:
        features = tl.where(which == 0, grad, 0.0)
    if C == 1:
        of_output = _part(-through[:, None] + 0.0 * number, number - 6 * R, NARROW).to(tl.float32)
        features = tl.where((number >= 6 * R) & (number < 6 * R + 3), of_output, features)
    if NARROW:
        features = features.to(tl.bfloat16)
    return features


@triton.jit
def _query_grad_tile(
    grad, own_sum, q, q_features, grad_output, slope_features, through, row, column, ends, sources, k, v, bias, marks,
    bits_ptr, channel_bias, n_rows, window, span, words, C: tl.constexpr, R: tl.constexpr, ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one tile of columns gives to the gradient of queries."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = tl.dot(q_features, tl.trans(bias), s, input_precision=PRECISION)
    products = tl.dot(grad_output, tl.trans(v), input_precision=PRECISION)
    if C == 1:
        products = tl.dot(slope_features, tl.trans(marks), products, input_precision=PRECISION)
    if ENTRIES:
        s, own = _entry_logits(s, row, ends, sources, bits_ptr, channel_bias, n_rows, words, C, MASKED)
    else:
        s, own = _local_logits(s, row, column, bits_ptr, channel_bias, window, span, words, C)
    if C > 1:
        products -= through[:, None]
        if R > 0:
            of_marks = tl.dot(slope_features, tl.trans(marks), input_precision=PRECISION)
            products += tl.where(own, of_marks, 0.0)
    slope = tl.exp2(s * LOG2E) * products
    if C > 1:
        own_sum += tl.sum(tl.where(own, slope, 0.0), 1)
    grad = tl.dot(slope.to(k.dtype), k, grad, input_precision=PRECISION)
    return grad, own_sum


@triton.jit
def _query_grad_entries(
    grad, own_sum, q, q_features, grad_output, slope_features, through, row, begin, end, keys_ptr, values_ptr,
    marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries, words,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DX: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(begin, end):
        entry = tile * BN + tl.arange(0, BN)
        inside = entry < n_entries
        k = _tile(keys_ptr, entry, n_entries, H * K, K, BK, MASKED)
        v = _tile(values_ptr, entry, n_entries, H * V, V, BV, MASKED)
        bias = _tile(bias_ptr, entry, n_entries, FEATURES, FEATURES, FEATURES, MASKED)
        marks = _tile(marks_ptr, entry, n_entries, DX, DX, DX, MASKED)
        since, until, sources = entry[None, :], entry[None, :], entry[None, :]
        if MASKED:
            since = tl.load(from_ptr + entry, mask=inside, other=0)[None, :]
            until = tl.load(until_ptr + entry, mask=inside, other=0)[None, :]
        if C > 1:
            sources = tl.load(source_ptr + entry, mask=inside, other=0)[None, :]
        grad, own_sum = _query_grad_tile(
            grad, own_sum, q, q_features, grad_output, slope_features, through, row, entry[None, :], (since, until),
            sources, k, v, bias, marks, bits_ptr, channel_bias, n_rows, words, words, words, C, R, True, PRECISION,
            MASKED,
        )  # fmt: skip
    return grad, own_sum


@triton.jit(do_not_specialize=VARYING)
def query_grad_kernel(
    q_ptr, local_keys_ptr, local_values_ptr, local_marks_ptr, local_bias_ptr, keys_ptr, values_ptr, marks_ptr, bias_ptr,
    from_ptr, until_ptr, source_ptr, bounds_ptr, bits_ptr, channel_bias_ptr, output_ptr, marked_ptr, lse_ptr,
    grad_output_ptr, grad_marks_ptr, q_features_ptr, slope_features_ptr, through_ptr, grad_q_ptr, own_ptr, n_rows,
    n_local, n_entries, window, span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DX: tl.constexpr, ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries [B, NC, H, K] and the channel bias's part [B, H, Q].

    Also, for the gradient of columns: features of rows [B, H, NC, FEATURES] and [B, H, NC, DX], and
    output x gradient [B, H, NC].
    """
    n_tiles = tl.cdiv(n_rows, BM)
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    item = (tl.program_id(0) // n_tiles // H).to(tl.int64)
    head = tl.program_id(0) // n_tiles % H
    rows = tl.multiple_of(tile * BM, BM) + tl.arange(0, BM)
    row = rows[:, None]
    q = _tile(q_ptr + (item * n_rows * H + head) * K, rows, n_rows, H * K, K, BK, True)
    of_values = (item * n_rows * H + head) * V
    grad_output = _tile(grad_output_ptr + of_values, rows, n_rows, H * V, V, BV, True)
    output = _tile(output_ptr + of_values, rows, n_rows, H * V, V, BV, True)
    through = tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)
    of_marks = (item * n_rows * H + head) * R
    for r in tl.static_range(R):
        marked = tl.load(marked_ptr + of_marks + rows * H * R + r, mask=rows < n_rows, other=0.0)
        through += marked * tl.load(grad_marks_ptr + of_marks + rows * H * R + r, mask=rows < n_rows, other=0.0)
    of_head = (item * H + head) * n_rows
    lse = tl.load(lse_ptr + of_head + rows, mask=rows < n_rows, other=-ABSENT)
    q_features = _row_features(lse, NARROW)
    slope_features = _slope_features(grad_marks_ptr + of_marks, through, rows, n_rows, H, C, R, DX, NARROW)
    _store(q_features_ptr + of_head * FEATURES, rows, n_rows, FEATURES, FEATURES, FEATURES, q_features)
    _store(slope_features_ptr + of_head * DX, rows, n_rows, DX, DX, DX, slope_features)
    if C > 1:
        tl.store(through_ptr + of_head + rows, through, mask=rows < n_rows)
    bits_ptr += item * C * words
    channel_bias = tl.load(channel_bias_ptr + head).to(tl.float32)
    grad = tl.zeros([BM, BK], tl.float32)
    own_sum = tl.zeros([BM], tl.float32)
    if ENTRIES:
        keys_ptr += (item * n_entries * H + head) * K
        values_ptr += (item * n_entries * H + head) * V
        marks_ptr += item * n_entries * DX
        bias_ptr += (item * H + head) * n_entries * FEATURES
        from_ptr += item * n_entries
        until_ptr += item * n_entries
        source_ptr += item * n_entries
        bounds_ptr += (item * n_tiles + tile) * 4
        begin, full_begin = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
        full_end, end = tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
        grad, own_sum = _query_grad_entries(
            grad, own_sum, q, q_features, grad_output, slope_features, through, row, begin, full_begin, keys_ptr,
            values_ptr, marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries,
            words, H, C, K, V, R, BK, BV, DX, BN, PRECISION, True,
        )  # fmt: skip
        grad, own_sum = _query_grad_entries(
            grad, own_sum, q, q_features, grad_output, slope_features, through, row, full_begin, full_end, keys_ptr,
            values_ptr, marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries,
            words, H, C, K, V, R, BK, BV, DX, BN, PRECISION, False,
        )  # fmt: skip
        grad, own_sum = _query_grad_entries(
            grad, own_sum, q, q_features, grad_output, slope_features, through, row, full_end, end, keys_ptr,
            values_ptr, marks_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias, n_rows, n_entries,
            words, H, C, K, V, R, BK, BV, DX, BN, PRECISION, True,
        )  # fmt: skip
    local_keys_ptr += (item * n_local * H + head) * K
    local_values_ptr += (item * n_local * H + head) * V
    local_marks_ptr += item * n_local * DX
    local_bias_ptr += item * n_local * FEATURES
    last = tl.minimum(tile * BM + BM, n_rows) - 1
    for start in tl.range((tile * BM // C + 1) * C, (last // C + window + 1) * C, BN):
        place = start + tl.arange(0, BN)
        k = _tile(local_keys_ptr, place, n_local, H * K, K, BK, True)
        v = _tile(local_values_ptr, place, n_local, H * V, V, BV, True)
        bias = _tile(local_bias_ptr, place, n_local, FEATURES, FEATURES, FEATURES, True)
        marks = _tile(local_marks_ptr, place, n_local, DX, DX, DX, True)
        nothing = (place[None, :], place[None, :])
        grad, own_sum = _query_grad_tile(
            grad, own_sum, q, q_features, grad_output, slope_features, through, row, place[None, :], nothing,
            place[None, :], k, v, bias, marks, bits_ptr, channel_bias, n_rows, window, span, words, C, R, False,
            PRECISION, True,
        )  # fmt: skip
    _store(grad_q_ptr + (item * n_rows * H + head) * K, rows, n_rows, H * K, K, BK, grad)
    if C > 1:
        tl.store(own_ptr + (item * H + head) * n_tiles + tile, tl.sum(own_sum))


@triton.jit
def _column_weights(
    s, rows, columns, since, until, sources, bits_ptr, channel_bias, n_rows, window, span, words, C: tl.constexpr,
    ENTRIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Probabilities, columns first [BN, BM], and which are of the row's own channel."""
    if ENTRIES:
        s, own = _entry_logits(
            s, rows[None, :], (since[:, None], until[:, None]), sources[:, None], bits_ptr, channel_bias, n_rows, words,
            C, MASKED,
        )  # fmt: skip
    else:
        s, own = _local_logits(s, rows[None, :], columns[:, None], bits_ptr, channel_bias, window, span, words, C)
    return tl.exp2(s * LOG2E), own


@triton.jit
def _column_grad_rows(
    grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, begin, end, q_ptr,
    q_features_ptr, slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr, channel_bias, n_rows,
    window, span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RM: tl.constexpr, DX: tl.constexpr, ENTRIES: tl.constexpr,
    MARKS_GRAD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, BM):
        rows = tl.multiple_of(start, BM) + tl.arange(0, BM)
        q = _tile(q_ptr, rows, n_rows, H * K, K, BK, MASKED)
        q_features = _tile(q_features_ptr, rows, n_rows, FEATURES, FEATURES, FEATURES, MASKED)
        grad_output = _tile(grad_output_ptr, rows, n_rows, H * V, V, BV, MASKED)
        # all products that wait for nothing come first, so that powers are taken while they run
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s = tl.dot(bias, tl.trans(q_features), s, input_precision=PRECISION)
        products = tl.dot(v, tl.trans(grad_output), input_precision=PRECISION)
        if C == 1:
            slope_features = _tile(slope_features_ptr, rows, n_rows, DX, DX, DX, MASKED)
            products = tl.dot(marks, tl.trans(slope_features), products, input_precision=PRECISION)
        p, own = _column_weights(
            s, rows, columns, since, until, sources, bits_ptr, channel_bias, n_rows, window, span, words, C, ENTRIES,
            MASKED,
        )  # fmt: skip
        if C > 1:
            products -= tl.load(through_ptr + rows, mask=rows < n_rows, other=0.0)[None, :]
            if R > 0:
                slope_features = _tile(slope_features_ptr, rows, n_rows, DX, DX, DX, MASKED)
                of_marks = tl.dot(marks, tl.trans(slope_features), input_precision=PRECISION)
                products += tl.where(own, of_marks, 0.0)
        grad_v = tl.dot(p.to(q.dtype), grad_output, grad_v, input_precision=PRECISION)
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
    grad_output_ptr, grad_marks_ptr, q_features_ptr, slope_features_ptr, through_ptr, grad_keys_ptr, grad_values_ptr,
    grad_bias_ptr, grad_mark_ptr, n_rows, n_columns, window, span, words, H: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RM: tl.constexpr,
    DX: tl.constexpr, ENTRIES: tl.constexpr, MARKS_GRAD: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of entries, or of the window's places: keys, values, biases [B, H, M] and marks [B, H, R, M].

    A leading axis of PARTS holds what each part of the rows gives.
    """
    n_tiles = tl.cdiv(n_columns, BN)
    tile, part = tl.program_id(0) % n_tiles, tl.program_id(1)
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
        bias_ptr += (item * H + head) * n_columns * FEATURES
        since = tl.load(from_ptr + item * n_columns + columns, mask=inside, other=0)
        until = tl.load(until_ptr + item * n_columns + columns, mask=inside, other=0)
        if C > 1:
            sources = tl.load(source_ptr + item * n_columns + columns, mask=inside, other=0)
    else:
        bias_ptr += item * n_columns * FEATURES
    bias = _tile(bias_ptr, columns, n_columns, FEATURES, FEATURES, FEATURES, True)
    q_ptr += (item * n_rows * H + head) * K
    grad_output_ptr += (item * n_rows * H + head) * V
    grad_marks_ptr += (item * n_rows * H + head) * R
    q_features_ptr += (item * H + head) * n_rows * FEATURES
    slope_features_ptr += (item * H + head) * n_rows * DX
    through_ptr += (item * H + head) * n_rows
    bits_ptr += item * C * words
    channel_bias = tl.load(channel_bias_ptr + head).to(tl.float32)
    grad_k = tl.zeros([BN, BK], tl.float32)
    grad_v = tl.zeros([BN, BV], tl.float32)
    grad_bias = tl.zeros([BN], tl.float32)
    grad_mark = tl.zeros([BN, RM], tl.float32)
    begin, full_begin, full_end, end = _row_range(
        since, until, columns, n_rows, n_columns, window, part, PARTS, C, ENTRIES, BM
    )
    grad_k, grad_v, grad_bias, grad_mark = _column_grad_rows(
        grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, begin, full_begin,
        q_ptr, q_features_ptr, slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr, channel_bias,
        n_rows, window, span, words, H, C, K, V, R, BK, BV, RM, DX, ENTRIES, MARKS_GRAD, PRECISION, BM, True,
    )  # fmt: skip
    if ENTRIES:
        grad_k, grad_v, grad_bias, grad_mark = _column_grad_rows(
            grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, full_begin,
            full_end, q_ptr, q_features_ptr, slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr,
            channel_bias, n_rows, window, span, words, H, C, K, V, R, BK, BV, RM, DX, ENTRIES, MARKS_GRAD, PRECISION,
            BM, False,
        )  # fmt: skip
        grad_k, grad_v, grad_bias, grad_mark = _column_grad_rows(
            grad_k, grad_v, grad_bias, grad_mark, k, v, bias, marks, columns, since, until, sources, full_end, end,
            q_ptr, q_features_ptr, slope_features_ptr, grad_output_ptr, grad_marks_ptr, through_ptr, bits_ptr,
            channel_bias, n_rows, window, span, words, H, C, K, V, R, BK, BV, RM, DX, ENTRIES, MARKS_GRAD, PRECISION,
            BM, True,
        )  # fmt: skip
    n_items = tl.num_programs(0) // n_tiles // H
    offset = (part * n_items).to(tl.int64) * n_columns * H
    _store(grad_keys_ptr + offset * K + of_keys, columns, n_columns, H * K, K, BK, grad_k)
    _store(grad_values_ptr + offset * V + of_values, columns, n_columns, H * V, V, BV, grad_v)
    if ENTRIES:
        tl.store(grad_bias_ptr + offset + (item * H + head) * n_columns + columns, grad_bias, mask=inside)
    if MARKS_GRAD:
        r = tl.arange(0, RM)
        place = grad_mark_ptr + offset * R + (item * H + head) * R * n_columns + r[None, :] * n_columns
        tl.store(place + columns[:, None], grad_mark, mask=inside[:, None] & (r < R)[None, :])
