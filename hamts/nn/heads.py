"""Heads turned by time and normed: what the window's and the scratchpad's keys share.

B items · C channels · N patches · H heads · K key
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import ModelConfig

__all__ = ["HeadNorm", "Turn", "angles", "rotate", "start_gates", "start_queries", "turned"]

# cosine and sine of every pair's angle, 2 x [B, N, pairs]
Turn = tuple[torch.Tensor, torch.Tensor]

# half of a head's width turns with time where nothing else is said, the other half matches content at any age
ROTARY_SHARE = 0.5
ROTARY_LONGEST_PATCHES = 4096.0


def angles(position: torch.Tensor, head_width: int, kind: torch.dtype, share: float = ROTARY_SHARE) -> Turn:
    """Angles of true time, position [B, N] float64 in patches, for heads of this width, 2 x [B, N, pairs].

    They are taken in float64: at a million patches float32 would be off by several degrees.
    """
    pairs = int(head_width * share) // 2
    rates = torch.logspace(
        0, -math.log2(ROTARY_LONGEST_PATCHES / 4), pairs, base=2.0, dtype=torch.float64, device=position.device
    ) * (2 * math.pi / 4)  # [pairs]; periods from 4 patches to the longest
    angle = position[..., None] * rates  # [B, N, pairs]
    return angle.cos().to(kind), angle.sin().to(kind)


def turned(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    """The first pairs of units turned by these angles: x [B, N, C, H, K] -> [B, N, C, H, K]."""
    cosine, sine = (part[:, :, None, None].to(x.dtype) for part in turn)  # 2 x [B, N, 1, 1, pairs]
    pairs = cosine.shape[-1]
    if pairs == 0:
        return x
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], -1)


def rotate(x: torch.Tensor, position: torch.Tensor, share: float = ROTARY_SHARE) -> torch.Tensor:
    """Rotary position on true time. x [B, N, C, H, K], position [B, N] float64 in patches -> [B, N, C, H, K]."""
    return turned(x, angles(position, x.shape[-1], x.dtype, share))


@torch.no_grad()
def start_queries(config: ModelConfig, to_query: nn.Linear, to_memory: nn.Linear) -> None:
    """Where the config asks for it, give queries the weights of the keys, [D, D]: the last rows but D of the memory's.

    A token is then most like itself, and what shares its content is found before anything is learned.
    """
    if config.queries_from_keys:
        to_query.weight.copy_(to_memory.weight[-2 * config.width : -config.width])


@torch.no_grad()
def start_gates(config: ModelConfig, to_gates: nn.Linear | None, to_output_gate: nn.Linear | None) -> None:
    """Bias of decay, write gate and recurrent gate nothing, that of the read's gate and of the output's as asked."""
    if to_gates is not None:
        to_gates.bias.zero_()
        # [2 or 4, H]: a layer whose branches are not mixed by gates has the first two
        to_gates.bias.view(-1, config.heads)[3:] = config.gate_start
    if to_output_gate is not None and config.gate_start:
        to_output_gate.bias.fill_(config.gate_start)


class HeadNorm(nn.Module):
    """RMS norm of each head's vector, with a gain per head and unit."""

    def __init__(self, heads: int, head_width: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((heads, head_width), gain))  # [H, K]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.gain
