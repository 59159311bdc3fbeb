"""What the read's Triton kernels are given: who sees whom, features of columns, and sizes.

B items · C channels · N patches · H heads · M entries (scratchpad) · W window patches · R marks
L places of the window, W + N · RP, 4 marks and their parts · DX features of marks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from hamts.ops import attend_triton_prepare as prepare
from hamts.ops.attend_triton_tiles import Tiles
from hamts.ops.types import ScratchKeys

__all__ = ["Sight", "Sizes", "biases", "narrow", "pointer", "precision", "sight_of"]

# programs for each multiprocessor below which the rows of a tile of columns are split
PROGRAMS = 4
MOST_PARTS = 16
# columns of a program that prepares features
COLUMNS = 64
# entries of a program that clips their lives
LIVES = 1024


@dataclass(frozen=True)
class Sight:
    """Who may see whom; nothing of it has a gradient."""

    channels: int
    window: int
    span: int
    share: bool  # the last mark of every key is 1
    words: int
    present: torch.Tensor  # [B, LC] bool
    bits: torch.Tensor  # [B, C, words] int32: channel d is bit d % 32 of word d // 32
    since: torch.Tensor | None  # [B, M] int32 in 0 .. N; N for entries that no query sees
    until: torch.Tensor | None  # [B, M] int32 in 0 .. N; 0 for entries that no query sees
    source: torch.Tensor | None  # [B, M] int32


def sight_of(
    N: int,
    C: int,
    window: int,
    span: int,
    present: torch.Tensor,
    readable: torch.Tensor,
    pad: ScratchKeys | None,
    *,
    share: bool,
) -> Sight:
    words = (C + 31) // 32
    bits = torch.zeros(1, 1, words, dtype=torch.int32, device=present.device)  # [1, 1, words]
    if C > 1:
        padded = torch.nn.functional.pad(readable, (0, 32 * words - C)).unflatten(-1, (words, 32))
        weight = 1 << torch.arange(32, device=present.device)  # [32]
        bits = (padded.long() * weight).sum(-1).to(torch.int32)  # [B, C, words]
    if pad is None:
        return Sight(C, window, span, share, words, present.flatten(1).contiguous(), bits, None, None, None)
    source = pad.channel.int().contiguous() if C > 1 else bits  # [B, M]
    life = torch.empty(2, *pad.channel.shape, dtype=torch.int32, device=present.device)  # [2, B, M]
    prepare.life_kernel[(triton.cdiv(life[0].numel(), LIVES),)](
        pad.visible_from.contiguous(), pad.visible_until.contiguous(), life, N, life[0].numel(), BN=LIVES
    )
    return Sight(C, window, span, share, words, present.flatten(1).contiguous(), bits, life[0], life[1], source)


def biases(sight: Sight, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Biases of places [B, LC] and of entries, [B, M, H] -> [B, H, M], in powers of 2.

    They are so low that the absent and dead are not seen.
    """
    absent = prepare.ABSENT.value
    local = torch.where(sight.present, 0.0, absent)  # [B, LC]
    if bias is None or sight.since is None or sight.until is None:
        return local, None
    dead = (sight.since >= sight.until)[..., None]  # [B, M, 1]
    return local, (bias * prepare.LOG2E.value).masked_fill(dead, absent).mT.contiguous()


def narrow(dtype: torch.dtype) -> bool:
    """May features be in bfloat16? The interpreter has no products of it."""
    return dtype != torch.float32 and not triton.knobs.runtime.interpret


