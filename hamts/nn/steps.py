"""Kept tokens as entries of their steps, so that single steps can be read.

B items · L tokens of the window and the chunk · C channels · P steps in a patch · H heads · K key · V value · D width
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import nn

from hamts.config import ModelConfig
from hamts.nn.scratchpad import Entries
from hamts.nn.tokens import Tokens

__all__ = ["StepEntries", "step_features"]

FEATURES = 3


def step_features(tokens: Tokens, kind: torch.dtype) -> torch.Tensor:
    """Value, observed and tagged of every step, [B, N, C, P, 3]."""
    parts = [tokens.values.to(kind), tokens.observed.to(kind), tokens.tags.to(kind)]  # 3 x [B, C, N, P]
    return torch.stack(parts, -1).transpose(1, 2)  # [B, N, C, P, 3]


class StepEntries(nn.Module):
    """Keys and values of a token's steps: the token's own, and what a step adds, by its place in the patch.

    The steps share the token's position in time; which of them it is stands in what they add. Source: ours.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        P, D = config.patch_steps, config.width
        self.steps = P
        self.heads = config.heads
        self.weight = nn.Parameter(torch.randn(P, FEATURES, 2 * D) * FEATURES**-0.5)  # [P, 3, 2 D]
        self.place = nn.Parameter(torch.randn(P, 2 * D) * 0.2)  # [P, 2 D]

    def forward(self, tokens: Entries, features: torch.Tensor) -> Entries:
        """Candidates [B, L C] and features [B, L, C, P, 3] -> candidates [B, L C P], steps last."""
        P = self.steps
        flat = features.flatten(1, 2)  # [B, L C, P, 3]
        added = torch.einsum("bjpf,pfd->bjpd", flat, self.weight) + self.place  # [B, L C, P, 2 D]
        keys, values = added.unflatten(-1, (2, self.heads, -1)).unbind(3)  # 2 x [B, L C, P, H, K]
        every = {
            f.name: getattr(tokens, f.name).repeat_interleave(P, 1)
            for f in fields(Entries)
            if getattr(tokens, f.name) is not None
        }
        return replace(
            Entries(**every),
            keys=(tokens.keys[:, :, None] + keys).flatten(1, 2),
            values=(tokens.values[:, :, None] + values).flatten(1, 2),
        )
