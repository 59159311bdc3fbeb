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
# distances held at once, and where they are further than any
MOST_DISTANCES = 1 << 25
BEYOND = 1 << 44


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
    B, C, total, _ = values.shape
    N = total - stored
    known = observed.to(values.dtype).mean(-1) >= KNOWN_SHARE  # [B, C, L]
    index = torch.arange(total, device=values.device)  # [L]
    past = _Past(
        values=values,
        observed=observed,
        known=known,
        stretches=F.pad(values * observed, (0, 0, stretch - 1, 0)).unfold(2, stretch, 1).flatten(3),
        there=F.pad(observed, (0, 0, stretch - 1, 0)).unfold(2, stretch, 1).flatten(3).to(values.dtype),
    )
    anchor = torch.where(known, index, -1).cummax(2).values[:, :, stored:]  # [B, C, N]
    # patches that are still stored at each query
    oldest = index[stored:] - stored + 1  # [N]
    size = max(1, MOST_DISTANCES // (B * C * total))
    parts = []
    for low in range(0, N, size):
        part = slice(low, low + size)
        near, place = past.nearest(anchor[:, :, part], oldest[part], stretch, neighbours)
        gap = index[stored:][part] - anchor[:, :, part]  # [B, C, n]
        parts.append(past.following(near, place, anchor[:, :, part], gap, sharpness))
    patches, shares = zip(*parts, strict=True)
    return torch.cat(patches, 2), torch.cat(shares, 2)


@dataclass(frozen=True)
class _Past:
    """Stored and new patches, and the stretches that end at each of them; n queries, k neighbours."""

    values: torch.Tensor  # [B, C, L, P]
    observed: torch.Tensor  # [B, C, L, P] bool
    known: torch.Tensor  # [B, C, L]
    stretches: torch.Tensor  # [B, C, L, I]
    there: torch.Tensor  # [B, C, L, I] 1 where observed

    def nearest(
        self, anchor: torch.Tensor, oldest: torch.Tensor, stretch: int, neighbours: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and last patches of the nearest stretches, [B, C, n, k] each.

        Args:
            anchor: last known patch at each query, [B, C, n].
            oldest: first patch that is still stored, [n].
        """
        index = torch.arange(self.known.shape[2], device=anchor.device)  # [L]
        at = anchor.clamp_min(0)[..., None].expand(-1, -1, -1, self.stretches.shape[3])  # [B, C, n, I]
        ask, asked = self.stretches.gather(2, at), self.there.gather(2, at)  # 2 x [B, C, n, I]
        overlap = asked @ self.there.mT  # [B, C, n, L] steps observed in both
        apart = ask.square() @ self.there.mT + asked @ self.stretches.square().mT
        apart = apart - 2 * (ask @ self.stretches.mT)  # [B, C, n, L]
        distance = apart.clamp_min(0) / overlap.clamp_min(1)  # [B, C, n, L]
        # a constant channel has many neighbours at the same distance: rounding must not choose among them
        distance = (distance / DISTANCE_STEP).round() * DISTANCE_STEP
        usable = self.known[:, :, None] & (index < anchor[..., None]) & (overlap > 0)  # [B, C, n, L]
        inside = (index - stretch + 1 >= oldest[:, None]) & (anchor[..., None] - stretch + 1 >= oldest[:, None])
        return _nearest(distance.masked_fill(~(usable & inside), torch.inf), min(neighbours, len(index)))

    def following(
        self, near: torch.Tensor, place: torch.Tensor, anchor: torch.Tensor, gap: torch.Tensor, sharpness: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What followed the nearest stretches, [B, C, n, 2, P], and how much of the weight observed it."""
        n, total, P = gap.shape[2], *self.values.shape[2:]
        found = near < torch.inf
        # infinity times a gradient of nothing is not a number
        near = torch.where(found, near, 0.0)  # [B, C, n, k]
        weight = torch.softmax(torch.where(found, -sharpness * near, -1e4), -1) * found  # [B, C, n, k]
        parts, shares = [], []
        for ahead in (0, 1):
            target = place + gap[..., None] + ahead  # [B, C, n, k]
            # what lies after the last known patch is not known of a neighbour either
            valid = target <= anchor[..., None]
            flat = target.clamp_max(total - 1).flatten(2)[..., None].expand(-1, -1, -1, P)  # [B, C, n k, P]
            seen = self.observed.gather(2, flat).unflatten(2, (n, -1)) & valid[..., None]  # [B, C, n, k, P]
            share = weight[..., None] * seen  # [B, C, n, k, P]
            total_share = share.sum(3)  # [B, C, n, P]
            there = (share * self.values.gather(2, flat).unflatten(2, (n, -1))).sum(3)  # [B, C, n, P]
            parts.append(there / total_share.clamp_min(1e-6))
            shares.append(total_share)
        return torch.stack(parts, 3), torch.stack(shares, 3)


def _nearest(distance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest of the last dimension and their places, [..., count] each; of equal ones the newest."""
    total = distance.shape[-1]
    # one number tells distance and, where it is the same, age: a stable order of all would take far longer
    steps = torch.where(distance < torch.inf, (distance / DISTANCE_STEP).clamp_max(BEYOND), BEYOND).round().long()
    age = total - 1 - torch.arange(total, device=distance.device)
    chosen = torch.topk(steps * total + age, count, largest=False, sorted=True).indices
    return distance.gather(-1, chosen), chosen


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
