"""Triton kernels of a layer's gates: a narrow map of the tokens in full precision, beside a cast of them, in one pass.

Full precision is three TF32 products for each, where PyTorch asks for the highest. The map is so narrow that reading
the tokens is what takes time, so nothing but the tokens and what is made of them moves.

T tokens · D width · G outputs · BT, BD, BG their tiles
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hamts.ops.attend_triton_inputs import precision

__all__ = ["MOST_OUTPUTS", "cast_and_map", "widened_sum"]

# a tile holds all outputs
MOST_OUTPUTS = 128
TOKENS, WIDTH, WARPS = 64, 64, 4


def cast_and_map(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [T, D] in a narrower dtype, and what a map, [G, D] and [G], makes of them, [T, G] float32."""
    (T, D), G = x.shape, len(weight)
    narrow, made = x.new_empty(T, D, dtype=kind), x.new_empty(T, G)
    cast_and_map_kernel[(triton.cdiv(T, TOKENS),)](
        x, weight, bias, narrow, made, T, D=D, G=G, BT=TOKENS, BD=WIDTH, BG=_tile(G), PRECISION=precision(),
        num_warps=WARPS,
    )  # fmt: skip
    return narrow, made


def widened_sum(narrow: torch.Tensor, of_map: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The narrow gradient [T, D] plus that through a map, [T, G] times [G, D], in float32."""
    (T, D), G = narrow.shape, len(weight)
    out = of_map.new_empty(T, D)
    widened_sum_kernel[(triton.cdiv(T, TOKENS), triton.cdiv(D, WIDTH))](
        narrow, of_map, weight, out, T, D=D, G=G, BT=TOKENS, BD=WIDTH, BG=_tile(G), PRECISION=precision(),
        num_warps=WARPS,
    )  # fmt: skip
    return out


def _tile(outputs: int) -> int:
    return max(16, triton.next_power_of_2(outputs))


@triton.jit(do_not_specialize=("n_tokens",))
def cast_and_map_kernel(
    x_ptr, weight_ptr, bias_ptr, narrow_ptr, made_ptr, n_tokens, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token, output = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BG)
    inside, good = token < n_tokens, output < G
    made = tl.zeros([BT, BG], tl.float32)
    for start in tl.range(0, D, BD):
        unit = start + tl.arange(0, BD)
        there = inside[:, None] & (unit < D)[None, :]
        place = token[:, None] * D + unit[None, :]
        x = tl.load(x_ptr + place, mask=there, other=0.0)
        tl.store(narrow_ptr + place, x.to(narrow_ptr.dtype.element_ty), mask=there)
        use = (unit < D)[:, None] & good[None, :]
        weight = tl.load(weight_ptr + output[None, :] * D + unit[:, None], mask=use, other=0.0)
        made = tl.dot(x, weight, made, input_precision=PRECISION)
    made += tl.load(bias_ptr + output, mask=good, other=0.0)[None, :]
    tl.store(made_ptr + token[:, None] * G + output[None, :], made, mask=inside[:, None] & good[None, :])


@triton.jit(do_not_specialize=("n_tokens",))
def widened_sum_kernel(
    narrow_ptr, map_ptr, weight_ptr, out_ptr, n_tokens, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token, output = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BG)
    unit = tl.program_id(1) * BD + tl.arange(0, BD)
    inside, good = token < n_tokens, output < G
    there = inside[:, None] & (unit < D)[None, :]
    place = token[:, None] * D + unit[None, :]
    total = tl.load(narrow_ptr + place, mask=there, other=0.0).to(tl.float32)
    of_map = tl.load(map_ptr + token[:, None] * G + output[None, :], mask=inside[:, None] & good[None, :], other=0.0)
    weight = tl.load(
        weight_ptr + output[:, None] * D + unit[None, :], mask=good[:, None] & (unit < D)[None, :], other=0.0
    )
    total = tl.dot(of_map, weight, total, input_precision=PRECISION)
    tl.store(out_ptr + place, total, mask=there)
