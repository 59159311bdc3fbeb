"""What lies between the recurrence and the read, fused: the twins of ``HAMLayer``'s own methods, on a GPU.

Unfused, a layer passes over its widest tensors more than a hundred times forward and backward, for arithmetic that
takes no time at all. Here each of four stretches is one pass forward and one or two backward, and nothing in between
is kept for the gradient. Sums over tokens are taken in a fixed order: equal inputs give equal bits.

B items · C channels · N patches · D width · H heads · K key (= V value) · W window patches · S streams, B C
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

try:
    import triton

    from hamts.ops import layer_triton_kernels as kernels
    from hamts.ops import layer_triton_mix as mixing
except ImportError as missing:
    raise ImportError(
        "The fused layer needs the package triton, 3.7.1 or later. Install it with: pip install 'hamts[gpu]'."
    ) from missing

__all__ = ["compared", "layer_inputs", "mixed_branches", "turned_queries"]

TAPS = 4
MARKS = 3
WARPS = 4
# tiles of tokens that a program takes where it sums over them
LOOP = 8


# cosine and sine of the angles of the rotation by time, shared by all channels and heads, 2 x [B, N, pairs] float32
Turn = tuple[torch.Tensor, torch.Tensor]


def _tile(width: int) -> tuple[int, int]:
    """Padded width of a head, and tokens in a tile."""
    padded = max(16, triton.next_power_of_2(width))
    return padded, max(8, 2048 // padded)


def layer_inputs(
    mixed: torch.Tensor,
    *,
    tail: torch.Tensor,
    present: torch.Tensor,
    conv: torch.Tensor,
    gain: torch.Tensor,
    turn: Turn,
    pending_keys: torch.Tensor,
    pending_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections of a chunk -> what the recurrence takes and what the window holds.

    Args:
        mixed: queries, keys and values of every head, [B, C, N, 3 D].
        tail: the last three of the chunk before, [B, C, 3, 3 D].
        present: tokens that are there; others count as 0, [B, N] bool.
        conv: taps of the short convolution, [3 D, 4].
        gain: of the norm of the read's keys, [H, K].
        pending_keys, pending_values: the window before the chunk, [B, W, C, H, K].

    Returns:
        Convolved queries and keys of length 1 and values, 3 x [B C, N, H, K]; keys, normed and turned, and values of
        the window and the chunk, 2 x [B, W + N, C, H, K].
    """
    q, k, v, keys, values = _Inputs.apply(
        mixed.contiguous(), tail.to(mixed.dtype).contiguous(), present.contiguous(), conv.contiguous(),
        gain.contiguous(), *turn, pending_keys, pending_values,
    )  # fmt: skip
    return q, k, v, keys, values