def precision() -> str:
    """Of products in float32: three on Tensor Cores come near to it; one, of 10 bits, where PyTorch may too."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


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
    share: bool
    entries: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(
        q: torch.Tensor,
        local_k: torch.Tensor,
        local_v: torch.Tensor,
        k: torch.Tensor | None,
        marks: torch.Tensor | None,
        sight: Sight,
    ) -> Sizes:
        for name, x in (("queries", q), ("local_keys", local_k), ("local_values", local_v), ("scratch.keys", k)):
            if x is not None and x[:1].numel() >= 2**31:
                raise ValueError(
                    f"{name} must hold fewer than 2**31 numbers an item for kernel 'triton'. Got {x.shape}."
                )
        entries = 0 if k is None else k.shape[1]
        B, _, H, K = q.shape
        n_marks = 0 if marks is None else marks.shape[-1]
        return Sizes(B, H, sight.channels, K, local_v.shape[-1], n_marks, sight.share, entries, q.dtype, q.device)

    @property
    def padded_marks(self) -> int:
        return max(4, triton.next_power_of_2(self.marks))

    @property
    def padded_features(self) -> int:
        return max(16, triton.next_power_of_2(6 * (self.marks - self.share) + 3))

    def columns(
        self, sight: Sight, marks: torch.Tensor | None, bias: torch.Tensor | None, n_columns: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Biases of columns and packed marks, [B, X, RP, 4]: of entries, or of places where bias is None."""
        of_entries = bias is not None
        heads = (self.heads,) if of_entries else ()
        device, marked = sight.bits.device, marks is not None
        raised = torch.empty(self.items, *heads, n_columns, dtype=torch.float32, device=device)  # [B, (H), X]
        packed = torch.empty(self.items, n_columns if marked else 0, self.padded_marks, 4, dtype=dtype, device=device)
        strides = (bias.stride(1), bias.stride(2)) if bias is not None else (0, 0)
        grid = (triton.cdiv(n_columns, COLUMNS), self.items, self.heads if of_entries else 1)
        prepare.column_kernel[grid](
            sight.present, pointer(sight.since, sight.bits), pointer(sight.until, sight.bits),
            pointer(bias, sight.bits), pointer(marks, sight.bits), raised, packed, n_columns, *strides, H=self.heads,
            C=self.channels, R=self.marks if marked else 0, RP=self.padded_marks, ENTRIES=of_entries,
            NARROW=narrow(self.dtype), BN=COLUMNS,
        )  # fmt: skip
        return raised, packed

    def mark_features(self, marks: torch.Tensor | None, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Marks as columns of the backward product, [B, X, R] -> [B, X, DX]."""
        n_columns = keys.shape[1]
        features = keys.new_empty(self.items, n_columns, self.padded_features, dtype=dtype)  # [B, X, DX]
        prepare.mark_kernel[(triton.cdiv(n_columns, COLUMNS), self.items)](
            pointer(marks, keys), features, n_columns, C=self.channels, R=self.marks, SHARE=self.share,
            DX=self.padded_features, NARROW=narrow(self.dtype), BN=COLUMNS,
        )  # fmt: skip
        return features

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
            "PRECISION": precision(),
        }

    def bounds(self, sight: Sight, tiles: Tiles, q: torch.Tensor) -> torch.Tensor:
        """Which tiles of entries each tile of rows needs, int32 [B, Q, 4]."""
        if not self.entries:
            return sight.bits
        n_tiles = triton.cdiv(q.shape[1], tiles.rows)
        bounds = q.new_empty(self.items, n_tiles, 4, dtype=torch.int32)
        prepare.bounds_kernel[(n_tiles, self.items)](
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

    def even(self, sight: Sight, rows: int, tiles: Tiles) -> bool:
        """Does every tile of columns that a tile of rows reads lie inside its tensor? Then no load needs a mask."""
        whole = rows % tiles.rows == 0 and self.entries % tiles.columns == 0 and self.channels == 1
        return whole and (tiles.rows + sight.window) % tiles.columns == 0

    def parts(self, n_columns: int, tiles: Tiles) -> int:
        """Into how many parts the rows of a tile of columns are split, so that the device has enough to do."""
        if self.device.type != "cuda":
            return 2
        programs = triton.cdiv(n_columns, tiles.columns) * self.items * self.heads
        wanted = PROGRAMS * torch.cuda.get_device_properties(self.device).multi_processor_count
        return max(1, min(MOST_PARTS, wanted // programs))
