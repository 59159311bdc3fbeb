"""The read of one step, for thousands of streams whose scratchpads differ in length.

One patch asks, so nothing but the bytes of keys and values counts. Each stream's entries are read up to its own last
one, in parts where there are fewer streams than the device could serve at once. Sizes do not depend on what was
routed, nothing waits for the device, and a CUDA graph can hold the whole step.

B streams · C channels · H heads · K key · V value · M capacity (entries) · W window patches · R marks · P parts
"""

from __future__ import annotations

from typing import Any

import torch

from hamts.ops.types import ScratchKeys

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError(
        "The Triton kernels need the package triton, 3.7.1 or later. Install it with: pip install 'hamts[gpu]'."
    ) from missing

__all__ = ["MOST_CHANNELS", "attend_step"]

MOST_CHANNELS = 64
PROGRAMS = 8
MOST_PARTS = 32
TILE, WARPS, STAGES = 64, 4, 3
VARYING = ("n_entries", "n_parts", "window", "span")
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
def step_kernel(
    q_ptr, local_keys_ptr, local_values_ptr, local_marks_ptr, present_ptr, keys_ptr, values_ptr, marks_ptr, bias_ptr,
    alive_ptr, source_ptr, ends_ptr, readable_ptr, channel_bias_ptr, tops_ptr, totals_ptr, outputs_ptr, markeds_ptr,
    n_entries, n_parts, window, span, bias_stride, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    R: tl.constexpr, CP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of one stream's entries for one head; the first part reads the window too."""
    head, part = tl.program_id(0) % H, tl.program_id(1)
    stream = (tl.program_id(0) // H).to(tl.int64)
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
    begin, end = tl.load(ends_ptr + stream * 2), tl.load(ends_ptr + stream * 2 + 1)
    share = tl.cdiv(tl.cdiv(end - begin, n_parts), BN) * BN
    stop = tl.minimum(begin + (part + 1) * share, end)
    for start in tl.range(begin + part * share, stop, BN):
        entry = start + tl.arange(0, BN)
        inside = entry < stop
        place = stream * n_entries + entry
        alive = tl.load(alive_ptr + place, mask=inside, other=0) != 0
        k = tl.load(
            keys_ptr + (place[:, None] * H + head) * K + at_k[None, :], mask=inside[:, None] & (at_k < K)[None, :],
            other=0.0,
        )  # fmt: skip
        v = tl.load(
            values_ptr + (place[:, None] * H + head) * V + at_v[None, :], mask=inside[:, None] & (at_v < V)[None, :],
            other=0.0,
        )  # fmt: skip
        bias = tl.load(bias_ptr + place * bias_stride + tl.where(bias_stride > 1, head, 0), mask=inside, other=0.0)
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
            top, total, output, marked, s, own, keep, inside, v, marks_ptr + place * R, 0, R, RP, PRECISION
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
    slot = (stream * H + head) * n_parts + part
    tl.store(tops_ptr + slot * CP + channel, top)
    tl.store(totals_ptr + slot * CP + channel, total)
    tl.store(outputs_ptr + (slot * CP + channel[:, None]) * BV + at_v[None, :], output)
    if R > 0:
        at_r = tl.arange(0, RP)
        tl.store(markeds_ptr + (slot * CP + channel[:, None]) * RP + at_r[None, :], marked)


@triton.jit(do_not_specialize=VARYING)
def join_kernel(
    tops_ptr, totals_ptr, outputs_ptr, markeds_ptr, output_ptr, marked_ptr, lse_ptr, n_parts, H: tl.constexpr,
    C: tl.constexpr, V: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Join the parts of one stream and head."""
    head, stream = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    channel, at_v, at_r = tl.arange(0, CP), tl.arange(0, BV), tl.arange(0, RP)
    top = tl.full([CP], LOWEST, tl.float32)
    total = tl.zeros([CP], tl.float32)
    output = tl.zeros([CP, BV], tl.float32)
    marked = tl.zeros([CP, RP], tl.float32)
    for part in tl.range(0, n_parts):
        slot = ((stream * H + head) * n_parts + part) * CP + channel
        its_top = tl.load(tops_ptr + slot)
        new_top = tl.maximum(top, its_top)
        mine, its = tl.exp2(top - new_top), tl.exp2(its_top - new_top)
        total = total * mine + tl.load(totals_ptr + slot) * its
        its_output = tl.load(outputs_ptr + slot[:, None] * BV + at_v[None, :])
        output = output * mine[:, None] + its_output * its[:, None]
        if R > 0:
            its_marked = tl.load(markeds_ptr + slot[:, None] * RP + at_r[None, :])
            marked = marked * mine[:, None] + its_marked * its[:, None]
        top = new_top
    seen = total > 0
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    row = (stream * C + channel[:, None]) * H + head
    inside = (channel < C)[:, None]
    place = output_ptr + row * V + at_v[None, :]
    tl.store(place, (output * share).to(output_ptr.dtype.element_ty), mask=inside & (at_v < V)[None, :])
    if R > 0:
        tl.store(marked_ptr + row * R + at_r[None, :], marked * share, mask=inside & (at_r < R)[None, :])
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, 4.0e30)
    tl.store(lse_ptr + (stream * H + head) * C + channel, lse, mask=channel < C)


def attend_step(
    queries: torch.Tensor,
    *,
    local_keys: torch.Tensor,
    local_values: torch.Tensor,
    local_marks: torch.Tensor | None,
    local_present: torch.Tensor,
    scratch: ScratchKeys | None,
    readable: torch.Tensor,
    channel_bias: torch.Tensor,
    window: int,
    cross_span: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Output [B, C, H, V], marks [B, C, H, R] and log of the softmax's sum [B, H, C]; no gradients.

    Takes what ``attend`` takes, of one patch, in one dtype, contiguous, with patches and channels in one axis:
    ``attend_triton.attend`` sees to that.
    """
    B, C, H, K = queries.shape
    V, R = local_values.shape[-1], 0 if local_marks is None else local_marks.shape[-1]
    n_entries = 0 if scratch is None else scratch.keys.shape[1]
    device = queries.device
    padded = {"CP": _padded(C), "BV": _padded(V), "RP": max(4, triton.next_power_of_2(max(R, 1)))}
    parts = _parts(B * H, n_entries, device)

    def room(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    slots = (B, H, parts, padded["CP"])
    tops, totals, outputs = room(*slots), room(*slots), room(*slots, padded["BV"])
    markeds = room(*slots, padded["RP"]) if R else tops
    entries, stride = _entries(queries, scratch, channel_bias)
    step_kernel[(B * H, parts)](
        queries, local_keys, local_values, tops if local_marks is None else local_marks.float().contiguous(),
        local_present.to(torch.int8), *entries, readable.to(torch.int8).contiguous(), channel_bias.float(), tops,
        totals, outputs, markeds, n_entries, parts, window, cross_span, stride, H=H, C=C, K=K, V=V, R=R,
        BK=_padded(K), BN=TILE, PRECISION=precision, num_warps=WARPS, num_stages=STAGES, **padded,
    )  # fmt: skip
    output = queries.new_empty(B, C, H, V)  # [B, C, H, V]
    marked = room(B, C, H, R) if R else None  # [B, C, H, R]
    lse = room(B, H, C)  # [B, H, C]
    join_kernel[(B * H,)](
        tops, totals, outputs, markeds, output, tops if marked is None else marked, lse, parts, H=H, C=C, V=V, R=R,
        num_warps=WARPS, **padded,
    )  # fmt: skip
    return output, marked, lse


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _parts(programs: int, n_entries: int, device: torch.device) -> int:
    """Parts of each stream's entries; they follow from sizes alone."""
    if device.type != "cuda":
        return 2
    wanted = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MOST_PARTS, wanted // programs, triton.cdiv(n_entries, TILE)))


def _entries(q: torch.Tensor, scratch: ScratchKeys | None, channel_bias: torch.Tensor) -> tuple[tuple[Any, ...], int]:
    """Keys, values, marks, biases, who is alive, sources and each stream's first and past-last living entry."""
    if scratch is None or not scratch.keys.shape[1]:
        nothing = torch.zeros(q.shape[0], 2, dtype=torch.int32, device=q.device)  # [B, 2]
        return (q, q, channel_bias, channel_bias, nothing, nothing, nothing), 1
    alive = (scratch.visible_from <= 0) & (scratch.visible_until > 0)  # [B, M]
    index = torch.arange(alive.shape[1], device=q.device, dtype=torch.int32)  # [M]
    first = torch.where(alive, index, alive.shape[1]).amin(1)  # [B]
    past = torch.where(alive, index + 1, 0).amax(1)  # [B]
    ends = torch.stack([torch.minimum(first, past), past], 1).int()  # [B, 2]
    bias = scratch.bias.float().contiguous()  # [B, M] or [B, M, H]
    marks = channel_bias if scratch.marks is None else scratch.marks.float().contiguous()
    stride = bias.shape[2] if bias.ndim == 3 else 1
    source = scratch.channel.int() if q.shape[1] > 1 else ends
    return (scratch.keys, scratch.values, marks, bias, alive.to(torch.int8), source, ends), stride
