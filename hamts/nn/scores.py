"""What a token's scores are made of: how far the state's prediction was from what came, and what was usual before.

B items · C channels · N patches · H heads · V value · P steps in a patch · Q quantiles · S score routers
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "BIAS_FLOOR",
    "ERROR_HALF_LIFE_TOKENS",
    "ON_LOG_SCALE",
    "as_level",
    "causal_error_mean",
    "causal_sums",
    "from_level",
    "innovation",
    "kept_probability",
    "log_bias",
    "normalised_error",
    "residual",
    "surprise",
    "uncertainty",
    "write_size",
]

NEGLIGIBLE = 1e-3
ERROR_HALF_LIFE_TOKENS = 64.0
LEAST_WEIGHT = 1e-12
BIAS_FLOOR = -4.0
# scores that are never negative: factors are what counts, so thresholds move on the scale of their logarithm
ON_LOG_SCALE = frozenset({"surprise", "error", "innovation", "write", "uncertainty", "residual"})
SMALLEST_SCORE = 1e-6
# more tokens than this are summed in blocks: a square of all of them would not fit
SUMMED_AT_ONCE = 256
# a code, or a value far beyond its stream's scale, says no more than this
LARGEST_VALUE = 8.0


def log_bias(logit: torch.Tensor) -> torch.Tensor:
    """log sigmoid(logit) with a soft floor at ``BIAS_FLOOR``, so that its gradient never dies."""
    floor = math.exp(BIAS_FLOOR)
    return torch.log(floor + (1.0 - floor) * torch.sigmoid(logit))


def kept_probability(bias: torch.Tensor) -> torch.Tensor:
    """sigmoid(logit) back from ``log_bias``, in (0, 1)."""
    floor = math.exp(BIAS_FLOOR)
    return ((bias.exp() - floor) / (1.0 - floor)).clamp(1e-6, 1 - 1e-6)


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


def normalised_error(error: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """||e|| / ||v||, at least 0; 1 where nothing was predicted. Both [..., V] -> [...].

    Source: HAM, arXiv 2603.22325, Eq. 9 with a normalised Euclidean distance.
    """
    actual = values.norm(dim=-1)  # [...]
    return torch.where(actual > 0, error.norm(dim=-1) / actual.clamp_min(1e-12), 1.0)  # [...]


def write_size(error: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """b ||e||: how much is written into the state. error [..., V], beta [...] -> [...].

    Source: HOLA, arXiv 2607.02303, which keeps the tokens of the largest write.
    """
    return beta * error.norm(dim=-1)


def uncertainty(quantiles: torch.Tensor) -> torch.Tensor:
    """Mean width of the outermost quantiles, [..., P, Q] -> [...], in units of the stream's scale."""
    return (quantiles[..., -1] - quantiles[..., 0]).mean(-1)


