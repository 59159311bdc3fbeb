"""What a stream learns from its own errors: scores of new rows, their p-values, and shifts of the quantiles.

Every patch is forecast when it begins. A row's score is its distance from that forecast's median, in units of the
distance from the median to the edge of the 80 % interval on its side: 1 lies on the edge. Its p-value is the rank among
the item's last scores, (1 + those as large) / (1 + all), frozen when the patch began, so that it depends on nothing
that came later and on no split of the rows. It is valid where scores are exchangeable (conformal prediction, Vovk et
al. 2005); under drift it is what the recent past makes of it.

Quantiles are shifted by tracking: after every patch, shift_q += rate x sum over its steps of (q - 1[y <= Q_q]), in
scales of the stream. Long-run coverage then approaches q whatever the stream does (quantile tracking, Angelopoulos,
Candes and Tibshirani 2023, arXiv 2307.16895, Eq. 3).

n rows · B items · G targets · P steps in a patch · Q quantiles · K scores kept
"""

from __future__ import annotations

import numpy as np

__all__ = ["p_values", "push_scores", "row_scores", "shifted", "track_shift"]

# widths below this share of the stream's scale say nothing
LEAST_WIDTH = 1e-6
EDGE_LOW, EDGE_HIGH = 0.1, 0.9


def row_scores(
    quantiles: np.ndarray, scale: np.ndarray, actual: np.ndarray, levels: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Score of each row and the target that is farthest out: [n, G, Q], [n, G], [n, G] -> [n], [n].

    NaN and -1 where no target was observed or nothing was forecast.
    """
    grid = np.asarray(levels)
    low, middle, high = (int(np.abs(grid - level).argmin()) for level in (EDGE_LOW, 0.5, EDGE_HIGH))
    median = quantiles[..., middle]  # [n, G]
    apart = actual - median  # [n, G]
    width = np.where(apart >= 0, quantiles[..., high] - median, median - quantiles[..., low])  # [n, G]
    each = np.abs(apart) / np.maximum(width, LEAST_WIDTH * scale)  # [n, G]
    known = ~np.isnan(each)  # [n, G]
    filled = np.where(known, each, -1.0)  # [n, G]
    worst = filled.argmax(1)  # [n]
    best = filled[np.arange(len(filled)), worst]  # [n]
    return np.where(best >= 0, best, np.nan), np.where(best >= 0, worst, -1)


def p_values(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Share of an item's last scores at least as large, [n], [n, K] -> [n]; NaN where there is no score."""
    known = ~np.isnan(kept)  # [n, K]
    larger = (known & (kept >= scores[:, None])).sum(1)  # [n]
    return np.where(np.isnan(scores), np.nan, (1 + larger) / (1 + known.sum(1)))


def push_scores(kept: np.ndarray, count: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rings with new scores in them, in the order of steps: [B, K], [B], [B, P] -> [B, K], [B]."""
    kept, count = kept.copy(), count.copy()
    for step in range(scores.shape[1]):
        rows = np.flatnonzero(~np.isnan(scores[:, step]))
        kept[rows, count[rows] % kept.shape[1]] = scores[rows, step]
        count[rows] += 1
    return kept, count


def track_shift(
    shift: np.ndarray,
    quantiles: np.ndarray,
    scale: np.ndarray,
    actual: np.ndarray,
    *,
    levels: tuple[float, ...],
    rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts after one patch, and how many of its steps taught them.

    Args:
        shift: in scales of the stream, [B, G, Q].
        quantiles: forecast of the patch as the network gave it, [B, G, P, Q].
        scale: [B, G]. actual: [B, G, P].

    Returns: [B, G, Q] and [B, G] int64.
    """
    now = quantiles + (shift * scale[..., None])[:, :, None]  # [B, G, P, Q]
    known = ~np.isnan(actual) & ~np.isnan(quantiles[..., 0])  # [B, G, P]
    below = actual[..., None] <= now  # [B, G, P, Q]
    moved = np.where(known[..., None], np.asarray(levels) - below, 0.0).sum(2)  # [B, G, Q]
    return shift + rate * moved, known.sum(2)


def shifted(quantiles: np.ndarray, shift: np.ndarray, scale: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """Quantiles with what was learned, rising again: [I, G, F, Q], [I, G, Q], [I, G], bounds [I, G, 2] -> as before."""
    moved = quantiles + (shift * scale[..., None])[:, :, None]  # [I, G, F, Q]
    bounded = np.clip(moved, lowest[..., :1, None], lowest[..., 1:, None])  # [I, G, F, Q]
    return np.sort(bounded, axis=-1)
