"""Nearest neighbours over stored raw patches in the scratchpad's place: what followed the stretches most like the last?

B items · C channels · N patches · P steps in a patch · D width · H heads · V value · M stored patches
q patches of a stretch · I = q P its steps · n neighbours · L stored and new patches
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import ModelConfig
from hamts.nn.ham import HeadNorm, LayerOutput
from hamts.nn.mixers_base import MixerLayer, Parts
from hamts.nn.mixers_parts import MixerMemory
from hamts.nn.tokens import Policy, Tokens

__all__ = ["NeighbourMemory", "NeighboursLayer", "follow_neighbours"]

# a patch counts as known if half of it was observed
KNOWN_SHARE = 0.5
DISTANCE_STEP = 1e-4


@dataclass(frozen=True)
class NeighbourMemory:
    """State and window of the layer, and the last M raw patches of every channel."""

    layer: MixerMemory
    values: torch.Tensor  # [B, C, M, P] scaled; 0 where not observed
    observed: torch.Tensor  # [B, C, M, P] bool


def follow_neighbours(
    values: torch.Tensor, observed: torch.Tensor, *, stored: int, stretch: int, neighbours: int, sharpness: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue each stream as the earlier stretches did that look most like its last known patches.

    The last known patches of a stream, ``stretch`` of them, are compared with all its earlier stretches among the last
    ``stored`` patches by the mean squared difference of steps observed in both. A query ``gap`` patches after the last
    known one gets patches ``gap`` and ``gap`` + 1 after each neighbour, averaged under softmax(-sharpness * distance).

    Args:
        values, observed: stored patches followed by the new ones, [B, C, M + N, P].
        sharpness: above 0, [].

    Returns:
        Two patches, [B, C, N, 2, P], 0 where unknown, and how much of the weight observed each step, the same shape.
    """
    B, C, total, P = values.shape
    N = total - stored
    known = observed.to(values.dtype).mean(-1) >= KNOWN_SHARE  # [B, C, L]
    index = torch.arange(total, device=values.device)  # [L]
    anchor = torch.where(known, index, -1).cummax(2).values[:, :, stored:]  # [B, C, N]
    padded = F.pad(values * observed, (0, 0, stretch - 1, 0)).unfold(2, stretch, 1).flatten(3)  # [B, C, L, I]
    there = F.pad(observed, (0, 0, stretch - 1, 0)).unfold(2, stretch, 1).flatten(3).to(values.dtype)  # [B, C, L, I]
    at = anchor.clamp_min(0)[..., None].expand(-1, -1, -1, padded.shape[3])  # [B, C, N, I]
    ask, asked = padded.gather(2, at), there.gather(2, at)  # 2 x [B, C, N, I]
    overlap = asked @ there.mT  # [B, C, N, L] steps observed in both
    apart = ask.square() @ there.mT + asked @ padded.square().mT - 2 * (ask @ padded.mT)  # [B, C, N, L]
    distance = apart.clamp_min(0) / overlap.clamp_min(1)  # [B, C, N, L]
    # a constant channel has many neighbours at the same distance: rounding must not choose among them
    distance = (distance / DISTANCE_STEP).round() * DISTANCE_STEP
    oldest = index[stored:] - stored + 1  # [N] first patch that is still stored at each query
    usable = known[:, :, None] & (index < anchor[..., None]) & (overlap > 0)  # [B, C, N, L]
    inside = (index - stretch + 1 >= oldest[:, None]) & (anchor[..., None] - stretch + 1 >= oldest[:, None])
    distance = distance.masked_fill(~(usable & inside), torch.inf)
    near, place = _nearest(distance, min(neighbours, total))
    found = near < torch.inf
    # infinity times a gradient of nothing is not a number
    near = torch.where(found, near, 0.0)  # [B, C, N, n]
    weight = torch.softmax(torch.where(found, -sharpness * near, -1e4), -1) * found  # [B, C, N, n]
    gap = index[stored:] - anchor  # [B, C, N]
    parts, shares = [], []
    for ahead in (0, 1):
        target = place + gap[..., None] + ahead  # [B, C, N, n]
        # what lies after the last known patch is not known of a neighbour either
        valid = target <= anchor[..., None]
        flat = target.clamp_max(total - 1).flatten(2)[..., None].expand(-1, -1, -1, P)  # [B, C, N n, P]
        seen = observed.gather(2, flat).unflatten(2, (N, -1)) & valid[..., None]  # [B, C, N, n, P]
        share = weight[..., None] * seen  # [B, C, N, n, P]
        total_share = share.sum(3)  # [B, C, N, P]
        parts.append((share * values.gather(2, flat).unflatten(2, (N, -1))).sum(3) / total_share.clamp_min(1e-6))
        shares.append(total_share)
    return torch.stack(parts, 3), torch.stack(shares, 3)


