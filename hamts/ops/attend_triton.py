"""The read on a GPU: what ``attend.py`` does, in Triton kernels whose cost follows the entries that are kept.

Every gradient is summed in a fixed order, without atomic additions, so that equal inputs give equal bits. The masses
are computed when they are first asked for: they cost one more pass over the keys.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
L places of the window, W + N · RP, 4 marks and their parts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hamts.ops.types import Attended, ScratchKeys

try:
    import triton

    from hamts.ops import attend_triton_gradients as gradients
    from hamts.ops import attend_triton_kernels as kernels
    from hamts.ops.attend_triton_tiles import Tiles, launch
except ImportError as missing:
    raise ImportError(
        "The Triton kernels need the package triton, 3.7.1 or later. Install it with: pip install 'hamts[gpu]'."
    ) from missing

__all__ = ["DTYPES", "HEAD_WIDTHS", "LazyAttended", "attend", "check"]

HEAD_WIDTHS = (16, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_MARKS = 16
# early entries are seen by most rows, so their programs run longest: below so many programs for each multiprocessor
# the rows are split, or the last of the long ones would run alone
PROGRAMS = 64
MOST_PARTS = 16


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
            f"Kernel 'triton' needs a device of type 'cuda'. Got '{device}'. Use kernel='torch', or set TRITON_INTERPRET=1"
            " before Python starts to run it, slowly, on a CPU."
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
        block: unused here; the twin in ``attend.py`` works in blocks of this many queries.

    Source: the read of HAM, arXiv 2603.22325; channels, ``cross_span`` and the biases are ours.
    """
    del block
    B, N, C, H, _ = queries.shape
    if not 0 <= cross_span <= window or window < 1:
        raise ValueError(f"cross_span must lie in 0 .. window. Got cross_span={cross_span}, window={window}.")
    if local_keys.shape[1] != window + N:
        raise ValueError(f"local_keys must hold window + queries patches, {window + N}. Got {local_keys.shape[1]}.")
    pad = scratch if scratch is not None and scratch.keys.shape[1] else None
    dtype = _dtype(queries, local_keys, local_values, *(() if pad is None else (pad.keys, pad.values)))
    marked = local_marks is not None and local_marks.shape[-1] > 0
    n_marks = local_marks.shape[-1] if local_marks is not None else 0
    check(
        key_width=queries.shape[-1],
        value_width=local_values.shape[-1],
        dtype=dtype,
        device=queries.device,
        n_marks=n_marks,
    )
    sight = _sight(N, C, window, cross_span, local_present, readable, pad)
    entry_marks = None
    if marked and pad is not None:
        entry_marks = pad.marks if pad.marks is not None else local_marks.new_zeros(*pad.channel.shape, n_marks)
    bias = None
    if pad is not None:
        bias = pad.bias.float() if pad.bias.ndim == 3 else pad.bias.float()[..., None].expand(-1, -1, H)  # [B, M, H]
    output, marks, masses = _Read.apply(
        queries.to(dtype).flatten(1, 2).contiguous(),  # [B, NC, H, K]
        local_keys.to(dtype).flatten(1, 2).contiguous(),  # [B, LC, H, K]
        local_values.to(dtype).flatten(1, 2).contiguous(),  # [B, LC, H, V]
        local_marks.float().flatten(1, 2) if marked else None,  # [B, LC, R]
        None if pad is None else pad.keys.to(dtype).contiguous(),  # [B, M, H, K]
        None if pad is None else pad.values.to(dtype).contiguous(),  # [B, M, H, V]
        None if entry_marks is None else entry_marks.float(),  # [B, M, R]
        bias,
        channel_bias.float(),  # [H]
        sight,
    )
    grid = (B, N, C, H, -1)
    empty = queries.new_zeros(*grid[:4], 0) if local_marks is not None else None  # [B, N, C, H, 0]
    if scratch is not None and pad is None:
        masses["scratch_mass"] = lambda: torch.zeros(scratch.channel.shape, device=queries.device)  # [B, 0]
    return LazyAttended(
        output.view(grid).to(queries.dtype), marks.view(grid) if marked else empty, masses
    )  # [B, N, C, H, V], [B, N, C, H, R]


def _dtype(*tensors: torch.Tensor) -> torch.dtype:
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True)
class _Sight:
    """Who may see whom; nothing of it has a gradient."""

    channels: int
    window: int
    span: int
    words: int
    present: torch.Tensor  # [B, LC] bool
    bits: torch.Tensor  # [B, C, words] int32: channel d is bit d % 32 of word d // 32
    since: torch.Tensor | None  # [B, M] int32 in 0 .. N; N for entries that no query sees
    until: torch.Tensor | None  # [B, M] int32 in 0 .. N; 0 for entries that no query sees
    source: torch.Tensor | None  # [B, M] int32

    def numbers(self, n_rows: int, n_local: int) -> tuple[int, ...]:
        return n_rows, n_local, self.window, self.span, self.words


