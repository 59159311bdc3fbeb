"""Scores of quantile forecasts around rare events: in their windows, beside them, and over all times.

Scoring only the times at which something extreme was observed rewards whoever always forecasts extremes (the
forecaster's dilemma; Lerch et al. 2017): event-window scores are diagnostics, the threshold-weighted CRPS over all
times decides.

R rows, each one (series, target, cutoff) window · F future steps · Q quantile levels
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["EventForecasts", "EventScores", "event_scores", "exceedance", "quantile_crps", "threshold_weighted"]

RESAMPLES = 2_000
TAILS = (0.95, 0.99)
INTERVALS = {80: (0.1, 0.9), 95: (0.025, 0.975)}


@dataclass(frozen=True)
class EventForecasts:
    """Forecasts over a test range, in each target's own units, and where the labelled windows lie.

    Attributes:
        quantiles: level -> forecasts.
        event: number of the labelled event of each cell, -1 outside of all.
        scale: seasonal-naive error of each row's target on the training part.
        tau: for each tail level, its quantile of the row's target on the training part.
        block: of each row, rows of one block are resampled together (weeks, say).
    """

    actual: np.ndarray  # [R, F], NaN where nothing was observed
    quantiles: Mapping[float, np.ndarray]  # each [R, F]
    event: np.ndarray  # [R, F] int
    scale: np.ndarray  # [R]
    tau: Mapping[float, np.ndarray]  # each [R]
    block: np.ndarray  # [R] int

    def __post_init__(self) -> None:
        if 0.5 not in self.quantiles:
            raise ValueError(f"Forecasts need their median. Got the levels {sorted(self.quantiles)}.")
        for name, values in {"event": self.event, **{f"quantile {q:g}": v for q, v in self.quantiles.items()}}.items():
            if values.shape != self.actual.shape:
                raise ValueError(f"{name} must have the shape of actual, {self.actual.shape}. Got {values.shape}.")


@dataclass(frozen=True)
class EventScores:
    """Scores by name: value, and a 95 % interval from resampled events (in windows) or blocks of time (elsewhere).

    ``groups`` holds, of each event or block, the sum of a score and over how many cells: what several fits are
    resampled by together.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    events: int
    groups: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"metric": name, "value": value, "low": self.intervals[name][0], "high": self.intervals[name][1],
             "groups": self.groups.get(name, [])}
            for name, value in self.values.items()
        ]  # fmt: skip


def quantile_crps(actual: np.ndarray, quantiles: Mapping[float, np.ndarray]) -> np.ndarray:
    """CRPS of each cell in quantile-integral form, 2 * integral of the pinball loss over the levels. [R, F].

    Each level stands for the part of (0, 1) that is nearest to it, so levels in the tails, without which no forecast
    of extremes can be told from another, weigh what they cover. A forecast of the median alone counts as one that is
    certain: its CRPS is its absolute error.
    """
    levels = np.array(sorted(quantiles))
    actual = np.asarray(actual, dtype=float)
    if len(levels) == 1:
        return np.abs(actual - quantiles[levels[0]])
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    total = np.zeros(actual.shape)
    for level, width in zip(levels, np.diff(edges), strict=True):
        apart = actual - np.asarray(quantiles[level], dtype=float)
        total += width * 2 * np.where(apart >= 0, level * apart, (level - 1) * apart)
    return total


def threshold_weighted(
    actual: np.ndarray, quantiles: Mapping[float, np.ndarray], tau: np.ndarray, *, upper: bool = True
) -> np.ndarray:
    """Threshold-weighted CRPS of each cell: that of max(y, tau) (min for the lower tail), whose quantiles are those
    of y, clamped. It is proper over all times. [R, F], tau broadcast against it.

    Source: Gneiting and Ranjan (2011); chaining by Allen et al. (2023).
    """
    clamp = np.maximum if upper else np.minimum
    return quantile_crps(clamp(actual, tau), {level: clamp(values, tau) for level, values in quantiles.items()})


def exceedance(quantiles: Mapping[float, np.ndarray], tau: np.ndarray) -> np.ndarray:
    """P(y > tau) by straight lines between the quantiles, [R, F] for tau [R].

    Beyond the outermost quantiles it is theirs; a single quantile is a forecast that is certain.
    """
    levels = np.array(sorted(quantiles))
    stacked = np.sort(np.stack([np.asarray(quantiles[level], dtype=float) for level in levels], -1), -1)  # [R, F, Q]
    limit = np.asarray(tau, dtype=float)[:, None, None]  # [R, 1, 1]
    if len(levels) == 1:
        # one value is a forecast that is certain
        return np.asarray((stacked > limit)[..., 0], dtype=float)
    above = np.clip((stacked <= limit).sum(-1, keepdims=True), 1, len(levels) - 1)  # [R, F, 1]
    low, high = (np.take_along_axis(stacked, place, -1) for place in (above - 1, above))  # 2 x [R, F, 1]
    share = np.clip(np.divide(limit - low, high - low, out=np.ones_like(low), where=high > low), 0.0, 1.0)
    level = levels[above - 1] + share * (levels[above] - levels[above - 1])  # [R, F, 1]
    return np.asarray(1.0 - level[..., 0])