def _nearest(distance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest of the last dimension and their places, [..., count] each; of equal ones the newest."""
    ordered = torch.sort(distance.flip(-1), dim=-1, stable=True)
    last = distance.shape[-1] - 1
    return ordered.values[..., :count], last - ordered.indices[..., :count]


class NeighboursLayer(MixerLayer):
    """State and window as in HAM; the first layer also continues the stream as its nearest neighbours did.

    All bytes that HAM gives to its scratchpads go to the raw patches of the first layer.
    """

    def __init__(self, config: ModelConfig, parts: Parts, *, patches: int) -> None:
        super().__init__(config, parts)
        self.patches, self.steps = patches, config.patch_steps
        self.stretch, self.neighbours = config.window_patches, config.neighbours
        if patches:
            self.embed = nn.Linear(4 * config.patch_steps, config.width)
            self.neighbour_norm = HeadNorm(self.heads, self.head_width)
            self.to_neighbour_gate = nn.Linear(config.width, self.heads)
            self.sharpness = nn.Parameter(torch.tensor(1.0))

    def empty_memory(self, items: int, channels: int, like: torch.Tensor) -> NeighbourMemory:
        layer = super().empty_memory(items, channels, like)
        values = like.new_zeros(items, channels, self.patches, self.steps)
        return NeighbourMemory(layer, values, torch.zeros_like(values, dtype=torch.bool))

    def forward(
        self,
        x: torch.Tensor,
        *,
        tokens: Tokens,
        memory: NeighbourMemory,
        policy: Policy,
        stepwise: bool = False,
        advance: bool = True,
    ) -> LayerOutput:
        result = super().forward(
            x, tokens=tokens, memory=memory.layer, policy=policy, stepwise=stepwise, advance=advance
        )
        values = torch.cat([memory.values, torch.where(tokens.observed, tokens.values, 0.0)], 2)  # [B, C, M + N, P]
        observed = torch.cat([memory.observed, tokens.observed & tokens.present[:, None, :, None]], 2)
        output = result.output
        if self.patches:
            output = output + self._follow(x, values, observed)
        after = memory
        if advance:
            N = x.shape[2]
            after = NeighbourMemory(result.memory, values[:, :, N:], observed[:, :, N:])  # type: ignore[arg-type]
        return LayerOutput(output, after, result.trace)  # type: ignore[arg-type]

    def _follow(self, x: torch.Tensor, values: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        """What the neighbours say, gated and projected, [B, C, N, D]."""
        patches, share = follow_neighbours(
            values, observed, stored=self.patches, stretch=self.stretch, neighbours=self.neighbours,
            sharpness=F.softplus(self.sharpness),
        )  # fmt: skip
        features = torch.cat([patches.flatten(3), share.flatten(3)], -1)  # [B, C, N, 4 P]
        said = self.embed(features).unflatten(-1, (self.heads, self.head_width))  # [B, C, N, H, V]
        gate = self.to_neighbour_gate(x).sigmoid()[..., None]  # [B, C, N, H, 1]
        return self.to_output((gate * self.neighbour_norm(said)).flatten(-2))