def _sight(
    N: int, C: int, window: int, span: int, present: torch.Tensor, readable: torch.Tensor, pad: ScratchKeys | None
) -> _Sight:
    words = (C + 31) // 32
    bits = torch.zeros(1, 1, words, dtype=torch.int32, device=present.device)  # [1, 1, words]
    if C > 1:
        padded = torch.nn.functional.pad(readable, (0, 32 * words - C)).unflatten(-1, (words, 32))
        weight = 1 << torch.arange(32, device=present.device)  # [32]
        bits = (padded.long() * weight).sum(-1).to(torch.int32)  # [B, C, words]
    since = until = source = None
    if pad is not None:
        since, until = pad.visible_from.clamp(0, N), pad.visible_until.clamp(0, N)  # [B, M]
        dead = since >= until  # [B, M]
        since, until = since.masked_fill(dead, N).int(), until.masked_fill(dead, 0).int()  # [B, M]
        source = pad.channel.int().contiguous()  # [B, M]
    return _Sight(C, window, span, words, present.flatten(1), bits, since, until, source)


def _narrow(dtype: torch.dtype) -> bool:
    """May features be in bfloat16? The interpreter has no products of it."""
    return dtype != torch.float32 and not triton.knobs.runtime.interpret


def _parts(x: torch.Tensor, narrow: bool) -> list[torch.Tensor]:
    """Three bfloat16 numbers that add up to each float32 number; or the number and two zeros."""
    if not narrow:
        return [x, torch.zeros_like(x), torch.zeros_like(x)]
    high = x.to(torch.bfloat16)
    middle = (x - high).to(torch.bfloat16)
    return [high, middle, (x - high - middle).to(torch.bfloat16)]


def _column_features(bias: torch.Tensor, narrow: bool) -> torch.Tensor:
    """What every column adds to its logits, [..., X] -> [..., X, FEATURES]."""
    parts = _parts(bias, narrow)
    columns = torch.stack([*parts, *[torch.ones_like(parts[0])] * 3], -1)
    return torch.nn.functional.pad(columns, (0, kernels.FEATURES.value - 6)).contiguous()


def _pack(marks: torch.Tensor, padded: int, narrow: bool) -> torch.Tensor:
    """Marks as columns of the forward product, [B, X, R] -> [B, X, RP, 4]; the last column is 1."""
    packed = torch.stack(_parts(marks, narrow), -1)  # [B, X, R, 3]
    packed = torch.nn.functional.pad(packed, (0, 1, 0, padded - marks.shape[-1])).contiguous()
    packed[..., -1, -1] = 1
    return packed