def event_scores(forecasts: EventForecasts, *, seed: int = 0, resamples: int = RESAMPLES) -> EventScores:
    """All of them, with intervals. Losses are in units of each row's seasonal-naive error on the training part.

    ``event_window_mase``, ``non_event_mase``; ``crps``, ``twcrps_95``, ``twcrps_99`` over all times; ``roi_crps``: half
    the weight on the events, half on the rest; ``coverage_80``, ``coverage_95`` inside the events; ``brier_95``,
    ``auprc_95`` of exceeding the training part's 95 % quantile, beside ``base_rate_95``.
    """
    known = np.isfinite(forecasts.actual) & (forecasts.scale > 0)[:, None]  # [R, F]
    inside = (forecasts.event >= 0) & known
    outside = (forecasts.event < 0) & known
    unit = np.where(forecasts.scale > 0, forecasts.scale, np.nan)[:, None]  # [R, 1]
    actual, quantiles = forecasts.actual, forecasts.quantiles
    absolute = np.abs(actual - quantiles[0.5]) / unit  # [R, F]
    crps = quantile_crps(actual, quantiles) / unit  # [R, F]
    by_event = forecasts.event  # resampled inside windows
    by_block = np.broadcast_to(forecasts.block[:, None], actual.shape)
    cells: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {
        "event_window_mase": (absolute, inside, by_event), "non_event_mase": (absolute, outside, by_block),
        "crps": (crps, known, by_block), "crps_event": (crps, inside, by_event),
    }  # fmt: skip
    for tail, tau in forecasts.tau.items():
        weighted = threshold_weighted(actual, quantiles, tau[:, None]) / unit
        cells[f"twcrps_{round(100 * tail)}"] = (weighted, known, by_block)
    for size, (low, high) in INTERVALS.items():
        if low in quantiles and high in quantiles:
            covered = (quantiles[low] <= actual) & (actual <= quantiles[high])
            cells[f"coverage_{size}"] = (covered.astype(float), inside, by_event)
    rng = np.random.default_rng(seed)
    found = {name: _mean_interval(*part, rng=rng, resamples=resamples) for name, part in cells.items()}
    values = {name: value for name, (value, _, _) in found.items()}
    intervals = {name: (low, high) for name, (_, low, high) in found.items()}
    halves = _mean_interval(crps, outside, by_block, rng=rng, resamples=resamples)[0]
    values["roi_crps"], intervals["roi_crps"] = 0.5 * (values.pop("crps_event") + halves), (math.nan, math.nan)
    del intervals["crps_event"]
    if 0.95 in forecasts.tau:
        _exceed(forecasts, known, by_block, values, intervals, rng, resamples)
    groups = {name: _groups(*cells[name]) for name in values if name in cells}
    return EventScores(values, intervals, len(set(forecasts.event[inside].tolist())), groups)


def _exceed(
    forecasts: EventForecasts, known: np.ndarray, block: np.ndarray, values: dict[str, float],
    intervals: dict[str, tuple[float, float]], rng: np.random.Generator, resamples: int,
) -> None:  # fmt: skip
    """Brier score and AUPRC of exceeding the 95 % quantile, and how often that is."""
    tau = forecasts.tau[0.95]
    happened = forecasts.actual > tau[:, None]  # [R, F]
    chance = exceedance(forecasts.quantiles, tau)  # [R, F]
    brier, low, high = _mean_interval((chance - happened) ** 2, known, block, rng=rng, resamples=resamples)
    rate, rate_low, rate_high = _mean_interval(happened.astype(float), known, block, rng=rng, resamples=resamples)
    values |= {
        "brier_95": brier, "auprc_95": average_precision(chance[known], happened[known]), "base_rate_95": rate,
    }  # fmt: skip
    intervals |= {
        "brier_95": (low, high), "auprc_95": (math.nan, math.nan), "base_rate_95": (rate_low, rate_high),
    }  # fmt: skip


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under precision against recall, stepwise; NaN without a positive."""
    import torch

    from probes.scores import average_precision as stepwise

    return stepwise(torch.from_numpy(np.ascontiguousarray(score)), torch.from_numpy(np.ascontiguousarray(positive)))


def _groups(values: np.ndarray, where: np.ndarray, group: np.ndarray) -> list[tuple[float, int]]:
    """Of each group, in order: sum over its cells, and how many they are."""
    _, place = np.unique(group[where], return_inverse=True)
    totals, counts = np.bincount(place, weights=values[where]), np.bincount(place)
    return [(round(float(total), 6), int(count)) for total, count in zip(totals, counts, strict=True)]


def _mean_interval(
    values: np.ndarray, where: np.ndarray, group: np.ndarray, *, rng: np.random.Generator, resamples: int
) -> tuple[float, float, float]:
    """Mean over cells and its interval from whole groups drawn anew: (mean, low, high); NaN of nothing."""
    if not where.any():
        return math.nan, math.nan, math.nan
    _, place = np.unique(group[where], return_inverse=True)
    totals, counts = np.bincount(place, weights=values[where]), np.bincount(place)
    drawn = rng.integers(0, len(totals), size=(resamples, len(totals)))
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(totals.sum() / counts.sum()), float(low), float(high)


def tail_quantiles(values: np.ndarray, tails: Sequence[float] = TAILS) -> dict[float, float]:
    """Quantiles of a training part, by level."""
    known = values[np.isfinite(values)]
    return {tail: float(np.quantile(known, tail)) for tail in tails}
