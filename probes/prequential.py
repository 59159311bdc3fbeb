"""Prequential scores of a stream: predict, score, then learn. Errors [B, T] are of the row about to be read.

B sequences · T rows · D drifts
"""

from __future__ import annotations

import torch

__all__ = ["cache_turnover", "fading_error", "recovery_rows", "windowed_mase"]

FADING = 0.995
RECOVERED = 1.10


def fading_error(error: torch.Tensor, *, alpha: float = FADING) -> torch.Tensor:
    """Exponentially fading mean of the error, bias-corrected, [B, T]."""
    out, total, weight = [], torch.zeros_like(error[:, 0]), 0.0
    for row in error.unbind(1):
        total = alpha * total + row
        weight = alpha * weight + 1.0
        out.append(total / weight)
    return torch.stack(out, 1)


def windowed_mase(absolute: torch.Tensor, values: torch.Tensor, *, season: int, window: int) -> torch.Tensor:
    """Mean absolute error per window over that of the seasonal naive forecast in it, [B, windows]."""
    naive = (values[:, season:] - values[:, :-season]).abs().mean(-1)  # [B, T - season]
    model = absolute[:, season:]
    count = model.shape[1] // window
    shape = (len(model), count, window)
    below = naive[:, : count * window].reshape(shape).mean(-1).clamp_min(1e-9)
    return model[:, : count * window].reshape(shape).mean(-1) / below


def recovery_rows(error: torch.Tensor, drift_rows: torch.Tensor, *, smooth: int = 50) -> torch.Tensor:
    """Rows after each drift until the mean error of ``smooth`` rows is within 10 % of the steady level, [B, D].

    The steady level is the mean error of the last quarter before the next drift; NaN where it never gets there.
    """
    B, T = error.shape
    ends = torch.cat([drift_rows[:, 1:], torch.full((B, 1), T)], 1)  # [B, D]
    out = torch.full(drift_rows.shape, torch.nan)
    running = torch.nn.functional.avg_pool1d(error[:, None], smooth, stride=1)[:, 0]  # [B, T - smooth + 1]
    for b in range(B):
        for d in range(drift_rows.shape[1]):
            low, high = int(drift_rows[b, d]), int(ends[b, d])
            if high - low < 4 * smooth:
                continue
            steady = error[b, high - (high - low) // 4 : high].mean()
            near = (running[b, low : high - smooth] <= RECOVERED * steady).nonzero()
            if len(near):
                out[b, d] = float(near[0])
    return out


def cache_turnover(kept_before: torch.Tensor, kept_after: torch.Tensor) -> torch.Tensor:
    """Share of the entries before a drift that are gone some rows after it, [B, L] bool x 2 -> [B]."""
    gone = (kept_before & ~kept_after).sum(-1)
    return gone / kept_before.sum(-1).clamp_min(1)
