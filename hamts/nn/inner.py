"""An inner forecast: what a layer expects of each channel's next patch, for scores of doubt.

B items · C channels · N patches · P steps in a patch · D width · H heads · V value · Q quantiles
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hamts.config import ModelConfig
from hamts.data.constants import constant
from hamts.nn.head import QuantileHead, pinball
from hamts.nn.scores import LARGEST_VALUE
from hamts.nn.tokens import Tokens

__all__ = ["INNER_LEVELS", "InnerHead", "Inner"]

INNER_LEVELS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Inner:
    """What was expected of every token of a chunk before it came."""

    expected: torch.Tensor  # [B, C, N, P, Q]
    known: torch.Tensor  # [B, C, N] bool: there was a token before
    loss: torch.Tensor | None  # []; None where the chunk has no pair of neighbours
    last: torch.Tensor  # [B, C, P, Q] of the patch after the chunk
    last_known: torch.Tensor  # [B, C] bool


class InnerHead(nn.Module):
    """Quantiles of the next patch from a token and what the state recalls, both detached: it learns, they do not.

    Source: ours. The width is a doubt known before the token came; the error is that of a forecast of values, where
    ``surprise`` is that of a recall of keys.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head = QuantileHead(
            config.width + config.heads * config.head_state_width, config.patch_steps, INNER_LEVELS
        )

    def forward(
        self, x: torch.Tensor, recalled: torch.Tensor, tokens: Tokens, before: torch.Tensor, before_known: torch.Tensor
    ) -> Inner:
        """Expect each token from the one before.

        Args:
            x: normalised input of the layer, [B, C, N, D].
            recalled: read from the state, [B, C, N, H V].
            before: what was expected of the first token, [B, C, P, Q], and whether there was anything, [B, C].
        """
        ahead = self.head(torch.cat([x.detach(), recalled.detach()], -1))  # [B, C, N, P, Q]
        present = tokens.present[:, None].expand(x.shape[:3])  # [B, C, N]
        expected = torch.cat([before[:, :, None].to(ahead.dtype), ahead[:, :, :-1]], 2)  # [B, C, N, P, Q]
        known = torch.cat([before_known[:, :, None], present[:, :, :-1]], 2)  # [B, C, N]
        # an absent token at the end of a chunk does not happen: they come before an item's first patch
        return Inner(expected, known, self._loss(ahead, tokens, present), ahead[:, :, -1], present[:, :, -1])

    def _loss(self, ahead: torch.Tensor, tokens: Tokens, present: torch.Tensor) -> torch.Tensor | None:
        """Mean quantile loss of the tokens whose predecessor is in the same chunk."""
        asked = tokens.observed[:, :, 1:] & present[:, :, :-1, None]  # [B, C, N - 1, P]
        if asked.shape[2] == 0 or not self.training:
            return None
        levels = constant(INNER_LEVELS, ahead.dtype, ahead.device)  # [Q]
        truth = tokens.values[:, :, 1:].clamp(-LARGEST_VALUE, LARGEST_VALUE)  # [B, C, N - 1, P]
        losses = pinball(ahead[:, :, :-1], truth, levels)  # [B, C, N - 1, P]
        return torch.where(asked, losses, 0.0).sum() / asked.sum().clamp_min(1)
