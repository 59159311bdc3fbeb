"""The read of one step, for thousands of streams whose scratchpads differ in length.

One patch asks, so nothing but the bytes of keys and values counts. Each stream's entries, from its first living one to
its last, are cut into parts of one length: a long list is read by more programs than a short one, and none waits for
the longest. Programs are started for the capacity; those beyond a stream's last entry end at once. Sizes do not depend
on what was routed, nothing waits for the device, and a CUDA graph can hold the whole step. Entries of a stream lie side
by side, padded to the longest list, or in what all streams share: pages (``ops/pages.py``), or rows (``ops/pool.py``).
The loop is the same, and finds each tile through the stream's page numbers, or keys and values through their row's.

B streams · C channels · H heads · K key · V value · M capacity (entries) · W window patches · R marks · P parts
E entries of a page · T pages that a stream may hold
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hamts.ops.compact import recorded_length
from hamts.ops.types import ScratchKeys

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError(
        "The Triton kernels need the package triton, 3.7.1 or later. Install it with: pip install 'hamts[gpu]'."
    ) from missing

__all__ = ["MOST_CHANNELS", "TILE", "Paged", "attend_step"]

MOST_CHANNELS = 64
# programs wanted for each multiprocessor, and entries that a program reads, unless there are too few for all
PROGRAMS = 8
SHORTEST, LONGEST = 128, 1024
TILE, WARPS, STAGES = 64, 4, 3
# entries of a program that looks for the living, and parts that are joined at once
LIVES, JOINED = 1024, 16
VARYING = ("n_entries", "n_parts", "length", "window", "span", "table_width")
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _fold(top, total, output, marked, s, own, keep, keys_inside, v, marks_ptr, stride, R: tl.constexpr,
          RP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Fold a tile of logits [rows, BN] into the running softmax; marks in float32, one by one."""
    s = tl.where(keep, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    output = tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision=PRECISION)
    if R > 0:
        marked = marked * shrink[:, None]
        p = tl.where(own, p, 0.0)
        for r in tl.static_range(R):
            mark = tl.load(marks_ptr + r, mask=keys_inside, other=0.0)
            mean = tl.sum(p * mark[None, :], 1)
            marked += tl.where(tl.arange(0, RP)[None, :] == r, mean[:, None], 0.0)
    return new_top, total, output, marked


@triton.jit(do_not_specialize=VARYING)
def living_kernel(from_ptr, until_ptr, alive_ptr, ends_ptr, n_entries, BN: tl.constexpr):
    """Which entries the asking patch sees, int8 [B, M], and where they begin and end: [B, 2], M - first and last + 1.

    Ends start at 0. The largest of whole numbers does not depend on the order in which programs run.
    """
    stream, entry = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = entry < n_entries
    place = stream.to(tl.int64) * n_entries + entry
    since = tl.load(from_ptr + place, mask=inside, other=1)
    until = tl.load(until_ptr + place, mask=inside, other=0)
    alive = (since <= 0) & (until > 0) & inside
    tl.store(alive_ptr + place, alive.to(tl.int8), mask=inside)
    tl.atomic_max(ends_ptr + stream * 2, tl.max(tl.where(alive, n_entries - entry, 0)))
    tl.atomic_max(ends_ptr + stream * 2 + 1, tl.max(tl.where(alive, entry + 1, 0)))


@triton.jit
def _ends(ends_ptr, stream, n_entries, E: tl.constexpr):
    """A stream's first living entry, where its first part begins, and past its last; parts begin with a page."""
    past = tl.load(ends_ptr + stream * 2 + 1)
    first = tl.minimum(n_entries - tl.load(ends_ptr + stream * 2), past)
    origin = first
    if E > 0:
        origin = first // E * E
    return first, origin, past


@triton.jit
def _row(rows_ptr, place, inside, POOLED: tl.constexpr):
    """Where keys, values and marks of entries lie."""
    if POOLED:
        place = tl.load(rows_ptr + place, mask=inside, other=0)
    return place


