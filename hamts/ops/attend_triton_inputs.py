"""What the read's Triton kernels are given: who sees whom, features of columns, and sizes.

B items · C channels · N patches · H heads · M entries (scratchpad) · W window patches · R marks
L places of the window, W + N · RP, 4 marks and their parts · DX features of marks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from hamts.ops import attend_triton_kernels as kernels
from hamts.ops.attend_triton_tiles import Tiles
from hamts.ops.types import ScratchKeys

__all__ = [
    "Sight",
    "Sizes",
    "biases",
    "column_features",
    "mark_features",
    "narrow",
    "pack_marks",
    "pointer",
    "sight_of",
]

# early entries are seen by most rows, so their programs run longest: below so many programs for each multiprocessor
# the rows are split, or the last of the long ones would run alone
PROGRAMS = 64
MOST_PARTS = 16


@dataclass(frozen=True)
class Sight:
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


def sight_of(
    N: int, C: int, window: int, span: int, present: torch.Tensor, readable: torch.Tensor, pad: ScratchKeys | None
) -> Sight:
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
    return Sight(C, window, span, words, present.flatten(1), bits, since, until, source)


def biases(sight: Sight, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Biases of places [B, LC] and of entries, [B, M, H] -> [B, H, M]; so low that the absent and dead are not seen."""
    absent = kernels.ABSENT.value
    local = torch.where(sight.present, 0.0, absent)  # [B, LC]
    if bias is None or sight.since is None or sight.until is None:
        return local, None
    dead = (sight.since >= sight.until)[..., None]  # [B, M, 1]
    return local, bias.masked_fill(dead, absent).mT.contiguous()


def narrow(dtype: torch.dtype) -> bool:
    """May features be in bfloat16? The interpreter has no products of it."""
    return dtype != torch.float32 and not triton.knobs.runtime.interpret


def _parts(x: torch.Tensor, small: bool) -> list[torch.Tensor]:
    """Three bfloat16 numbers that add up to each float32 number; or the number and two zeros."""
    if not small:
        return [x, torch.zeros_like(x), torch.zeros_like(x)]
    high = x.to(torch.bfloat16)
    middle = (x - high).to(torch.bfloat16)
    return [high, middle, (x - high - middle).to(torch.bfloat16)]


def column_features(bias: torch.Tensor, small: bool) -> torch.Tensor:
    """What every column adds to its logits, [..., X] -> [..., X, FEATURES]."""
    parts = _parts(bias, small)
    columns = torch.stack([*parts, *[torch.ones_like(parts[0])] * 3], -1)
    return torch.nn.functional.pad(columns, (0, kernels.FEATURES.value - 6)).contiguous()


def pack_marks(marks: torch.Tensor, padded: int, small: bool) -> torch.Tensor:
    """Marks as columns of the forward product, [B, X, R] -> [B, X, RP, 4]; the last column is 1."""
    packed = torch.stack(_parts(marks, small), -1)  # [B, X, R, 3]
    packed = torch.nn.functional.pad(packed, (0, 1, 0, padded - marks.shape[-1])).contiguous()
    packed[..., -1, -1] = 1
    return packed


def mark_features(marks: torch.Tensor, padded: int, one_channel: bool, small: bool) -> torch.Tensor:
    """Marks as columns of the backward product, [B, X, R] -> [B, X, DX]; see _slope_features for their partners."""
    high, middle, low = _parts(marks, small)
    nothing = torch.zeros_like(high)
    six = [high, high, high, middle, middle, low] if small else [high, *[nothing] * 5]
    packed = torch.stack(six, -1).flatten(-2)  # [B, X, 6 R]
    ones = packed.new_full((*packed.shape[:2], 3), float(one_channel))  # [B, X, 3]
    return torch.nn.functional.pad(torch.cat([packed, ones], -1), (0, padded - packed.shape[-1] - 3)).contiguous()


def pointer(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """Kernels take a pointer also where they read nothing."""
    return stand_in if tensor is None else tensor


@dataclass(frozen=True)
class Sizes:
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
        q: torch.Tensor, local_k: torch.Tensor, local_v: torch.Tensor, k: torch.Tensor | None, marks: int, sight: Sight
    ) -> Sizes:
        for name, x in (("queries", q), ("local_keys", local_k), ("local_values", local_v), ("scratch.keys", k)):
            if x is not None and x[:1].numel() >= 2**31:
                raise ValueError(
                    f"{name} must hold fewer than 2**31 numbers an item for kernel 'triton'. Got {x.shape}."
                )
        entries = 0 if k is None else k.shape[1]
        B, _, H, K = q.shape
        return Sizes(B, H, sight.channels, K, local_v.shape[-1], marks, entries, q.dtype, q.device)

    @property
    def padded_marks(self) -> int:
        return max(4, triton.next_power_of_2(self.marks))

    @property
    def padded_features(self) -> int:
        return max(16, triton.next_power_of_2(6 * self.marks + 3))

    def mark_features(self, marks: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
        if marks is None:
            marks = keys.new_empty(*keys.shape[:2], 0, dtype=torch.float32)  # [B, X, 0]
        return mark_features(marks, self.padded_features, self.channels == 1, narrow(self.dtype))

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

    def bounds(self, sight: Sight, tiles: Tiles, q: torch.Tensor) -> torch.Tensor:
        """Which tiles of entries each tile of rows needs, int32 [B, Q, 4]."""
        if not self.entries:
            return sight.bits
        n_tiles = triton.cdiv(q.shape[1], tiles.rows)
        bounds = q.new_empty(self.items, n_tiles, 4, dtype=torch.int32)
        kernels.bounds_kernel[(n_tiles, self.items)](
            sight.since,
            sight.until,
            bounds,
            q.shape[1],
            self.entries,
            C=self.channels,
            BM=tiles.rows,
            BN=tiles.columns,
        )
        return bounds

    def parts(self, n_columns: int, tiles: Tiles) -> int:
        """Into how many parts the rows of a tile of columns are split, so that the device has enough to do."""
        if self.device.type != "cuda":
            return 2
        programs = triton.cdiv(n_columns, tiles.columns) * self.items * self.heads
        wanted = PROGRAMS * torch.cuda.get_device_properties(self.device).multi_processor_count
        return max(1, min(MOST_PARTS, wanted // programs))
