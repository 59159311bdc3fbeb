"""The read on a GPU: what ``attend.py`` does, in Triton kernels whose cost follows the entries that are kept.

Every gradient is summed in a fixed order, without atomic additions, so that equal inputs give equal bits. The masses
are computed when they are first asked for: they cost one more pass over the keys.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
L places of the window, W + N · RP, 4 marks and their parts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hamts.ops.types import Attended, ScratchKeys

try:
    import triton

    from hamts.ops import attend_triton_gradients as gradients
    from hamts.ops import attend_triton_kernels as kernels
    from hamts.ops import attend_triton_prepare as prepare
    from hamts.ops.attend_triton_inputs import (
        Sight,
        Sizes,
        narrow,
        pointer,
        precision,
        sight_of,
    )
    from hamts.ops.attend_triton_masses import masses_of
    from hamts.ops.attend_triton_tiles import Tiles, launch
    from hamts.ops.decode_triton import MOST_CHANNELS, attend_step
except ImportError as missing:
    raise ImportError(
        "The Triton kernels need the package triton, 3.7.1 or later. Install it with: pip install 'hamts[gpu]'."
    ) from missing

__all__ = ["DTYPES", "HEAD_WIDTHS", "LazyAttended", "attend", "check"]

HEAD_WIDTHS = (16, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_MARKS = 16


class LazyAttended(Attended):
    """An ``Attended`` whose masses are computed when they are first read."""

    def __init__(self, output: torch.Tensor, marks: torch.Tensor | None, masses: dict[str, Callable[[], Any]]) -> None:
        self.__dict__.update(output=output, marks=marks, _masses=masses)

    def __getattr__(self, name: str) -> Any:
        if name not in ("scratch_mass", "local_mass"):
            raise AttributeError(name)
        with torch.no_grad():
            self.__dict__[name] = self.__dict__["_masses"].pop(name)()
        return self.__dict__[name]


def check(*, key_width: int, value_width: int, dtype: torch.dtype, device: torch.device, n_marks: int = 0) -> None:
    """Refuse what the kernels cannot do, and say what they can."""
    low, high = HEAD_WIDTHS
    for name, width in (("Keys", key_width), ("Values", value_width)):
        if not low <= width <= high:
            raise ValueError(f"{name} of a head must be {low} to {high} wide for kernel 'triton'. Got {width}.")
    if dtype not in DTYPES:
        names = [str(known).removeprefix("torch.") for known in DTYPES]
        got = str(dtype).removeprefix("torch.")
        raise ValueError(f"Kernel 'triton' computes in {names}. Got {got}. Use kernel='torch' for others.")
    if n_marks > MOST_MARKS:
        raise ValueError(f"Kernel 'triton' averages at most {MOST_MARKS} marks. Got {n_marks}.")
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"Kernel 'triton' needs a device of type 'cuda'. Got '{device}'. Use kernel='torch', or set"
            " TRITON_INTERPRET=1 before Python starts to run it, slowly, on a CPU."
        )


def attend(
    queries: torch.Tensor,
    *,
    local_keys: torch.Tensor,
    local_values: torch.Tensor,
    local_present: torch.Tensor,
    scratch: ScratchKeys | None,
    readable: torch.Tensor,
    channel_bias: torch.Tensor,
    window: int,
    cross_span: int = 1,
    local_marks: torch.Tensor | None = None,
    share_mark: bool = False,
    block: int = 64,
) -> Attended:
    """Read the window, the other channels and the scratchpad under one softmax; see the twin in ``naive.py``.

    Products run in the dtype of autocast where it is on, else in the widest dtype given; logits, probabilities and
    marks in float32. Entries need not be sorted, but only sorted ones save work. Marks come in float32.

    Args:
        queries: [B, N, C, H, K], already scaled and rotated.
        local_keys: W patches from before the chunk, then the chunk's own, [B, W+N, C, H, K].
        local_values: [B, W+N, C, H, V].
        local_present: absent keys are never seen, bool [B, W+N, C].
        scratch: the scratchpad, or None.
        readable: may the query's channel (row) read the key's (column)? The own one always, bool [B, C, C].
        channel_bias: added to the logits of keys of the query's own channel, [H].
        window: W, at least 1.
        cross_span: patches of other channels, 0 .. W; 1 is the same step only.
        local_marks: what ``Attended.marks`` averages, [B, W+N, C, R].
        share_mark: the last mark of every key that is seen is 1, as the layer's is; its mean is the share of keys of
            the own channel. Saying so saves features in the backward pass.
        block: unused here; the twin in ``attend.py`` works in blocks of this many queries.

    Source: the read of HAM, arXiv 2603.22325; channels, ``cross_span`` and the biases are ours.
    """
    del block
    B, N, C, H, _ = queries.shape
    if not 0 <= cross_span <= window or window < 1:
        raise ValueError(f"cross_span must lie in 0 .. window. Got cross_span={cross_span}, window={window}.")
    if local_keys.shape[1] != window + N:
        raise ValueError(f"local_keys must hold window + queries patches, {window + N}. Got {local_keys.shape[1]}.")
    pad = _pad(scratch, step=N == 1 and C <= MOST_CHANNELS)
    dtype = _dtype(pad, queries, local_keys, local_values)
    n_marks = local_marks.shape[-1] if local_marks is not None else 0
    check(
        key_width=queries.shape[-1],
        value_width=local_values.shape[-1],
        dtype=dtype,
        device=queries.device,
        n_marks=n_marks,
    )
    share = share_mark and n_marks > 0
    if share and pad is not None and pad.marks is None:
        raise ValueError("scratch.marks must be given where share_mark says that the last mark of every key is 1.")
    entry_marks = None
    if n_marks and pad is not None:
        entry_marks = pad.marks if pad.marks is not None else channel_bias.new_zeros(*pad.channel.shape, n_marks)
    bias = None
    if pad is not None:
        bias = pad.bias.float() if pad.bias.ndim == 3 else pad.bias.float()[..., None].expand(-1, -1, H)  # [B, M, H]
    inputs: tuple[Any, ...] = (
        queries.to(dtype).flatten(1, 2).contiguous(),  # [B, NC, H, K]
        local_keys.to(dtype).flatten(1, 2).contiguous(),  # [B, LC, H, K]
        local_values.to(dtype).flatten(1, 2).contiguous(),  # [B, LC, H, V]
        local_marks.float().flatten(1, 2).contiguous() if local_marks is not None and n_marks else None,  # [B, LC, R]
        None if pad is None else pad.keys.to(dtype).contiguous(),  # [B, M, H, K]
        None if pad is None else pad.values.to(dtype).contiguous(),  # [B, M, H, V]
        None if entry_marks is None else entry_marks.float().contiguous(),  # [B, M, R]
        bias,
        channel_bias.float(),  # [H]
    )
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    see = partial(sight_of, N, C, window, cross_span, local_present, readable, pad, share=share)
    if N == 1 and C <= MOST_CHANNELS and not (learning and _without_pool(pad)):
        output, marks, masses = _step(inputs, see, local_present, readable, pad, window=window, cross_span=cross_span)
    else:
        output, marks, masses = _Read.apply(*inputs, see())
    grid = (B, N, C, H, -1)
    empty = queries.new_zeros(*grid[:4], 0) if local_marks is not None else None  # [B, N, C, H, 0]
    if scratch is not None and pad is None:
        masses["scratch_mass"] = lambda: torch.zeros(scratch.channel.shape, device=queries.device)  # [B, 0]
    return LazyAttended(
        output.view(grid).to(queries.dtype), empty if marks is None else marks.view(grid), masses
    )  # [B, N, C, H, V], [B, N, C, H, R]


def _step(
    inputs: tuple[Any, ...],
    see: Callable[[], Sight],
    present: torch.Tensor,
    readable: torch.Tensor,
    pad: ScratchKeys | None,
    *,
    window: int,
    cross_span: int,
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Callable[[], Any]]]:
    """What ``_Read`` gives, for one patch without gradients."""
    q, local_k, local_v, local_marks, k, v, marks, bias, channel_bias = inputs
    scratch = None if pad is None else replace(pad, keys=k, values=v, marks=marks)
    output, marked, lse = attend_step(
        q,
        local_keys=local_k,
        local_values=local_v,
        local_marks=local_marks,
        local_present=present,
        scratch=scratch,
        readable=readable,
        channel_bias=channel_bias,
        window=window,
        cross_span=cross_span,
        precision=precision(),
    )

    def mass(name: str) -> Any:
        sight, keys = see(), k if scratch is None else scratch.side_by_side().keys
        size = Sizes.of(q, local_k, local_v, keys, local_marks, sight)
        return masses_of(q, local_k, keys, bias, channel_bias, lse * prepare.LOG2E.value, sight, size)[name]()

    return output, marked, {name: partial(mass, name) for name in ("local_mass", "scratch_mass")}


def _pad(scratch: ScratchKeys | None, *, step: bool) -> ScratchKeys | None:
    """The scratchpad where there is any of it; only the kernel of a step finds rows of a pool."""
    if scratch is None or not scratch.channel.shape[1]:
        return None
    return scratch if step else scratch.side_by_side()


def _without_pool(pad: ScratchKeys | None) -> bool:
    """True; refuses gradients of rows of a pool."""
    if pad is not None and pad.rows is not None:
        raise ValueError("Rows of a pool are read without gradients. Use torch.no_grad(), or ScratchKeys.side_by_side.")
    return True


def _dtype(pad: ScratchKeys | None, *local: torch.Tensor) -> torch.dtype:
    if pad is not None and pad.rows is not None:
        # a pool is too large to be cast in every step
        return pad.keys.dtype
    kind = local[0].device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    dtype = local[0].dtype
    for tensor in (*local[1:], *(() if pad is None else (pad.keys, pad.values))):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _Read(torch.autograd.Function):
    """Output [B, NC, H, V], marks [B, NC, H, R], and how to get the masses."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        local_k: torch.Tensor,
        local_v: torch.Tensor,
        local_marks: torch.Tensor | None,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        marks: torch.Tensor | None,
        bias: torch.Tensor | None,
        channel_bias: torch.Tensor,
        sight: Sight,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Callable[[], Any]]]:
        B, T, H, _ = q.shape
        R = 0 if local_marks is None else local_marks.shape[-1]
        size = Sizes.of(q, local_k, local_v, k, local_marks, sight)
        output = q.new_empty(B, T, H, local_v.shape[-1])  # [B, NC, H, V]
        marked = q.new_empty(B, T, H, R, dtype=torch.float32) if R else None  # [B, NC, H, R]
        lse = q.new_empty(B, H, T, dtype=torch.float32)  # [B, H, NC]
        kind = torch.bfloat16 if narrow(q.dtype) else torch.float32
        local_columns, packed_local = size.columns(sight, local_marks, None, local_k.shape[1], kind)
        columns = packed = None
        if bias is not None:
            columns, packed = size.columns(sight, marks, bias, size.entries, kind)

        def run(tiles: Tiles) -> None:
            bounds = size.bounds(sight, tiles, q)
            kernels.forward_kernel[(triton.cdiv(T, tiles.rows) * B * H,)](
                q, local_k, local_v, packed_local, local_columns, pointer(k, q), pointer(v, q), pointer(packed, q),
                pointer(columns, local_columns), pointer(sight.since, sight.bits),
                pointer(sight.until, sight.bits), pointer(sight.source, sight.bits), bounds, sight.bits,
                channel_bias, output, pointer(marked, lse), lse, T, local_k.shape[1], size.entries, sight.window,
                sight.span, sight.words, **size.widths(), RP=size.padded_marks, ENTRIES=size.entries > 0,
                FIXED=q.dtype != torch.float16, EVEN=size.even(sight, T, tiles), **tiles.options(),
            )  # fmt: skip

        launch("forward", run, size.key)
        ctx.save_for_backward(
            q, local_k, local_v, local_marks, k, v, marks, local_columns, columns, channel_bias, output, marked, lse
        )
        ctx.sight, ctx.size = sight, size

        return output, marked, masses_of(q, local_k, k, bias, channel_bias, lse, sight, size)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor, grad_marked: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        q, local_k, local_v, local_marks, k, v, marks, local_columns, columns, channel_bias, output, marked, lse = (
            ctx.saved_tensors
        )
        sight, size = ctx.sight, ctx.size
        B, T, H, _ = q.shape
        kind = torch.bfloat16 if narrow(q.dtype) else torch.float32
        grad_output = grad_output.contiguous()
        grad_marks = lse if grad_marked is None or marked is None else grad_marked.float().contiguous()  # [B, NC, H, R]
        local_features = size.mark_features(local_marks, local_k, kind)  # [B, LC, DX]
        features = None if k is None else size.mark_features(marks, k, kind)  # [B, M, DX]
        asked = _Asked(
            grad_output,
            grad_marks,
            lse=lse,
            slope_features=local_features.new_empty(B, H, T, size.padded_features),
            through=torch.empty_like(lse),
        )
        grad_q = torch.empty_like(q)
        own: list[torch.Tensor] = []

        def run(tiles: Tiles) -> None:
            bounds = size.bounds(sight, tiles, q)
            n_tiles = triton.cdiv(T, tiles.rows)
            own[:] = [lse.new_empty(B, H, n_tiles)]  # [B, H, Q]
            gradients.query_grad_kernel[(n_tiles * B * H,)](
                q, local_k, local_v, local_features, local_columns, pointer(k, q), pointer(v, q),
                pointer(features, local_features), pointer(columns, local_columns),
                pointer(sight.since, sight.bits), pointer(sight.until, sight.bits),
                pointer(sight.source, sight.bits), bounds, sight.bits, channel_bias, output, pointer(marked, lse), lse,
                grad_output, grad_marks, asked.slope_features, asked.through, grad_q, own[0], T, local_k.shape[1],
                size.entries, sight.window, sight.span, sight.words, **size.widths(), DX=size.padded_features,
                NARROW=narrow(q.dtype), SHARE=size.share, ENTRIES=size.entries > 0, EVEN=size.even(sight, T, tiles),
                **tiles.options(),
            )  # fmt: skip

        launch("query_grad", run, size.key)
        # keys of one channel alone all carry the bias, which then changes nothing
        grad_channel = own[0].sum((0, 2)) if sight.channels > 1 else torch.zeros_like(channel_bias)  # [H]
        shared = (sight, size, q, channel_bias, asked)
        needs = ctx.needs_input_grad
        of_local = _column_grads(local_k, local_v, local_features, local_columns, (False, needs[3]), *shared)
        of_entries: tuple[torch.Tensor | None, ...] = (None,) * 4
        if k is not None and features is not None:
            of_entries = _column_grads(k, v, features, columns, (True, needs[6]), *shared)
        return (grad_q, *of_local[:3], *of_entries, grad_channel, None)


