"""How much a token asks to be kept.

B items · C channels · N patches · H heads · K key · V value · S score routers · D width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from hamts.config import ModelConfig
from hamts.nn.tokens import Tokens
from hamts.ops.types import GatedDelta, compute_dtype

__all__ = ["Router", "Scores", "causal_error_mean", "innovation", "kept_probability", "log_bias", "surprise"]

NEGLIGIBLE = 1e-3
ERROR_HALF_LIFE_TOKENS = 64.0
LEAST_WEIGHT = 1e-12
BIAS_FLOOR = -4.0


def log_bias(logit: torch.Tensor) -> torch.Tensor:
    """log sigmoid(logit) with a soft floor at ``BIAS_FLOOR``, so that its gradient never dies."""
    floor = math.exp(BIAS_FLOOR)
    return torch.log(floor + (1.0 - floor) * torch.sigmoid(logit))


def kept_probability(bias: torch.Tensor) -> torch.Tensor:
    """sigmoid(logit) back from ``log_bias``, in (0, 1)."""
    floor = math.exp(BIAS_FLOOR)
    return ((bias.exp() - floor) / (1.0 - floor)).clamp(1e-6, 1 - 1e-6)


@dataclass(frozen=True)
class Scores:
    """What the routers of one layer say about a chunk."""

    scores: torch.Tensor  # [B, C, N, S] detached
    bias: torch.Tensor  # [B, C, N] log-bias that a kept token's key receives; the learned score's gradient
    error_mean: torch.Tensor  # [B, C, H, 2]


def surprise(prediction: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Cosine distance of what the state predicts and what came, in [0, 2].

    surprise = 1 - cos(prediction, value); 1 where the prediction is negligible, else rounding would decide.
    Both [..., V] -> [...].

    Source: HAM, arXiv 2603.22325, Eq. 9 with a cosine distance; the rule for negligible predictions is ours.
    """
    predicted = prediction.norm(dim=-1)  # [...]
    actual = values.norm(dim=-1)  # [...]
    cosine = (prediction * values).sum(-1) / (predicted * actual).clamp_min(1e-12)  # [...]
    negligible = (predicted < NEGLIGIBLE * actual) | (actual == 0)  # [...]
    return torch.where(negligible, 1.0, 1.0 - cosine)  # [...]


