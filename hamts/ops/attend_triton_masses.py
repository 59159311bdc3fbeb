"""The masses, what every key received: kernel and launch. Words and letters as in ``attend_triton_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from hamts.ops.attend_triton_gradients import _column_weights, _row_range
from hamts.ops.attend_triton_inputs import Sight, Sizes, biases, pointer
from hamts.ops.attend_triton_prepare import ABSENT, LOG2E, VARYING, _life, _tile
from hamts.ops.attend_triton_tiles import Tiles, launch

__all__ = ["masses_of"]


@triton.jit
def _mass_rows(
    mass, k, columns, bias, since, until, sources, begin, end, q_ptr, lse_ptr, bits_ptr, channel_bias, n_rows, window,
    span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # from the last row back, as the gradients
    for done in tl.range(0, end - begin, BM):
        rows = tl.multiple_of(end - BM - done, BM) + tl.arange(0, BM)
        q = _tile(q_ptr, rows, n_rows, H * K, K, BK, MASKED)
        lse = tl.load(lse_ptr + rows, mask=rows < n_rows, other=-ABSENT)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * LOG2E + (bias[:, None] - lse[None, :])
        p, _ = _column_weights(
            x, rows, columns, since, until, sources, bits_ptr, channel_bias, window, span, words, C, ENTRIES, MASKED,
        )  # fmt: skip
        mass += tl.sum(p, 1)
    return mass


@triton.jit(do_not_specialize=VARYING)
def mass_kernel(
    q_ptr, keys_ptr, bias_ptr, from_ptr, until_ptr, source_ptr, bits_ptr, channel_bias_ptr, lse_ptr,
    mass_ptr, n_rows, n_columns, window, span, words, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Probability that each column received, summed over rows, [parts, B, H, M]."""
    n_tiles = tl.cdiv(n_columns, BN)
    tile, part = tl.program_id(0) % n_tiles, tl.program_id(1)
    item = (tl.program_id(0) // n_tiles // H).to(tl.int64)
    head = tl.program_id(0) // n_tiles % H
    columns = tile * BN + tl.arange(0, BN)
    inside = columns < n_columns
    k = _tile(keys_ptr + (item * n_columns * H + head) * K, columns, n_columns, H * K, K, BK, True)
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
    lse_ptr += (item * H + head) * n_rows
    bits_ptr += item * C * words
    channel_bias = tl.load(channel_bias_ptr + head).to(tl.float32) * LOG2E
    mass = tl.zeros([BN], tl.float32)
    begin, full_begin, full_end, end = _row_range(
        since, until, columns, n_rows, n_columns, window, part, PARTS, C, ENTRIES, BM
    )
    if ENTRIES:
        mass = _mass_rows(
            mass, k, columns, bias, since, until, sources, full_end, end, q_ptr, lse_ptr, bits_ptr,
            channel_bias, n_rows, window, span, words, H, C, K, BK, ENTRIES, PRECISION, BM, True,
        )  # fmt: skip
        mass = _mass_rows(
            mass, k, columns, bias, since, until, sources, full_begin, full_end, q_ptr, lse_ptr, bits_ptr,
            channel_bias, n_rows, window, span, words, H, C, K, BK, ENTRIES, PRECISION, BM, False,
        )  # fmt: skip
    mass = _mass_rows(
        mass, k, columns, bias, since, until, sources, begin, full_begin, q_ptr, lse_ptr, bits_ptr,
        channel_bias, n_rows, window, span, words, H, C, K, BK, ENTRIES, PRECISION, BM, True,
    )  # fmt: skip
    n_items = tl.num_programs(0) // n_tiles // H
    place = mass_ptr + ((part * n_items + item) * H + head).to(tl.int64) * n_columns + columns
    tl.store(place, mass, mask=inside)


def masses_of(
    q: torch.Tensor,
    local_k: torch.Tensor,
    k: torch.Tensor | None,
    bias: torch.Tensor | None,
    channel_bias: torch.Tensor,
    lse: torch.Tensor,
    sight: Sight,
    size: Sizes,
) -> dict[str, Callable[[], torch.Tensor | None]]:
    """How to get the masses of places [B, L, C] and entries [B, M]."""

    def local() -> torch.Tensor:
        mass = _mass(q, local_k, biases(sight, None)[0], channel_bias, lse, sight, size)  # [B, LC]
        return mass.unflatten(1, (-1, sight.channels))

    def entries() -> torch.Tensor | None:
        raised = biases(sight, bias)[1]  # [B, H, M]
        return None if k is None or raised is None else _mass(q, k, raised, channel_bias, lse, sight, size)

    return {"local_mass": local, "scratch_mass": entries}


def _mass(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    channel_bias: torch.Tensor,
    lse: torch.Tensor,
    sight: Sight,
    size: Sizes,
) -> torch.Tensor:
    """Probability each key received, summed over queries and heads, [B, X]; bias [B, H, M] of entries, [B, LC] else."""
    (B, X, H, _), T = k.shape, q.shape[1]
    of_entries = bias.ndim == 3
    masses: list[torch.Tensor] = []
    widths = {name: x for name, x in size.widths().items() if name not in ("V", "BV", "R")}

    def run(tiles: Tiles) -> None:
        parts = size.parts(X, tiles) if of_entries else 1
        masses[:] = [lse.new_empty(parts, B, H, X)]
        mass_kernel[(triton.cdiv(X, tiles.columns) * B * H, parts)](
            q, k, bias, pointer(sight.since, sight.bits), pointer(sight.until, sight.bits),
            pointer(sight.source, sight.bits), sight.bits, channel_bias, lse, masses[0], T, X, sight.window, sight.span,
            sight.words, **widths, ENTRIES=of_entries, PARTS=parts, **tiles.options(),
        )  # fmt: skip

    launch("mass", run, size.key)
    return masses[0].sum((0, 2))
