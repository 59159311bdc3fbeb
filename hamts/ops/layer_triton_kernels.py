"""Triton kernels of what lies between projections and both branches, each one pass over memory.

A program takes a tile of tokens of one stream (an item's channel) and one head. All arithmetic is in float32; inputs
and outputs are in what the products run in. Sums over tokens are left as one part for each tile of tokens, which the
caller adds up: no kernel adds into memory that another program writes.

S streams, B C · B items · C channels · N patches · H heads · K key (= V value) · D width, H K · W window patches
T tiles of tokens · BT tokens of a tile · BK width of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "NORM_EPS",
    "TAPS",
    "UNIT_EPS",
    "VARYING",
    "inputs_grad_kernel",
    "inputs_kernel",
    "queries_grad_kernel",
    "queries_kernel",
    "unit_rows",
    "unit_rows_grad",
    "written_grad_kernel",
]

# sizes that change from call to call: no kernel is compiled anew for them
VARYING = ("n_tokens", "window")
TAPS: tl.constexpr = tl.constexpr(4)
NORM_EPS: tl.constexpr = tl.constexpr(1e-6)
UNIT_EPS: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def _tap(mixed_ptr, tail_ptr, present_ptr, stream, item, low, BT: tl.constexpr, columns, good, n_tokens, width):
    """BT rows of a stream's projections from ``low`` on, the carried ones at -3 .. -1; absent tokens are 0."""
    index = low + tl.arange(0, BT)
    inside = (index >= 0) & (index < n_tokens)
    here = inside[:, None] & good[None, :]
    x = tl.load(mixed_ptr + (stream * n_tokens + index)[:, None] * width + columns[None, :], mask=here, other=0.0)
    there = tl.load(present_ptr + item * n_tokens + index, mask=inside, other=0) != 0
    rows = tl.where(there[:, None], x.to(tl.float32), 0.0)
    # the first tile alone reaches back
    if low < 0:
        carried = (index < 0) & (index >= 1 - TAPS)
        old = tl.load(
            tail_ptr + (stream * (TAPS - 1) + index + TAPS - 1)[:, None] * width + columns[None, :],
            mask=carried[:, None] & good[None, :],
            other=0.0,
        )
        rows += old.to(tl.float32)
    return rows


@triton.jit
def _convolved(
    mixed_ptr, tail_ptr, present_ptr, conv_ptr, stream, item, start, BT: tl.constexpr, columns, good, n_tokens, width
):
    """Sum over taps of BT rows from ``start`` on, [BT, BK]."""
    weight = tl.load(conv_ptr + columns * TAPS, mask=good, other=0.0).to(tl.float32)
    low = start - (TAPS - 1)
    z = weight[None, :] * _tap(mixed_ptr, tail_ptr, present_ptr, stream, item, low, BT, columns, good, n_tokens, width)
    for tap in tl.static_range(1, TAPS):
        weight = tl.load(conv_ptr + columns * TAPS + tap, mask=good, other=0.0).to(tl.float32)
        z += weight[None, :] * _tap(
            mixed_ptr, tail_ptr, present_ptr, stream, item, low + tap, BT, columns, good, n_tokens, width
        )  # fmt: skip
    return z


@triton.jit
def _angles(cos_ptr, sin_ptr, item, rows, units, inside, n_tokens, PAIRS: tl.constexpr):
    """What a unit is multiplied by, and its partner, [BT, BK] each: the first two PAIRS of units turn."""
    turns = units < 2 * PAIRS
    pair = tl.where(units < PAIRS, units, units - PAIRS)
    place = (item * n_tokens + rows)[:, None] * PAIRS + pair[None, :]
    use = inside[:, None] & turns[None, :]
    cosine = tl.load(cos_ptr + place, mask=use, other=1.0)
    sine = tl.load(sin_ptr + place, mask=use, other=0.0)
    return cosine, tl.where((units < PAIRS)[None, :], -sine, sine)


@triton.jit
def _partner(units, PAIRS: tl.constexpr):
    return tl.where(units < PAIRS, units + PAIRS, tl.where(units < 2 * PAIRS, units - PAIRS, units))


@triton.jit
def unit_rows(x, K: tl.constexpr):
    """Rows of root mean square 1, [BT, BK], and the factors, [BT], that made them so."""
    factor = tl.rsqrt(tl.sum(x * x, 1) / K + NORM_EPS)
    return x * factor[:, None], factor