def causal_error_mean(
    squared: torch.Tensor, observed: torch.Tensor, carried: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running mean of squared errors before each token, and the sums to carry on.

    Args:
        squared: ||e||² of each token, [B, C, N, H].
        observed: [B, C, N] bool; other tokens count for nothing.
        carried: sum and weight from before, [B, C, H, 2].

    Returns:
        The mean over earlier tokens, [B, C, N, H] (0 where there are none), and the carried sums, [B, C, H, 2].
    """
    N = squared.shape[2]
    # a long gap must not make the weight vanish: only the quotient counts, so both sums may be scaled up
    mass = carried[..., 1:]  # [B, C, H, 1]
    carried = torch.where(mass > 0, carried * (LEAST_WEIGHT / mass).clamp_min(1.0), carried)  # [B, C, H, 2]
    decay = 0.5 ** (1.0 / ERROR_HALF_LIFE_TOKENS)
    weight = observed.to(squared.dtype)[..., None].expand_as(squared)  # [B, C, N, H]
    pair = torch.stack([squared * weight, weight], dim=-1)  # [B, C, N, H, 2]
    steps = torch.arange(N, device=squared.device)  # [N]
    lag = steps[:, None] - steps[None, :] - 1  # [N, N] before token n: m <= n - 1
    powers = torch.where(lag >= 0, decay ** lag.clamp_min(0).to(squared.dtype), 0.0)  # [N, N]
    before = torch.einsum("nm,bcmht->bcnht", powers, pair)  # [B, C, N, H, 2]
    ages = decay ** steps.to(squared.dtype)  # [N]
    before = before + ages[:, None, None] * carried[:, :, None]  # [B, C, N, H, 2]
    after = decay * before[:, :, -1] + pair[:, :, -1]  # [B, C, H, 2]
    return before[..., 0] / before[..., 1].clamp_min(torch.finfo(before.dtype).tiny), after


def innovation(squared: torch.Tensor, running_mean: torch.Tensor) -> torch.Tensor:
    """Squared error against its own causal running mean, so that a noisy channel does not own the budget.

    innovation = ||e||² / mean of earlier ||e||²; 1 where nothing came before. Both [..., H] -> [..., H].
    """
    return torch.where(running_mean > 1e-12, squared / running_mean.clamp_min(1e-12), 1.0)


class Router(nn.Module):
    """Scores of the routers named in the configuration, reduced over heads.

    The learned score sees the token and, detached, the state's error, write gate, gap and tag. It is trained through
    the log-bias log sigmoid(score) on the logits of the tokens it keeps, and by an auxiliary loss of ``training``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.names = tuple(name for name in config.router_names if name != "tags")
        self.uses_tags = "tags" in config.router_names
        self.reduction = config.head_reduction
        hidden = max(config.width // 4, 8)
        self.learned = (
            nn.Sequential(nn.Linear(config.width + 6, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            if "learned" in self.names
            else None
        )

    def _over_heads(self, score: torch.Tensor) -> torch.Tensor:
        """[B, C, N, H] -> [B, C, N]."""
        if self.reduction == "mean":
            return score.mean(-1)
        return score.amin(-1) if self.reduction == "min" else score.amax(-1)

    def forward(
        self,
        x: torch.Tensor,
        *,
        recurrent: GatedDelta,
        values: torch.Tensor,
        beta: torch.Tensor,
        tokens: Tokens,
        carried: torch.Tensor,
    ) -> Scores:
        """Score a chunk.

        Args:
            x: normalised input of the layer, [B, C, N, D].
            recurrent: result of the recurrence, each tensor [B, C, N, H, V].
            values: what was written, [B, C, N, H, V].
            beta: write gates, [B, C, N, H].
            carried: running error sums, [B, C, H, 2].
        """
        with torch.no_grad():
            error = recurrent.error.to(compute_dtype(recurrent.error))  # [B, C, N, H, V]
            squared = error.square().sum(-1).to(x.dtype)  # [B, C, N, H]
            running, after = causal_error_mean(squared, tokens.heard > 0, carried)  # [B, C, N, H], [B, C, H, 2]
            fresh = self._over_heads(innovation(squared, running))  # [B, C, N]
            angle = self._over_heads(surprise(recurrent.prediction, values))  # [B, C, N]
        logit = self._learned_logit(x, fresh, angle, beta, tokens)  # [B, C, N] or None
        available = {"surprise": angle, "innovation": fresh, "learned": logit}
        columns = [score.detach() for name in self.names if (score := available[name]) is not None]  # S x [B, C, N]
        scores = torch.stack(columns, -1) if columns else x.new_zeros(*x.shape[:3], 0)  # [B, C, N, S]
        bias = torch.zeros_like(fresh) if logit is None else log_bias(logit)  # [B, C, N]
        if self.uses_tags:
            bias = torch.where(tokens.must_keep, 0.0, bias)  # [B, C, N]
        return Scores(scores, bias, after)

    def _learned_logit(
        self, x: torch.Tensor, fresh: torch.Tensor, angle: torch.Tensor, beta: torch.Tensor, tokens: Tokens
    ) -> torch.Tensor | None:
        if self.learned is None:
            return None
        features = torch.stack(
            [
                torch.log1p(fresh),
                angle,
                beta.detach().mean(-1),
                tokens.observed.to(x.dtype).mean(-1),
                tokens.tags.any(-1).to(x.dtype),
                tokens.must_keep.to(x.dtype),
            ],
            dim=-1,
        )  # [B, C, N, 6]
        return self.learned(torch.cat([x, features], -1)).squeeze(-1)  # [B, C, N]