@dataclass(frozen=True)
class _Asked:
    """What the gradient kernels are asked for, and what the one of queries leaves for those of columns."""

    grad_output: torch.Tensor  # [B, NC, H, V]
    grad_marks: torch.Tensor  # [B, NC, H, R]
    lse: torch.Tensor  # [B, H, NC], in powers of 2
    slope_features: torch.Tensor  # [B, H, NC, DX]
    through: torch.Tensor  # [B, H, NC]


def _column_grads(
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    columns: torch.Tensor,
    kind: tuple[bool, bool],
    sight: Sight,
    size: Sizes,
    q: torch.Tensor,
    channel_bias: torch.Tensor,
    asked: _Asked,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of keys, values, marks and biases of (entries, else places; with marks?)."""
    (B, X, H, _), T = k.shape, q.shape[1]
    of_entries, with_marks = kind
    grads: list[torch.Tensor] = []

    def run(tiles: Tiles) -> None:
        parts = size.parts(X, tiles) if of_entries else 1
        dtype = q.dtype if parts == 1 else torch.float32
        grads[:] = [
            k.new_empty(parts, *k.shape, dtype=dtype),
            v.new_empty(parts, *v.shape, dtype=dtype),
            asked.through.new_empty(parts, B, H, size.marks if with_marks else 0, X),
            asked.through.new_empty(parts, B, H, X if of_entries else 0),
        ]
        gradients.column_grad_kernel[(triton.cdiv(X, tiles.columns) * B * H, parts)](
            q, k, v, features, columns, pointer(sight.since, sight.bits),
            pointer(sight.until, sight.bits), pointer(sight.source, sight.bits), sight.bits, channel_bias,
            asked.grad_output, asked.grad_marks, asked.lse, asked.slope_features, asked.through, grads[0],
            grads[1], grads[3], grads[2], T, X, sight.window, sight.span, sight.words, **size.widths(),
            RM=max(16, size.padded_marks), DX=size.padded_features, ENTRIES=of_entries, MARKS_GRAD=with_marks,
            PARTS=parts,
            EVEN=T % tiles.rows == 0 and X % tiles.columns == 0, **tiles.options(),
        )  # fmt: skip

    launch("entry_grad" if of_entries else "local_grad", run, size.key)
    grad_k, grad_v, grad_mark, grad_bias = (x[0] if len(x) == 1 else x.sum(0) for x in grads)
    return (
        grad_k.to(q.dtype),
        grad_v.to(q.dtype),
        grad_mark.sum(1).mT if with_marks else None,  # [B, X, R]
        grad_bias.mT if of_entries else None,  # [B, M, H]
    )