def residual(quantiles: torch.Tensor, values: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the middle quantile over observed steps; 0 where there are none.

    quantiles [..., P, Q], values and observed [..., P] -> [...].
    """
    middle = quantiles[..., quantiles.shape[-1] // 2]  # [..., P]
    apart = (values.clamp(-LARGEST_VALUE, LARGEST_VALUE) - middle).abs()  # [..., P]
    return torch.where(observed, apart, 0.0).sum(-1) / observed.sum(-1).clamp_min(1)


def causal_sums(
    terms: torch.Tensor, carried: torch.Tensor, half_life_tokens: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponentially forgetting sums over the tokens before each, and what to carry on.

    Args:
        terms: what each token adds, [B, C, N, ...].
        carried: the sums before the first, [B, C, ...].

    Returns:
        Sums before each token, [B, C, N, ...], and after the last, [B, C, ...].
    """
    N = terms.shape[2]
    decay = 0.5 ** (1.0 / half_life_tokens)
    if N > SUMMED_AT_ONCE:
        return _block_sums(terms, carried, half_life_tokens)
    steps = torch.arange(N, device=terms.device)  # [N]
    lag = steps[:, None] - steps[None, :] - 1  # [N, N] before token n: m <= n - 1
    powers = torch.where(lag >= 0, decay ** lag.clamp_min(0).to(terms.dtype), 0.0)  # [N, N]
    before = torch.einsum("nm,bcm...->bcn...", powers, terms)  # [B, C, N, ...]
    ages = decay ** steps.to(terms.dtype)  # [N]
    before = before + ages.view(N, *(1,) * (terms.dim() - 3)) * carried[:, :, None]  # [B, C, N, ...]
    return before, decay * before[:, :, -1] + terms[:, :, -1]


def _block_sums(
    terms: torch.Tensor, carried: torch.Tensor, half_life_tokens: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``causal_sums`` of many tokens: within blocks, and over the blocks' totals, which fade so much sooner."""
    N, T = terms.shape[2], SUMMED_AT_ONCE
    decay = 0.5 ** (1.0 / half_life_tokens)
    rest = -N % T
    padded = torch.cat([terms, terms.new_zeros(*terms.shape[:2], rest, *terms.shape[3:])], 2)
    blocks = padded.unflatten(2, (-1, T))  # [B, C, L, T, ...]
    nothing = torch.zeros_like(blocks[:, :, :, 0]).flatten(1, 2)  # [B, CL, ...]
    inside, totals = causal_sums(blocks.flatten(1, 2), nothing, half_life_tokens)
    inside, totals = inside.unflatten(1, blocks.shape[1:3]), totals.unflatten(1, blocks.shape[1:3])  # [B, C, L, T, ...]
    earlier, _ = causal_sums(totals, carried, half_life_tokens / T)  # [B, C, L, ...]
    ages = decay ** torch.arange(T, device=terms.device).to(terms.dtype)  # [T]
    before = inside + ages.view(T, *(1,) * (terms.dim() - 3)) * earlier[:, :, :, None]  # [B, C, L, T, ...]
    before = before.flatten(2, 3)[:, :, :N]  # [B, C, N, ...]
    return before, decay * before[:, :, -1] + terms[:, :, -1]


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
    # a long gap must not make the weight vanish: only the quotient counts, so both sums may be scaled up
    mass = carried[..., 1:]  # [B, C, H, 1]
    carried = torch.where(mass > 0, carried * (LEAST_WEIGHT / mass).clamp_min(1.0), carried)  # [B, C, H, 2]
    weight = observed.to(squared.dtype)[..., None].expand_as(squared)  # [B, C, N, H]
    pair = torch.stack([squared * weight, weight], dim=-1)  # [B, C, N, H, 2]
    before, after = causal_sums(pair, carried, ERROR_HALF_LIFE_TOKENS)
    return before[..., 0] / before[..., 1].clamp_min(torch.finfo(before.dtype).tiny), after


def innovation(squared: torch.Tensor, running_mean: torch.Tensor) -> torch.Tensor:
    """Squared error against its own causal running mean, so that a noisy channel does not own the budget.

    innovation = ||e||² / mean of earlier ||e||²; 1 where nothing came before. Both [..., H] -> [..., H].
    """
    return torch.where(running_mean > 1e-12, squared / running_mean.clamp_min(1e-12), 1.0)


def as_level(scores: torch.Tensor, on_log_scale: torch.Tensor) -> torch.Tensor:
    """Scores [..., S] on the scale on which thresholds move: the logarithm of those that are never negative."""
    logarithm = torch.log(scores.clamp_min(SMALLEST_SCORE))  # [..., S]
    return torch.where(on_log_scale, logarithm, scores)


def from_level(level: torch.Tensor, on_log_scale: torch.Tensor) -> torch.Tensor:
    """Scores back from ``as_level``, [..., S]."""
    return torch.where(on_log_scale, torch.exp(level), level)
