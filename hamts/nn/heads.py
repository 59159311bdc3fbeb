"""Heads turned by time and normed: what the window's and the scratchpad's keys share.

B items · C channels · N patches · H heads · K key
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["HeadNorm", "rotate"]

# half of a head's width turns with time, the other half matches content at any age
ROTARY_SHARE = 0.5
ROTARY_LONGEST_PATCHES = 4096.0


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary position on true time. x [B, N, C, H, K], position [B, N] float64 in patches -> [B, N, C, H, K].

    Angles are taken in float64: at a million patches float32 would be off by several degrees.
    """
    pairs = int(x.shape[-1] * ROTARY_SHARE) // 2
    if pairs == 0:
        return x
    rates = torch.logspace(
        0, -math.log2(ROTARY_LONGEST_PATCHES / 4), pairs, base=2.0, dtype=torch.float64, device=x.device
    ) * (2 * math.pi / 4)  # [pairs]; periods from 4 patches to the longest
    angle = (position[..., None] * rates)[:, :, None, None]  # [B, N, 1, 1, pairs]
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], -1)


class HeadNorm(nn.Module):
    """RMS norm of each head's vector, with a gain per head and unit."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads, head_width))  # [H, K]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.gain
