"""Triton kernels of what comes after both branches: their mix, and the comparison of what was predicted and what came.

Letters as in ``layer_triton_kernels.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamts.ops.layer_triton_kernels import UNIT_EPS, VARYING, unit_rows, unit_rows_grad

__all__ = ["compared_kernel", "mix_grad_kernel", "mix_kernel"]

LARGEST_SCALE: tl.constexpr = tl.constexpr(5.0)
NEGLIGIBLE: tl.constexpr = tl.constexpr(1e-3)


@triton.jit
def _level(marks_ptr, now_ptr, exact_row, token, inside):
    """Level and scale of what was read, against now, and what their gradients need: 7 x [BT]."""
    share = tl.load(marks_ptr + exact_row * 3 + 2, mask=inside, other=0.0)
    now_level = tl.load(now_ptr + token * 3, mask=inside, other=0.0)
    now_scale = tl.load(now_ptr + token * 3 + 1, mask=inside, other=0.0)
    apart = tl.load(marks_ptr + exact_row * 3, mask=inside, other=0.0) - share * now_level
    spread = tl.load(marks_ptr + exact_row * 3 + 1, mask=inside, other=0.0) - share * now_scale
    shrink = tl.exp(-now_scale)
    x = apart * shrink
    size = tl.abs(x)
    level = tl.log(size + tl.sqrt(size * size + 1.0))
    level = tl.where(x < 0, -level, level)
    clamped = tl.minimum(tl.maximum(spread, -LARGEST_SCALE), LARGEST_SCALE)
    return level, clamped, x, spread, shrink, now_level, now_scale


@triton.jit
def _branch(x, gain_ptr, head, units, good, K: tl.constexpr):
    """Head norm without its gain, the gain, and its factor: [BT, BK], [BK], [BT]."""
    normed, factor = unit_rows(x, K)
    return normed, tl.load(gain_ptr + head * K + units, mask=good, other=0.0), factor


@triton.jit(do_not_specialize=VARYING)
def mix_kernel(
    recurrent_ptr, exact_ptr, marks_ptr, now_ptr, gates_ptr, opened_ptr, recurrent_gain_ptr, exact_gain_ptr, from_ptr,
    out_ptr, n_tokens, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Both branches normed, gated and added: [S, N, H, K], [B, N, C, H, K] -> [S, N, D]."""
    tiles = tl.cdiv(n_tokens, BT)
    stream, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    item, channel, head = stream // C, stream % C, tl.program_id(1)
    rows, units = tile * BT + tl.arange(0, BT), tl.arange(0, BK)
    inside, good = rows < n_tokens, units < K
    there = inside[:, None] & good[None, :]
    token = stream * n_tokens + rows
    exact_row = ((item * n_tokens + rows) * C + channel) * H + head
    place = (token * H + head)[:, None] * K + units[None, :]
    recurrent = tl.load(recurrent_ptr + place, mask=there, other=0.0).to(tl.float32)
    exact = tl.load(exact_ptr + exact_row[:, None] * K + units[None, :], mask=there, other=0.0).to(tl.float32)
    level, spread, _, _, _, _, _ = _level(marks_ptr, now_ptr, exact_row, token, inside)
    of_level = tl.load(from_ptr + (head * 2) * K + units, mask=good, other=0.0)
    of_spread = tl.load(from_ptr + (head * 2 + 1) * K + units, mask=good, other=0.0)
    exact += level[:, None] * of_level[None, :] + spread[:, None] * of_spread[None, :]
    normed, gain, _ = _branch(recurrent, recurrent_gain_ptr, head, units, good, K)
    exact_normed, exact_gain, _ = _branch(exact, exact_gain_ptr, head, units, good, K)
    gate = tl.sigmoid(tl.load(gates_ptr + (token * 4 + 2) * H + head, mask=inside, other=0.0).to(tl.float32))
    exact_gate = tl.sigmoid(tl.load(gates_ptr + (token * 4 + 3) * H + head, mask=inside, other=0.0).to(tl.float32))
    both = gate[:, None] * normed * gain[None, :] + exact_gate[:, None] * exact_normed * exact_gain[None, :]
    opened = tl.load(opened_ptr + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, both * tl.sigmoid(opened), mask=there)


