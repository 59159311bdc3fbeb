"""From hidden vectors to quantiles that never cross.

B items · C channels · N patches · P steps in a patch · D width · Q quantiles
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from hamts.data.constants import constant

__all__ = ["QuantileHead", "interpolate_quantiles", "outward", "pinball", "quantile_mean"]


class QuantileHead(nn.Module):
    """Quantiles of every step of a token: the median, and outward sums of softplus gaps."""

    def __init__(self, width: int, patch_steps: int, levels: tuple[float, ...]) -> None:
        super().__init__()
        self.patch_steps = patch_steps
        self.levels = levels
        self.middle = levels.index(0.5)
        self.project = nn.Linear(width, patch_steps * len(levels))
        with torch.no_grad():
            self.project.weight.mul_(0.3)
            # gaps start near those of a unit normal with this many levels
            self.project.bias.view(patch_steps, len(levels)).fill_(-1.5)
            self.project.bias.view(patch_steps, len(levels))[:, self.middle] = 0.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., P, Q], rising along Q."""
        raw = self.project(hidden).unflatten(-1, (self.patch_steps, len(self.levels)))  # [..., P, Q]
        median = raw[..., self.middle : self.middle + 1]  # [..., P, 1]
        gaps = F.softplus(raw)  # [..., P, Q]
        above = median + outward(gaps[..., self.middle + 1 :])  # [..., P, Q above]
        below = median - outward(gaps[..., : self.middle].flip(-1)).flip(-1)  # [..., P, Q below]
        return torch.cat([below, median, above], -1)


def outward(gaps: torch.Tensor, *, levels_first: bool | None = None) -> torch.Tensor:
    """Running sums over the last dimension, [..., Q] -> [..., Q].

    A GPU gives each short row a whole block of threads; with the levels first it sums a million rows side by side.

    Args:
        levels_first: None: on a GPU.
    """
    if gaps.is_cuda if levels_first is None else levels_first:
        return gaps.movedim(-1, 0).contiguous().cumsum(0).movedim(0, -1)
    return gaps.cumsum(-1)


def pinball(quantiles: torch.Tensor, truth: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Quantile loss, twice the pinball, averaged over levels. [..., Q], [...], [Q] -> [...]."""
    short = truth[..., None] - quantiles  # [..., Q]
    return 2.0 * torch.maximum(levels * short, (levels - 1.0) * short).mean(-1)


def quantile_mean(quantiles: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Mean of the piecewise linear quantile function, flat beyond its outermost levels. [..., Q] -> [...]."""
    level = constant(levels, quantiles.dtype, quantiles.device)  # [Q]
    edges = torch.cat([level.new_zeros(1), (level[1:] + level[:-1]) / 2, level.new_ones(1)])  # [Q + 1]
    return (quantiles * edges.diff()).sum(-1)


def interpolate_quantiles(quantiles: torch.Tensor, levels: tuple[float, ...], asked: tuple[float, ...]) -> torch.Tensor:
    """Quantiles at other levels, linear between the trained ones. [..., Q] -> [..., len(asked)].

    Raises:
        ValueError: a level lies outside the trained ones.
    """
    outside = [q for q in asked if not levels[0] <= q <= levels[-1]]
    if outside:
        raise ValueError(
            f"Quantiles must lie within the trained levels {levels[0]} to {levels[-1]}. Got {outside}."
            " Ask for levels inside that range."
        )
    grid = constant(levels, quantiles.dtype, quantiles.device)  # [Q]
    wanted = constant(asked, quantiles.dtype, quantiles.device)  # [A]
    right = torch.searchsorted(grid, wanted).clamp(1, len(levels) - 1)  # [A]
    weight = (wanted - grid[right - 1]) / (grid[right] - grid[right - 1])  # [A]
    return quantiles[..., right - 1] + weight * (quantiles[..., right] - quantiles[..., right - 1])