class _Inputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        tail: torch.Tensor,
        present: torch.Tensor,
        conv: torch.Tensor,
        gain: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        pending_keys: torch.Tensor,
        pending_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        (B, C, N, _), (H, K), W = mixed.shape, gain.shape, pending_keys.shape[1]
        q, k, v = (mixed.new_empty(B * C, N, H, K) for _ in range(3))
        keys, values = (mixed.new_empty(B, W + N, C, H, K) for _ in range(2))
        keys[:, :W], values[:, :W] = pending_keys, pending_values
        BK, BT = _tile(K)
        grid = (B * C * triton.cdiv(N, BT), H, 3)
        kernels.inputs_kernel[grid](
            mixed, tail, present.view(torch.uint8), conv, gain, cosine, sine, q, k, v, keys, values, N, W, C=C, H=H,
            K=K, BK=BK, PAIRS=cosine.shape[-1], BT=BT, num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(mixed, tail, present, conv, gain, cosine, sine)
        ctx.window, ctx.kinds = W, (pending_keys.dtype, pending_values.dtype)
        ctx.set_materialize_grads(False)
        return q, k, v, keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        mixed, tail, present, conv, gain, cosine, sine = ctx.saved_tensors
        (B, C, N, width), (H, K), W = mixed.shape, gain.shape, ctx.window
        shapes = [(B * C, N, H, K)] * 3 + [(B, W + N, C, H, K)] * 2
        dq, dk, dv, dkeys, dvalues = (
            mixed.new_zeros(shape) if grad is None else grad.contiguous()
            for grad, shape in zip(grads, shapes, strict=True)
        )
        BK, BT = _tile(K)
        tiles, all_tiles = triton.cdiv(N, BT * LOOP), triton.cdiv(N + TAPS - 1, BT)
        dz, dmixed, dtail = torch.empty_like(mixed), torch.empty_like(mixed), torch.empty_like(tail)
        dconv = conv.new_empty(B * C * tiles, TAPS, width, dtype=torch.float32)  # [T, taps, 3 D]
        dgain = gain.new_empty(B * C * all_tiles, H, K, dtype=torch.float32)  # [T, H, K]
        flags = present.view(torch.uint8)
        sizes: dict[str, Any] = {"C": C, "H": H, "K": K, "BK": BK, "BT": BT, "num_warps": WARPS}
        kernels.written_grad_kernel[(B * C * tiles, H, 3)](
            mixed, tail, flags, conv, dq, dk, dv, dz, dconv, N, LOOP=LOOP, **sizes
        )  # fmt: skip
        kernels.inputs_grad_kernel[(B * C * all_tiles, H, 3)](
            mixed, flags, conv, gain, cosine, sine, dz, dkeys, dvalues, dmixed, dtail, dgain, N, W,
            PAIRS=cosine.shape[-1], **sizes,
        )  # fmt: skip
        key_kind, value_kind = ctx.kinds
        return (
            dmixed, dtail, None, dconv.sum(0).mT.to(conv.dtype), dgain.sum(0).to(gain.dtype), None, None,
            dkeys[:, :W].to(key_kind), dvalues[:, :W].to(value_kind),
        )  # fmt: skip


def turned_queries(raw: torch.Tensor, *, gain: torch.Tensor, turn: Turn, scale: float) -> torch.Tensor:
    """Queries of the read, normed, turned and scaled: [B, C, N, D] -> [B, N, C, H, K]."""
    turned: torch.Tensor = _Queries.apply(raw.contiguous(), gain.contiguous(), *turn, scale)
    return turned


class _Queries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, raw: torch.Tensor, gain: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, scale: float
    ) -> torch.Tensor:
        (B, C, N, _), (H, K) = raw.shape, gain.shape
        out = raw.new_empty(B, N, C, H, K)
        BK, BT = _tile(K)
        kernels.queries_kernel[(B * C * triton.cdiv(N, BT), H)](
            raw, gain, cosine, sine, out, scale, N, C=C, H=H, K=K, BK=BK, PAIRS=cosine.shape[-1], BT=BT,
            num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(raw, gain, cosine, sine)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raw, gain, cosine, sine = ctx.saved_tensors
        (B, C, N, _), (H, K) = raw.shape, gain.shape
        BK, BT = _tile(K)
        tiles = B * C * triton.cdiv(N, BT)
        draw, dgain = torch.empty_like(raw), gain.new_empty(tiles, H, K, dtype=torch.float32)
        kernels.queries_grad_kernel[(tiles, H)](
            raw, gain, cosine, sine, grad.contiguous(), draw, dgain, ctx.scale, N, C=C, H=H, K=K, BK=BK,
            PAIRS=cosine.shape[-1], BT=BT, num_warps=WARPS,
        )  # fmt: skip
        return draw, dgain.sum(0).to(gain.dtype), None, None, None


def mixed_branches(
    recurrent: torch.Tensor,
    exact: torch.Tensor,
    *,
    marks: torch.Tensor,
    now: torch.Tensor,
    gates: torch.Tensor,
    opened: torch.Tensor,
    recurrent_gain: torch.Tensor,
    exact_gain: torch.Tensor,
    from_marks: torch.Tensor,
) -> torch.Tensor:
    """Both branches normed, gated head by head, added, and gated once more, [B, C, N, D].

    Args:
        recurrent: [B, C, N, H, V].
        exact: what was read, [B, N, C, H, V], and the marks read with it: level, log scale, 1, [B, N, C, H, 3].
        now: the tokens' own marks, without a gradient, [B, C, N, 3].
        gates: decay, write gate, recurrent gate, gate of the read, before the sigmoid, [B, C, N, 4, H].
        opened: output gate before the sigmoid, [B, C, N, D]; the result has its dtype.
        recurrent_gain, exact_gain: [H, V].
        from_marks: what level and scale of what was read add to it, [H, 2, V].
    """
    both: torch.Tensor = _Mix.apply(
        recurrent.contiguous(), exact.contiguous(), marks.float().contiguous(), now.float().contiguous(),
        gates.contiguous(), opened.contiguous(), recurrent_gain.contiguous(), exact_gain.contiguous(),
        from_marks.contiguous(),
    )  # fmt: skip
    return both


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        recurrent, _, marks, now, _, opened, _, _, _ = given
        B, C, N, H, K = recurrent.shape
        if marks.shape[-1] != MARKS or now.shape[-1] != MARKS:
            raise ValueError(f"The fused layer reads {MARKS} marks. Got {marks.shape[-1]} and {now.shape[-1]}.")
        out = torch.empty_like(opened)
        BK, BT = _tile(K)
        grid = (B * C * triton.cdiv(N, BT), H)
        mixing.mix_kernel[grid](*given, out, N, C=C, H=H, K=K, BK=BK, BT=BT, num_warps=WARPS)
        ctx.save_for_backward(*given)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = ctx.saved_tensors
        recurrent, exact, marks, _, gates, opened, gain, exact_gain, from_marks = given
        B, C, N, H, K = recurrent.shape
        BK, BT = _tile(K)
        tiles = B * C * triton.cdiv(N, BT * LOOP)
        drecurrent, dexact, dmarks, dopened = (torch.empty_like(x) for x in (recurrent, exact, marks, opened))
        dgates = torch.zeros_like(gates)  # decay and write gate have their own way
        parts = gain.new_empty(tiles, H, 4, K, dtype=torch.float32)  # [T, H, 4, K]
        mixing.mix_grad_kernel[(tiles, H)](
            *given, grad.contiguous(), drecurrent, dexact, dmarks, dgates, dopened, parts, N, C=C, H=H, K=K, BK=BK,
            BT=BT, LOOP=LOOP, num_warps=WARPS,
        )  # fmt: skip
        dgain, dexact_gain, dlevel, dscale = parts.sum(0).unbind(1)  # 4 x [H, K]
        return (
            drecurrent, dexact, dmarks, None, dgates, dopened, dgain.to(gain.dtype), dexact_gain.to(exact_gain.dtype),
            torch.stack([dlevel, dscale], 1).to(from_marks.dtype),
        )  # fmt: skip


@torch.no_grad()
def compared(
    error: torch.Tensor, values: torch.Tensor, beta: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error, and cosine distance of prediction and value, float32: 2 x [..., K] -> 2 x [...]; no gradient.

    Args:
        beta: write gates, [...], where ``error`` is what was written, the gate's part of it; None: it is the error.
    """
    K = values.shape[-1]
    error, values = error.contiguous(), values.contiguous()
    squared = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
    surprise = torch.empty_like(squared)
    gates = squared if beta is None else beta.contiguous()
    BK, BT = _tile(K)
    mixing.compared_kernel[(triton.cdiv(squared.numel(), BT),)](
        error, values, gates, squared, surprise, squared.numel(), WRITTEN=beta is not None, K=K, BK=BK, BT=BT,
        num_warps=WARPS,
    )  # fmt: skip
    return squared, surprise