def _mark_features(marks: torch.Tensor, padded: int, one_channel: bool, narrow: bool) -> torch.Tensor:
    """Marks as columns of the backward product, [B, X, R] -> [B, X, DX]; see _slope_features for their partners."""
    high, middle, low = _parts(marks, narrow)
    nothing = torch.zeros_like(high)
    six = [high, high, high, middle, middle, low] if narrow else [high, *[nothing] * 5]
    packed = torch.stack(six, -1).flatten(-2)  # [B, X, 6 R]
    ones = packed.new_full((*packed.shape[:2], 3), float(one_channel))  # [B, X, 3]
    return torch.nn.functional.pad(torch.cat([packed, ones], -1), (0, padded - packed.shape[-1] - 3)).contiguous()


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
        sight: _Sight,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Callable[[], torch.Tensor]]]:
        B, T, H, _ = q.shape
        R = 0 if local_marks is None else local_marks.shape[-1]
        size = _Sizes.of(q, local_k, local_v, k, R, sight)
        output = q.new_empty(B, T, H, local_v.shape[-1])  # [B, NC, H, V]
        marked = q.new_empty(B, T, H, R, dtype=torch.float32) if R else None  # [B, NC, H, R]
        lse = q.new_empty(B, H, T, dtype=torch.float32)  # [B, H, NC]
        narrow = _narrow(q.dtype)
        packed_local = q if local_marks is None else _pack(local_marks, size.padded_marks, narrow)
        packed = q if marks is None else _pack(marks, size.padded_marks, narrow)
        local_bias = torch.where(sight.present, 0.0, kernels.ABSENT.value)  # [B, LC]
        local_columns = _column_features(local_bias, narrow)  # [B, LC, FEATURES]
        raised = columns = None
        if bias is not None and sight.since is not None and sight.until is not None:
            dead = (sight.since >= sight.until)[..., None]  # [B, M, 1]
            raised = bias.masked_fill(dead, kernels.ABSENT.value).mT.contiguous()  # [B, H, M]
            columns = _column_features(raised, narrow)  # [B, H, M, FEATURES]

        def run(tiles: Tiles) -> None:
            bounds = size.bounds(sight, tiles, q)
            kernels.forward_kernel[(triton.cdiv(T, tiles.rows) * B * H,)](
                q, local_k, local_v, packed_local, local_columns, _or(k, q), _or(v, q), packed,
                _or(columns, local_columns), _or(sight.since, sight.bits), _or(sight.until, sight.bits),
                _or(sight.source, sight.bits), bounds, sight.bits, channel_bias, output, _or(marked, lse), lse, T,
                local_k.shape[1], size.entries, sight.window, sight.span, sight.words, **size.widths(),
                RP=size.padded_marks, ENTRIES=size.entries > 0, **tiles.options(),
            )  # fmt: skip

        launch("forward", run, size.key)
        ctx.save_for_backward(
            q, local_k, local_v, local_marks, k, v, marks, local_columns, columns, channel_bias, output, marked, lse
        )
        ctx.sight, ctx.size = sight, size

        def mass(of_entries: bool) -> torch.Tensor | None:
            if not of_entries:
                return _mass(q, local_k, local_bias, channel_bias, lse, sight, size).view(B, -1, sight.channels)
            return None if k is None else _mass(q, k, raised, channel_bias, lse, sight, size)

        return output, marked, {"local_mass": partial(mass, False), "scratch_mass": partial(mass, True)}

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
        grad_output = grad_output.contiguous()
        grad_marks = lse if grad_marked is None or marked is None else grad_marked.float().contiguous()  # [B, NC, H, R]
        local_features = size.mark_features(local_marks, local_k)  # [B, LC, DX]
        features = None if k is None else size.mark_features(marks, k)  # [B, M, DX]
        asked = _Asked(
            grad_output,
            grad_marks,
            q_features=local_columns.new_empty(B, H, T, kernels.FEATURES.value),
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
                q, local_k, local_v, local_features, local_columns, _or(k, q), _or(v, q),
                _or(features, local_features), _or(columns, local_columns), _or(sight.since, sight.bits),
                _or(sight.until, sight.bits), _or(sight.source, sight.bits), bounds, sight.bits, channel_bias, output,
                _or(marked, lse), lse, grad_output, grad_marks, asked.q_features, asked.slope_features, asked.through,
                grad_q, own[0], T, local_k.shape[1], size.entries, sight.window, sight.span, sight.words,
                **size.widths(), DX=size.padded_features, NARROW=_narrow(q.dtype), ENTRIES=size.entries > 0,
                **tiles.options(),
            )  # fmt: skip

        launch("query_grad", run, size.key)
        # keys of one channel alone all carry the bias, which then changes nothing
        grad_channel = own[0].sum((0, 2)) if sight.channels > 1 else torch.zeros_like(channel_bias)  # [H]
        shared = (sight, size, q, channel_bias, asked)
        needs = ctx.needs_input_grad
        of_local = _column_grads(local_k, local_v, local_features, local_columns, (False, needs[3]), *shared)
        of_entries: tuple[torch.Tensor | None, ...] = (None,) * 4
        if k is not None:
            of_entries = _column_grads(k, v, features, columns, (True, needs[6]), *shared)
        return (grad_q, *of_local[:3], *of_entries, grad_channel, None)


@dataclass(frozen=True)
class _Asked:
    """What the gradient kernels are asked for, and what the one of queries leaves for those of columns."""

    grad_output: torch.Tensor  # [B, NC, H, V]
    grad_marks: torch.Tensor  # [B, NC, H, R]
    q_features: torch.Tensor  # [B, H, NC, FEATURES]
    slope_features: torch.Tensor  # [B, H, NC, DX]
    through: torch.Tensor  # [B, H, NC]


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """Kernels take a pointer also where they read nothing."""
    return stand_in if tensor is None else tensor


