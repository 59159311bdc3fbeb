"""Prequential scores of a stream: predict, score, then learn. Errors [B, T] are of the row about to be read.

B sequences · T rows · D drifts
"""

from __future__ import annotations

import torch

from hamts.ops.gated_delta import gated_delta
from probes.t0 import DECAY_ROWS, WRITE_GATE

__all__ = [
    "CONTROLS",
    "cache_turnover",
    "control_errors",
    "fading_error",
    "rate_limited",
    "recovery_rows",
    "windowed_mase",
]

# of a decay's logarithm that leaves nothing
FORGET = -60.0
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


def recovery_rows(
    error: torch.Tensor, drift_rows: torch.Tensor, *, smooth: int = 50, steady: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows after each drift until the mean error of ``smooth`` rows is within 10 % of the steady level, [B, D].

    The steady level is the mean error of the last quarter before the next drift; NaN where it never gets there.

    Args:
        steady: whose errors, [B, T], make the level: without it one's own, at which whoever learns nothing is at once.
    """
    level = error if steady is None else steady
    B, T = error.shape
    ends = torch.cat([drift_rows[:, 1:], torch.full((B, 1), T)], 1)  # [B, D]
    out = torch.full(drift_rows.shape, torch.nan)
    running = torch.nn.functional.avg_pool1d(error[:, None], smooth, stride=1)[:, 0]  # [B, T - smooth + 1]
    for b in range(B):
        for d in range(drift_rows.shape[1]):
            low, high = int(drift_rows[b, d]), int(ends[b, d])
            if high - low < 4 * smooth:
                continue
            least = level[b, high - (high - low) // 4 : high].mean()
            near = (running[b, low : high - smooth] <= RECOVERED * least).nonzero()
            if len(near):
                out[b, d] = float(near[0])
    return out


def cache_turnover(kept_before: torch.Tensor, kept_after: torch.Tensor) -> torch.Tensor:
    """Share of the entries before a drift that are gone some rows after it, [B, L] bool x 2 -> [B]."""
    gone = (kept_before & ~kept_after).sum(-1)
    return gone / kept_before.sum(-1).clamp_min(1)


# --- controls

CONTROLS = ("frozen", "restart at drifts", "refit")


def control_errors(
    kind: str, keys: torch.Tensor, values: torch.Tensor, quiet: torch.Tensor, drift_rows: torch.Tensor, *, refit: int
) -> torch.Tensor:
    """Errors [B, T, V] of a state that does not learn as a stream does: keys [B, T, K], values [B, T, V].

    ``frozen`` learns until the first drift; ``restart at drifts`` forgets everything at each, which only an oracle can;
    ``refit`` learns a block of ``refit`` rows at a time and forecasts the next with it.

    Args:
        quiet: rows that write nothing, [B, T] bool.
    """
    beta = torch.where(quiet, 0.0, WRITE_GATE)  # [B, T]
    log_decay = torch.where(quiet, 0.0, -1.0 / DECAY_ROWS)  # [B, T]
    row = torch.arange(keys.shape[1])  # [T]
    if kind == "frozen":
        late = row >= drift_rows[:, :1]  # [B, T]
        return _errors(keys, values, beta.masked_fill(late, 0.0), log_decay.masked_fill(late, 0.0))
    if kind == "restart at drifts":
        at = (row[None, :, None] == drift_rows[:, None]).any(-1)  # [B, T]
        return _errors(keys, values, beta, log_decay.masked_fill(at, FORGET))
    if kind != "refit":
        raise ValueError(f"Unknown control {kind!r}. Available: {list(CONTROLS)}.")
    out = [_errors(*(part[:, :refit] for part in (keys, values, beta, log_decay)))]
    for low in range(refit, keys.shape[1], refit):
        pair = slice(low - refit, low + refit)
        read = row[pair] >= low  # [2 refit] rows that are only forecast
        own = beta[:, pair].masked_fill(read, 0.0), log_decay[:, pair].masked_fill(read, 0.0)
        out.append(_errors(keys[:, pair], values[:, pair], *own)[:, refit:])
    return torch.cat(out, 1)


def _errors(keys: torch.Tensor, values: torch.Tensor, beta: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    found = gated_delta(
        keys[:, :, None], keys[:, :, None], values[:, :, None], log_decay=log_decay[..., None], beta=beta[..., None]
    )
    return found.error[:, :, 0]


def rate_limited(score: torch.Tensor, *, window: int) -> torch.Tensor:
    """Scores [B, T] of which only the best of each window of rows asks to be kept; -inf for the others.

    A window that goes on has the best row so far: what has not come yet must be -inf.
    """
    B, T = score.shape
    whole = -(-T // window) * window
    parts = torch.nn.functional.pad(score, (0, whole - T), value=-torch.inf).view(B, -1, window)  # [B, W, window]
    best = parts.argmax(-1, keepdim=True)
    kept = torch.full_like(parts, -torch.inf).scatter(-1, best, parts.gather(-1, best))
    return kept.view(B, whole)[:, :T]