@triton.jit
def unit_rows_grad(inner, normed, factor, K: tl.constexpr):
    """Gradient of the rows before ``unit_rows``, from that of the rows after it, [BT, BK]."""
    mean = tl.sum(inner * normed, 1) / K
    return factor[:, None] * (inner - normed * mean[:, None])


@triton.jit
def _turned(
    raw_ptr, raw, gain_ptr, base, cos_ptr, sin_ptr, item, rows, units, inside, good, n_tokens, head, K: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Head norm and rotation of raw vectors, [BT, BK], whose rows begin at ``base``, [BT]."""
    normed, factor = unit_rows(raw, K)
    gain = tl.load(gain_ptr + head * K + units, mask=good, other=0.0)
    value = normed * gain[None, :]
    if PAIRS:
        partner = _partner(units, PAIRS)
        cosine, sine = _angles(cos_ptr, sin_ptr, item, rows, units, inside, n_tokens, PAIRS)
        there = inside[:, None] & good[None, :]
        other = tl.load(raw_ptr + base[:, None] + partner[None, :], mask=there, other=0.0).to(tl.float32)
        other_gain = tl.load(gain_ptr + head * K + partner, mask=good, other=0.0)
        value = value * cosine + other * factor[:, None] * other_gain[None, :] * sine
    return value


@triton.jit
def _turned_grad(
    grad_ptr, base, raw, gain_ptr, cos_ptr, sin_ptr, item, rows, units, inside, good, n_tokens, head, scale,
    K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw vectors, [BT, BK], and of the gain, [BK]."""
    there = inside[:, None] & good[None, :]
    grad = tl.load(grad_ptr + base[:, None] + units[None, :], mask=there, other=0.0).to(tl.float32)
    if PAIRS:
        partner = _partner(units, PAIRS)
        cosine, sine = _angles(cos_ptr, sin_ptr, item, rows, units, inside, n_tokens, PAIRS)
        other = tl.load(grad_ptr + base[:, None] + partner[None, :], mask=there, other=0.0).to(tl.float32)
        grad = grad * cosine - other * sine
    grad *= scale
    normed, factor = unit_rows(raw, K)
    gain = tl.load(gain_ptr + head * K + units, mask=good, other=0.0)
    return unit_rows_grad(grad * gain[None, :], normed, factor, K), tl.sum(grad * normed, 0)


@triton.jit(do_not_specialize=VARYING)
def inputs_kernel(
    mixed_ptr, tail_ptr, present_ptr, conv_ptr, gain_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr,
    n_tokens, window, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Projections [S, N, 3 D] -> what the recurrence takes, 3 x [S, N, H, K], and the read, 2 x [B, W + N, C, H, K]."""
    tiles = tl.cdiv(n_tokens, BT)
    stream, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    item, channel = stream // C, stream % C
    head, part = tl.program_id(1), tl.program_id(2)
    rows, units = tile * BT + tl.arange(0, BT), tl.arange(0, BK)
    inside, good = rows < n_tokens, units < K
    there = inside[:, None] & good[None, :]
    width = 3 * H * K
    columns = (part * H + head) * K + units
    start = tile * BT
    z = _convolved(mixed_ptr, tail_ptr, present_ptr, conv_ptr, stream, item, start, BT, columns, good, n_tokens, width)
    y = z * tl.sigmoid(z)
    place = ((stream * n_tokens + rows) * H + head)[:, None] * K + units[None, :]
    raw = _tap(mixed_ptr, tail_ptr, present_ptr, stream, item, start, BT, columns, good, n_tokens, width)
    row = ((item * (window + n_tokens) + window + rows) * C + channel) * H + head
    target = row[:, None] * K + units[None, :]
    if part == 2:
        tl.store(v_ptr + place, y, mask=there)
        tl.store(values_ptr + target, raw, mask=there)
    else:
        size = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), UNIT_EPS)
        y = y / size[:, None]
        if part == 0:
            tl.store(q_ptr + place, y, mask=there)
        else:
            tl.store(k_ptr + place, y, mask=there)
            base = (stream * n_tokens + rows) * width + (H + head) * K
            keys = _turned(
                mixed_ptr, raw, gain_ptr, base, cos_ptr, sin_ptr, item, rows, units, inside, good, n_tokens, head, K,
                PAIRS,
            )  # fmt: skip
            present = tl.load(present_ptr + item * n_tokens + rows, mask=inside, other=0) != 0
            tl.store(keys_ptr + target, tl.where(present[:, None], keys, 0.0), mask=there)


@triton.jit(do_not_specialize=VARYING)
def written_grad_kernel(
    mixed_ptr, tail_ptr, present_ptr, conv_ptr, dq_ptr, dk_ptr, dv_ptr, dz_ptr, dconv_ptr, n_tokens, C: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums over taps, [S, N, 3 D], and parts of that of the taps, [T, TAPS, 3 D]."""
    tiles = tl.cdiv(n_tokens, BT * LOOP)
    stream, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    item = stream // C
    head, part = tl.program_id(1), tl.program_id(2)
    units = tl.arange(0, BK)
    good = units < K
    width = 3 * H * K
    columns = (part * H + head) * K + units
    w0 = tl.load(conv_ptr + columns * TAPS, mask=good, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(conv_ptr + columns * TAPS + 1, mask=good, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(conv_ptr + columns * TAPS + 2, mask=good, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(conv_ptr + columns * TAPS + 3, mask=good, other=0.0).to(tl.float32)[None, :]
    # summed over rows once, at the end: a sum across threads for every tile would take longer than the tile
    of0, of1 = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    of2, of3 = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    first = tile * BT * LOOP
    for start in tl.range(first, tl.minimum(first + BT * LOOP, n_tokens), BT):
        rows = start + tl.arange(0, BT)
        there = (rows < n_tokens)[:, None] & good[None, :]
        x0 = _tap(mixed_ptr, tail_ptr, present_ptr, stream, item, start - 3, BT, columns, good, n_tokens, width)
        x1 = _tap(mixed_ptr, tail_ptr, present_ptr, stream, item, start - 2, BT, columns, good, n_tokens, width)
        x2 = _tap(mixed_ptr, tail_ptr, present_ptr, stream, item, start - 1, BT, columns, good, n_tokens, width)
        x3 = _tap(mixed_ptr, tail_ptr, present_ptr, stream, item, start, BT, columns, good, n_tokens, width)
        z = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        open = tl.sigmoid(z)
        place = ((stream * n_tokens + rows) * H + head)[:, None] * K + units[None, :]
        if part == 2:
            grad = tl.load(dv_ptr + place, mask=there, other=0.0).to(tl.float32)
        else:
            if part == 0:
                grad = tl.load(dq_ptr + place, mask=there, other=0.0).to(tl.float32)
            else:
                grad = tl.load(dk_ptr + place, mask=there, other=0.0).to(tl.float32)
            y = z * open
            size = tl.sqrt(tl.sum(y * y, 1))
            shrink = 1.0 / tl.maximum(size, UNIT_EPS)
            unit = y * shrink[:, None]
            along = tl.where(size > UNIT_EPS, tl.sum(grad * unit, 1), 0.0)
            grad = (grad - unit * along[:, None]) * shrink[:, None]
        dz = tl.where(there, grad * open * (1.0 + z * (1.0 - open)), 0.0)
        tl.store(dz_ptr + (stream * n_tokens + rows)[:, None] * width + columns[None, :], dz, mask=there)
        of0 += dz * x0
        of1 += dz * x1
        of2 += dz * x2
        of3 += dz * x3
    target = dconv_ptr + (tl.program_id(0).to(tl.int64) * TAPS) * width + columns
    tl.store(target, tl.sum(of0, 0), mask=good)
    tl.store(target + width, tl.sum(of1, 0), mask=good)
    tl.store(target + 2 * width, tl.sum(of2, 0), mask=good)
    tl.store(target + 3 * width, tl.sum(of3, 0), mask=good)


@triton.jit(do_not_specialize=VARYING)
def inputs_grad_kernel(
    mixed_ptr, present_ptr, conv_ptr, gain_ptr, cos_ptr, sin_ptr, dz_ptr, dkeys_ptr, dvalues_ptr, dmixed_ptr, dtail_ptr,
    dgain_ptr, n_tokens, window, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    PAIRS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradient of the projections, [S, N, 3 D], of the carried ones, [S, 3, 3 D], and parts of that of the gain."""
    tiles = tl.cdiv(n_tokens + TAPS - 1, BT)
    stream, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    item, channel = stream // C, stream % C
    head, part = tl.program_id(1), tl.program_id(2)
    # the carried tokens come first
    rows, units = tile * BT + tl.arange(0, BT) - (TAPS - 1), tl.arange(0, BK)
    inside, good = (rows >= 0) & (rows < n_tokens), units < K
    there = inside[:, None] & good[None, :]
    width = 3 * H * K
    columns = (part * H + head) * K + units
    grad = tl.zeros([BT, BK], tl.float32)
    for tap in tl.static_range(TAPS):
        weight = tl.load(conv_ptr + columns * TAPS + tap, mask=good, other=0.0).to(tl.float32)
        index = rows + (TAPS - 1) - tap
        use = ((index >= 0) & (index < n_tokens))[:, None] & good[None, :]
        dz = tl.load(dz_ptr + (stream * n_tokens + index)[:, None] * width + columns[None, :], mask=use, other=0.0)
        grad += weight[None, :] * dz.to(tl.float32)
    carried = (rows < 0)[:, None] & good[None, :]
    target = (stream * (TAPS - 1) + rows + TAPS - 1)[:, None] * width + columns[None, :]
    tl.store(dtail_ptr + target, grad, mask=carried)
    row = ((item * (window + n_tokens) + window + rows) * C + channel) * H + head
    if part == 2:
        source = dvalues_ptr + row[:, None] * K + units[None, :]
        grad += tl.load(source, mask=there, other=0.0).to(tl.float32)
    present = (tl.load(present_ptr + item * n_tokens + rows, mask=inside, other=0) != 0)[:, None]
    if part == 1:
        place = (stream * n_tokens + rows)[:, None] * width + columns[None, :]
        raw = tl.where(present, tl.load(mixed_ptr + place, mask=there, other=0.0).to(tl.float32), 0.0)
        draw, dgain = _turned_grad(
            dkeys_ptr, row * K, raw, gain_ptr, cos_ptr, sin_ptr, item, rows, units, inside, good, n_tokens, head, 1.0,
            K, PAIRS,
        )  # fmt: skip
        grad += draw
        tl.store(dgain_ptr + (tl.program_id(0).to(tl.int64) * H + head) * K + units, dgain, mask=good)
    grad = tl.where(present, grad, 0.0)
    tl.store(dmixed_ptr + (stream * n_tokens + rows)[:, None] * width + columns[None, :], grad, mask=there)


@triton.jit(do_not_specialize=VARYING)
def queries_kernel(
    raw_ptr, gain_ptr, cos_ptr, sin_ptr, out_ptr, scale, n_tokens, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, PAIRS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Queries of the read: [S, N, D] -> [B, N, C, H, K], normed, turned and scaled."""
    tiles = tl.cdiv(n_tokens, BT)
    stream, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    item, channel, head = stream // C, stream % C, tl.program_id(1)
    rows, units = tile * BT + tl.arange(0, BT), tl.arange(0, BK)
    inside, good = rows < n_tokens, units < K
    there = inside[:, None] & good[None, :]
    base = ((stream * n_tokens + rows) * H + head) * K
    raw = tl.load(raw_ptr + base[:, None] + units[None, :], mask=there, other=0.0).to(tl.float32)
    value = _turned(
        raw_ptr, raw, gain_ptr, base, cos_ptr, sin_ptr, item, rows, units, inside, good, n_tokens, head, K, PAIRS
    )  # fmt: skip
    target = (((item * n_tokens + rows) * C + channel) * H + head)[:, None] * K + units[None, :]
    tl.store(out_ptr + target, value * scale, mask=there)


@triton.jit(do_not_specialize=VARYING)
def queries_grad_kernel(
    raw_ptr, gain_ptr, cos_ptr, sin_ptr, dout_ptr, draw_ptr, dgain_ptr, scale, n_tokens, C: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw queries, [S, N, D], and parts of that of the gain, [T, H, K]."""
    tiles = tl.cdiv(n_tokens, BT)
    stream, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    item, channel, head = stream // C, stream % C, tl.program_id(1)
    rows, units = tile * BT + tl.arange(0, BT), tl.arange(0, BK)
    inside, good = rows < n_tokens, units < K
    there = inside[:, None] & good[None, :]
    place = ((stream * n_tokens + rows) * H + head)[:, None] * K + units[None, :]
    raw = tl.load(raw_ptr + place, mask=there, other=0.0).to(tl.float32)
    base = (((item * n_tokens + rows) * C + channel) * H + head) * K
    draw, dgain = _turned_grad(
        dout_ptr, base, raw, gain_ptr, cos_ptr, sin_ptr, item, rows, units, inside, good, n_tokens, head, scale, K,
        PAIRS,
    )  # fmt: skip
    tl.store(draw_ptr + place, draw, mask=there)
    tl.store(dgain_ptr + (tl.program_id(0).to(tl.int64) * H + head) * K + units, dgain, mask=good)