@triton.jit(do_not_specialize=VARYING)
def mix_grad_kernel(
    recurrent_ptr, exact_ptr, marks_ptr, now_ptr, gates_ptr, opened_ptr, recurrent_gain_ptr, exact_gain_ptr, from_ptr,
    dout_ptr, drecurrent_ptr, dexact_ptr, dmarks_ptr, dgates_ptr, dopened_ptr, dparts_ptr, n_tokens, C: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Gradients of all of them; of both gains and of both maps of marks in parts, [T, H, 4, K]."""
    tiles = tl.cdiv(n_tokens, BT * LOOP)
    stream, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    item, channel, head = stream // C, stream % C, tl.program_id(1)
    units = tl.arange(0, BK)
    good = units < K
    of_level = tl.load(from_ptr + (head * 2) * K + units, mask=good, other=0.0)
    of_spread = tl.load(from_ptr + (head * 2 + 1) * K + units, mask=good, other=0.0)
    # summed over rows once, at the end: a sum across threads for every tile would take longer than the tile
    sum_gain, sum_exact_gain = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    sum_level, sum_spread = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    first = tile * BT * LOOP
    for start in tl.range(first, tl.minimum(first + BT * LOOP, n_tokens), BT):
        rows = start + tl.arange(0, BT)
        inside = rows < n_tokens
        there = inside[:, None] & good[None, :]
        token = stream * n_tokens + rows
        exact_row = ((item * n_tokens + rows) * C + channel) * H + head
        place = (token * H + head)[:, None] * K + units[None, :]
        exact_place = exact_row[:, None] * K + units[None, :]
        recurrent = tl.load(recurrent_ptr + place, mask=there, other=0.0).to(tl.float32)
        exact = tl.load(exact_ptr + exact_place, mask=there, other=0.0).to(tl.float32)
        level, spread, x, raw_spread, shrink, now_level, now_scale = _level(
            marks_ptr, now_ptr, exact_row, token, inside
        )
        exact += level[:, None] * of_level[None, :] + spread[:, None] * of_spread[None, :]
        normed, gain, factor = _branch(recurrent, recurrent_gain_ptr, head, units, good, K)
        exact_normed, exact_gain, exact_factor = _branch(exact, exact_gain_ptr, head, units, good, K)
        gate_place = (token * 4 + 2) * H + head
        gate = tl.sigmoid(tl.load(gates_ptr + gate_place, mask=inside, other=0.0).to(tl.float32))
        exact_gate = tl.sigmoid(tl.load(gates_ptr + gate_place + H, mask=inside, other=0.0).to(tl.float32))
        of_recurrent, of_exact = normed * gain[None, :], exact_normed * exact_gain[None, :]
        open = tl.sigmoid(tl.load(opened_ptr + place, mask=there, other=0.0).to(tl.float32))
        grad = tl.load(dout_ptr + place, mask=there, other=0.0).to(tl.float32)
        both = gate[:, None] * of_recurrent + exact_gate[:, None] * of_exact
        tl.store(dopened_ptr + place, grad * both * open * (1.0 - open), mask=there)
        grad *= open
        tl.store(dgates_ptr + gate_place, tl.sum(grad * of_recurrent, 1) * gate * (1.0 - gate), mask=inside)
        tl.store(dgates_ptr + gate_place + H, tl.sum(grad * of_exact, 1) * exact_gate * (1.0 - exact_gate), mask=inside)
        of_gain = gate[:, None] * grad
        sum_gain += of_gain * normed
        drecurrent = unit_rows_grad(of_gain * gain[None, :], normed, factor, K)
        tl.store(drecurrent_ptr + place, drecurrent, mask=there)
        of_gain = exact_gate[:, None] * grad
        sum_exact_gain += of_gain * exact_normed
        dexact = unit_rows_grad(of_gain * exact_gain[None, :], exact_normed, exact_factor, K)
        tl.store(dexact_ptr + exact_place, dexact, mask=there)
        sum_level += dexact * level[:, None]
        sum_spread += dexact * spread[:, None]
        dapart = tl.sum(dexact * of_level[None, :], 1) * shrink / tl.sqrt(x * x + 1.0)
        dspread = tl.sum(dexact * of_spread[None, :], 1)
        dspread = tl.where(tl.abs(raw_spread) <= LARGEST_SCALE, dspread, 0.0)
        tl.store(dmarks_ptr + exact_row * 3, dapart, mask=inside)
        tl.store(dmarks_ptr + exact_row * 3 + 1, dspread, mask=inside)
        tl.store(dmarks_ptr + exact_row * 3 + 2, -(dapart * now_level + dspread * now_scale), mask=inside)
    parts = dparts_ptr + (tl.program_id(0).to(tl.int64) * H + head) * 4 * K + units
    tl.store(parts, tl.sum(sum_gain, 0), mask=good)
    tl.store(parts + K, tl.sum(sum_exact_gain, 0), mask=good)
    tl.store(parts + 2 * K, tl.sum(sum_level, 0), mask=good)
    tl.store(parts + 3 * K, tl.sum(sum_spread, 0), mask=good)


@triton.jit(do_not_specialize=VARYING)
def compared_kernel(
    error_ptr, values_ptr, beta_ptr, squared_ptr, surprise_ptr, n_tokens, WRITTEN: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Squared error and surprise of vectors, 2 x [n, K] -> 2 x [n]; of what was written, error times gate, too."""
    rows, units = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BK)
    inside = rows < n_tokens
    there = inside[:, None] & (units < K)[None, :]
    place = rows[:, None] * K + units[None, :]
    error = tl.load(error_ptr + place, mask=there, other=0.0).to(tl.float32)
    if WRITTEN:
        error = error / tl.load(beta_ptr + rows, mask=inside, other=1.0)[:, None]
    value = tl.load(values_ptr + place, mask=there, other=0.0).to(tl.float32)
    prediction = value - error
    predicted, actual = tl.sqrt(tl.sum(prediction * prediction, 1)), tl.sqrt(tl.sum(value * value, 1))
    cosine = tl.sum(prediction * value, 1) / tl.maximum(predicted * actual, UNIT_EPS)
    unlike = tl.where((predicted < actual * NEGLIGIBLE) | (actual == 0.0), 1.0, 1.0 - cosine)
    tl.store(squared_ptr + rows, tl.sum(error * error, 1), mask=inside)
    tl.store(surprise_ptr + rows, unlike, mask=inside)