@triton.jit(do_not_specialize=VARYING)
def step_kernel(
    q_ptr, local_keys_ptr, local_values_ptr, local_marks_ptr, present_ptr, keys_ptr, values_ptr, marks_ptr, bias_ptr,
    alive_ptr, source_ptr, rows_ptr, ends_ptr, readable_ptr, channel_bias_ptr, tops_ptr, totals_ptr, outputs_ptr,
    markeds_ptr, table_ptr, head_bias_ptr, n_entries, n_parts, length, window, span, bias_stride, table_width,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, CP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, POOLED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of one stream's entries for one head; the first part reads the window too."""
    head, part = tl.program_id(0) % H, tl.program_id(1)
    stream = (tl.program_id(0) // H).to(tl.int64)
    first, origin, end = _ends(ends_ptr, stream, n_entries, E)
    begin = origin + part * length
    if (part > 0) & (begin >= end):
        return
    channel = tl.arange(0, CP)
    at_k, at_v = tl.arange(0, BK), tl.arange(0, BV)
    row_inside = channel < C
    q = tl.load(
        q_ptr + ((stream * C + channel[:, None]) * H + head) * K + at_k[None, :],
        mask=row_inside[:, None] & (at_k < K)[None, :], other=0.0,
    )  # fmt: skip
    own_bias = tl.load(channel_bias_ptr + head) * LOG2E
    readable_ptr += stream * C * C
    top = tl.full([CP], LOWEST, tl.float32)
    total = tl.zeros([CP], tl.float32)
    output = tl.zeros([CP, BV], tl.float32)
    marked = tl.zeros([CP, RP], tl.float32)
    stop = tl.minimum(begin + length, end)
    for start in tl.range(begin, stop, BN):
        entry = start + tl.arange(0, BN)
        inside = entry < stop
        if E > 0:
            # a tile lies in one page, and what is read of it is alive from the stream's first entry on
            page = tl.load(table_ptr + stream * table_width + start // E % (table_width - 1)).to(tl.int64)
            place = page * E + start % E + tl.arange(0, BN)
            alive = inside & (entry >= first)
        else:
            place = stream * n_entries + entry
            alive = tl.load(alive_ptr + place, mask=inside, other=0) != 0
        row = _row(rows_ptr, place, inside, POOLED)
        k = tl.load(
            keys_ptr + (row[:, None] * H + head) * K + at_k[None, :], mask=inside[:, None] & (at_k < K)[None, :],
            other=0.0,
        )  # fmt: skip
        v = tl.load(
            values_ptr + (row[:, None] * H + head) * V + at_v[None, :], mask=inside[:, None] & (at_v < V)[None, :],
            other=0.0,
        )  # fmt: skip
        bias = tl.load(bias_ptr + place * bias_stride + tl.where(bias_stride > 1, head, 0), mask=inside, other=0.0)
        if E > 0:
            bias += tl.load(head_bias_ptr + head)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E + (bias * LOG2E)[None, :]
        own = (channel[:, None] >= 0) & inside[None, :]
        keep = alive[None, :] & row_inside[:, None]
        if C > 1:
            source = tl.load(source_ptr + place, mask=inside, other=0)
            own = channel[:, None] == source[None, :]
            may = tl.load(readable_ptr + channel[:, None] * C + source[None, :], mask=row_inside[:, None], other=0) != 0
            keep = keep & (own | may)
            # keys of one channel alone all carry the bias, which then changes nothing
            s = tl.where(own, s + own_bias, s)
        top, total, output, marked = _fold(
            top, total, output, marked, s, own, keep, inside, v, marks_ptr + row * R, 0, R, RP, PRECISION
        )
    if part == 0:
        n_local = (window + 1) * C
        for start in tl.range(C, n_local, BN):
            index = start + tl.arange(0, BN)
            inside = index < n_local
            place = stream * n_local + index
            present = tl.load(present_ptr + place, mask=inside, other=0) != 0
            k = tl.load(
                local_keys_ptr + (place[:, None] * H + head) * K + at_k[None, :],
                mask=inside[:, None] & (at_k < K)[None, :], other=0.0,
            )  # fmt: skip
            v = tl.load(
                local_values_ptr + (place[:, None] * H + head) * V + at_v[None, :],
                mask=inside[:, None] & (at_v < V)[None, :], other=0.0,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E
            own = channel[:, None] == (index % C)[None, :]
            keep = (present & inside)[None, :] & row_inside[:, None]
            if C > 1:
                may = tl.load(
                    readable_ptr + channel[:, None] * C + (index % C)[None, :], mask=row_inside[:, None], other=0
                ) != 0  # fmt: skip
                age = window - index // C
                keep = keep & (own | (may & (age < span)[None, :]))
                s = tl.where(own, s + own_bias, s)
            top, total, output, marked = _fold(
                top, total, output, marked, s, own, keep, inside, v, local_marks_ptr + place * R, 0, R, RP, PRECISION
            )
    slot = (((stream * H + head) * n_parts) + part) * C + channel
    tl.store(tops_ptr + slot, top, mask=row_inside)
    tl.store(totals_ptr + slot, total, mask=row_inside)
    tl.store(outputs_ptr + slot[:, None] * BV + at_v[None, :], output, mask=row_inside[:, None])
    if R > 0:
        at_r = tl.arange(0, RP)
        tl.store(markeds_ptr + slot[:, None] * RP + at_r[None, :], marked, mask=row_inside[:, None])


@triton.jit(do_not_specialize=VARYING)
def join_kernel(
    ends_ptr, tops_ptr, totals_ptr, outputs_ptr, markeds_ptr, output_ptr, marked_ptr, lse_ptr, n_entries, n_parts,
    length, H: tl.constexpr, C: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr,
    BP: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Join the parts of one stream, head and channel."""
    channel, head = tl.program_id(0) % C, tl.program_id(0) // C % H
    stream = (tl.program_id(0) // C // H).to(tl.int64)
    at_v, at_r = tl.arange(0, BV), tl.arange(0, RP)
    _, origin, end = _ends(ends_ptr, stream, n_entries, E)
    # of more entries than the read was made ready for, no program read the rest
    used = tl.minimum(tl.maximum(tl.cdiv(end - origin, length), 1), n_parts)
    slots = (stream * H + head) * n_parts
    top = LOWEST + 0.0
    for start in tl.range(0, used, BP):
        part = start + tl.arange(0, BP)
        top = tl.maximum(top, tl.max(tl.load(tops_ptr + (slots + part) * C + channel, mask=part < used, other=LOWEST)))
    total = 0.0
    output = tl.zeros([BV], tl.float32)
    marked = tl.zeros([RP], tl.float32)
    for start in tl.range(0, used, BP):
        part = start + tl.arange(0, BP)
        slot, inside = (slots + part) * C + channel, part < used
        weight = tl.exp2(tl.load(tops_ptr + slot, mask=inside, other=LOWEST) - top)
        weight = tl.where(inside, weight, 0.0)
        total += tl.sum(weight * tl.load(totals_ptr + slot, mask=inside, other=0.0))
        of_part = tl.load(outputs_ptr + slot[:, None] * BV + at_v[None, :], mask=inside[:, None], other=0.0)
        output += tl.sum(weight[:, None] * of_part, 0)
        if R > 0:
            of_part = tl.load(markeds_ptr + slot[:, None] * RP + at_r[None, :], mask=inside[:, None], other=0.0)
            marked += tl.sum(weight[:, None] * of_part, 0)
    seen = total > 0
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    row = (stream * C + channel) * H + head
    tl.store(output_ptr + row * V + at_v, (output * share).to(output_ptr.dtype.element_ty), mask=at_v < V)
    if R > 0:
        tl.store(marked_ptr + row * R + at_r, marked * share, mask=at_r < R)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, 4.0e30)
    tl.store(lse_ptr + (stream * H + head) * C + channel, lse)


@dataclass(frozen=True)
class Paged:
    """Entries of all streams in pages of E rows; the last page of the pools belongs to nobody."""

    keys: torch.Tensor  # [rows of all pages, H, K]
    values: torch.Tensor  # [rows, H, V]
    bias: torch.Tensor  # [rows] float32
    marks: torch.Tensor | None  # [rows, R] float32
    channel: torch.Tensor | None  # [rows] int32; None: of the only one
    table: torch.Tensor  # [B, T + 1] int32: entry e of a stream lies in page e // E % T of its row
    first: torch.Tensor  # [B] the oldest living entry
    past: torch.Tensor  # [B] the newest, and 1
    head_bias: torch.Tensor  # [H] float32, added to every entry's
    page: int  # E
    most: int  # entries that no stream has more of


def attend_step(
    queries: torch.Tensor,
    *,
    local_keys: torch.Tensor,
    local_values: torch.Tensor,
    local_marks: torch.Tensor | None,
    local_present: torch.Tensor,
    scratch: ScratchKeys | Paged | None,
    readable: torch.Tensor,
    channel_bias: torch.Tensor,
    window: int,
    cross_span: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Output [B, C, H, V], marks [B, C, H, R] and log of the softmax's sum [B, H, C]; no gradients.

    Takes what ``attend`` takes, of one patch, in one dtype, contiguous, with patches and channels in one axis:
    ``attend_triton.attend`` sees to that, and ``ops/pages.py`` where entries lie in pages.
    """
    B, C, H, K = queries.shape
    V, R = local_values.shape[-1], 0 if local_marks is None else local_marks.shape[-1]
    n_entries, E, table, head_bias = 0, 0, None, channel_bias
    if isinstance(scratch, ScratchKeys):
        n_entries = scratch.channel.shape[1]
    reach = n_entries
    pooled = isinstance(scratch, ScratchKeys) and scratch.rows is not None
    if isinstance(scratch, Paged):
        # the first part begins with the page of the first entry; ends are told as those of a list of nothing
        n_entries, E, table, head_bias = 0, scratch.page, scratch.table, scratch.head_bias
        reach = scratch.most + E - 1
    device = queries.device
    padded = {"BV": _padded(V), "RP": max(4, triton.next_power_of_2(max(R, 1)))}
    length = _length(B * H * (_as_recorded(reach, C) if pooled else reach), device)
    parts = max(1, triton.cdiv(reach, length))

    def room(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    slots = (B, H, parts, C)
    tops, totals, outputs = room(*slots), room(*slots), room(*slots, padded["BV"])
    markeds = room(*slots, padded["RP"]) if R else tops
    entries, ends, stride = _entries(queries, scratch, channel_bias)
    step_kernel[(B * H, parts)](
        queries, local_keys, local_values, tops if local_marks is None else local_marks.float().contiguous(),
        local_present.to(torch.int8).contiguous(), *entries, ends, readable.to(torch.int8).contiguous(),
        channel_bias.float(), tops, totals, outputs, markeds, ends if table is None else table, head_bias, n_entries,
        parts, length, window, cross_span, stride, 2 if table is None else table.shape[1], H=H, C=C, K=K, V=V,
        R=R, BK=_padded(K), BN=TILE, E=E, POOLED=pooled, PRECISION=precision, num_warps=WARPS, num_stages=STAGES,
        CP=_padded(C), **padded,
    )  # fmt: skip
    output = queries.new_empty(B, C, H, V)  # [B, C, H, V]
    marked = room(B, C, H, R) if R else None  # [B, C, H, R]
    lse = room(B, H, C)  # [B, H, C]
    join_kernel[(B * H * C,)](
        ends, tops, totals, outputs, markeds, output, tops if marked is None else marked, lse, n_entries, parts, length,
        H=H, C=C, V=V, R=R, BP=JOINED, E=E, num_warps=1, **padded,
    )  # fmt: skip
    return output, marked, lse


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _as_recorded(entries: int, channels: int) -> int:
    """The entries of a list if those from before this patch were padded to a bucket, as a recorded step pads them.

    Parts follow from it, so that a step that is launched and one that is recorded add up the same parts.
    """
    return recorded_length(entries - channels) + channels


def _length(numbers: int, device: torch.device) -> int:
    """Entries of a part, a power of 2; it follows from sizes alone, for all streams and heads hold so many entries."""
    if device.type != "cuda":
        return TILE
    wanted = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return min(LONGEST, max(SHORTEST, triton.next_power_of_2(numbers // wanted)))


def _entries(
    q: torch.Tensor, scratch: ScratchKeys | Paged | None, channel_bias: torch.Tensor
) -> tuple[tuple[Any, ...], torch.Tensor, int]:
    """Keys, values, marks, biases, who is alive, sources and rows; each stream's ends; entries' stride of biases."""
    if isinstance(scratch, Paged):
        # under a cap entries are counted without end; a stream's row of pages comes round, so whole rounds are left out
        round_of = scratch.page * max(scratch.table.shape[1] - 1, 1)
        base = scratch.first // round_of * round_of  # [B]
        ends = torch.stack([base - scratch.first, scratch.past - base], 1).int()  # [B, 2]
        marks = channel_bias if scratch.marks is None else scratch.marks
        source = ends if scratch.channel is None else scratch.channel
        return (scratch.keys, scratch.values, marks, scratch.bias, ends, source, ends), ends, 1
    B, M = q.shape[0], 0 if scratch is None else scratch.channel.shape[1]
    ends = torch.zeros(B, 2, dtype=torch.int32, device=q.device)  # [B, 2]
    if scratch is None or not M:
        return (q, q, channel_bias, channel_bias, ends, ends, ends), ends, 1
    alive = torch.empty(B, M, dtype=torch.int8, device=q.device)  # [B, M]
    living_kernel[(B, triton.cdiv(M, LIVES))](
        scratch.visible_from.contiguous(), scratch.visible_until.contiguous(), alive, ends, M, BN=LIVES
    )
    bias = scratch.bias.float().contiguous()  # [B, M] or [B, M, H]
    marks = channel_bias if scratch.marks is None else scratch.marks.float().contiguous()
    stride = bias.shape[2] if bias.ndim == 3 else 1
    source = scratch.channel.int() if q.shape[1] > 1 else ends
    rows = ends if scratch.rows is None else scratch.rows.contiguous()
    return (scratch.keys, scratch.values, marks, bias, alive, source, rows), ends, stride