@dataclass(frozen=True)
class _Sizes:
    """What the kernels are specialised for."""

    items: int
    heads: int
    channels: int
    key_width: int
    value_width: int
    marks: int
    entries: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(
        q: torch.Tensor, local_k: torch.Tensor, local_v: torch.Tensor, k: torch.Tensor | None, marks: int, sight: _Sight
    ) -> _Sizes:
        for name, x in (("queries", q), ("local_keys", local_k), ("local_values", local_v), ("scratch.keys", k)):
            if x is not None and x[:1].numel() >= 2**31:
                raise ValueError(
                    f"{name} must hold fewer than 2**31 numbers an item for kernel 'triton'. Got {x.shape}."
                )
        entries = 0 if k is None else k.shape[1]
        B, _, H, K = q.shape
        return _Sizes(B, H, sight.channels, K, local_v.shape[-1], marks, entries, q.dtype, q.device)

    @property
    def padded_marks(self) -> int:
        return max(4, triton.next_power_of_2(self.marks))

    @property
    def padded_features(self) -> int:
        return max(16, triton.next_power_of_2(6 * self.marks + 3))

    def mark_features(self, marks: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
        if marks is None:
            marks = keys.new_empty(*keys.shape[:2], 0, dtype=torch.float32)  # [B, X, 0]
        return _mark_features(marks, self.padded_features, self.channels == 1, _narrow(self.dtype))

    @property
    def key(self) -> tuple[Any, ...]:
        """What the best tiles depend on."""
        width = max(self.padded(self.key_width), self.padded(self.value_width))
        return width, self.dtype.itemsize, self.channels > 1, self.device

    @staticmethod
    def padded(width: int) -> int:
        return max(16, triton.next_power_of_2(width))

    def widths(self) -> dict[str, Any]:
        """Compile-time arguments that kernels of queries share."""
        return {
            "H": self.heads,
            "C": self.channels,
            "K": self.key_width,
            "V": self.value_width,
            "R": self.marks,
            "BK": self.padded(self.key_width),
            "BV": self.padded(self.value_width),
            "PRECISION": self.precision,
        }

    @property
    def precision(self) -> str:
        """Of products in float32: three on Tensor Cores come near to it; one, of 10 bits, where PyTorch may too."""
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def bounds(self, sight: _Sight, tiles: Tiles, q: torch.Tensor) -> torch.Tensor:
        """Which tiles of entries each tile of rows needs, int32 [B, Q, 4]."""
        if not self.entries:
            return sight.bits
        n_tiles = triton.cdiv(q.shape[1], tiles.rows)
        bounds = q.new_empty(self.items, n_tiles, 4, dtype=torch.int32)
        kernels.bounds_kernel[(n_tiles, self.items)](
            sight.since, sight.until, bounds, q.shape[1], self.entries, C=self.channels, BM=tiles.rows, BN=tiles.columns
        )
        return bounds

    def parts(self, n_columns: int, tiles: Tiles) -> int:
        """Into how many parts the rows of a tile of columns are split, so that the device has enough to do."""
        if self.device.type != "cuda":
            return 2
        programs = triton.cdiv(n_columns, tiles.columns) * self.items * self.heads
        wanted = PROGRAMS * torch.cuda.get_device_properties(self.device).multi_processor_count
        return max(1, min(MOST_PARTS, wanted // programs))


def _column_grads(
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    columns: torch.Tensor,
    kind: tuple[bool, bool],
    sight: _Sight,
    size: _Sizes,
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
            q, k, v, features, columns, _or(sight.since, sight.bits), _or(sight.until, sight.bits),
            _or(sight.source, sight.bits), sight.bits, channel_bias, asked.grad_output, asked.grad_marks,
            asked.q_features, asked.slope_features, asked.through, grads[0], grads[1], grads[3], grads[2], T, X,
            sight.window, sight.span, sight.words, **size.widths(), RM=max(16, size.padded_marks),
            DX=size.padded_features, ENTRIES=of_entries, MARKS_GRAD=with_marks, PARTS=parts, **tiles.options(),
        )  # fmt: skip

    launch("entry_grad" if of_entries else "local_grad", run, size.key)
    grad_k, grad_v, grad_mark, grad_bias = (x[0] if len(x) == 1 else x.sum(0) for x in grads)
    return (
        grad_k.to(q.dtype),
        grad_v.to(q.dtype),
        grad_mark.sum(1).mT if with_marks else None,  # [B, X, R]
        grad_bias.mT if of_entries else None,  # [B, M, H]
    )


def _mass(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    channel_bias: torch.Tensor,
    lse: torch.Tensor,
    sight: _Sight,
    size: _Sizes,
) -> torch.Tensor:
    """Probability each key received, summed over queries and heads, [B, X]; bias [B, H, M] of entries, [B, LC] else."""
    (B, X, H, _), T = k.shape, q.shape[1]
    of_entries = bias.ndim == 3
    masses: list[torch.Tensor] = []
    widths = {name: x for name, x in size.widths().items() if name not in ("V", "BV", "R")}

    def run(tiles: Tiles) -> None:
        parts = size.parts(X, tiles) if of_entries else 1
        masses[:] = [lse.new_empty(parts, B, H, X)]
        gradients.mass_kernel[(triton.cdiv(X, tiles.columns) * B * H, parts)](
            q, k, bias, _or(sight.since, sight.bits), _or(sight.until, sight.bits), _or(sight.source, sight.bits),
            sight.bits, channel_bias, lse, masses[0], T, X, sight.window, sight.span, sight.words, **widths,
            ENTRIES=of_entries, PARTS=parts, **tiles.options(),
        )  # fmt: skip

    launch("mass", run, size.key)
    return masses[0].sum((0, 2))
