"""Uncertainty: hierarchical bootstrap over train seeds and sequences, paired differences, Holm, IQM.

S train seeds · N sequences (of all evaluation streams) · D resamples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FEW_SEEDS", "Difference", "Estimate", "holm", "interquartile_mean", "mean_interval", "paired_difference"]

FEW_SEEDS = 5
RESAMPLES = 2_000
LEVEL = 0.95
PRACTICAL_MARGIN = 0.02


@dataclass(frozen=True)
class Estimate:
    """A mean with its percentile interval."""

    value: float
    low: float
    high: float
    seeds: int
    sequences: int
    flag: str  # "few_seeds" below five train seeds, else empty


@dataclass(frozen=True)
class Difference:
    """Paired difference of two models, first minus second."""

    value: float
    low: float
    high: float
    improves: float  # probability that the first is better, over resamples
    p_value: float  # two-sided, from the resamples
    verdict: str  # "better", "worse", "equivalent" (inside the practical margin) or "open"
    flag: str


def interquartile_mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half, with the two edge values weighted by what of them lies inside."""
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    if n == 0:
        return math.nan
    edges = np.arange(n + 1) / n
    weight = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return float((weight * ordered).sum() / weight.sum())


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm-adjusted p values: sorted, multiplied by how many are left, and never falling."""
    adjusted, running = {}, 0.0
    ordered = sorted(p_values.items(), key=lambda pair: pair[1])
    for place, (name, p) in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - place) * p))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def mean_interval(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of [S, N] values: resample train seeds, then sequences within each. NaN values are left out."""
    table = np.atleast_2d(np.asarray(values, dtype=float))
    draws = _resampled(table, np.random.default_rng(seed), resamples)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(
        float(np.nanmean(table)), float(low), float(high), table.shape[0], table.shape[1], _flag(table.shape[0])
    )


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, higher_is_better: bool, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Compare two models on the same seeds and sequences, [S, N] each.

    Raises:
        ValueError: the tables are not of the same runs.
    """
    a, b = np.atleast_2d(np.asarray(first, dtype=float)), np.atleast_2d(np.asarray(second, dtype=float))
    if a.shape != b.shape:
        raise ValueError(
            f"A paired comparison needs the same seeds and sequences of both. Got {a.shape} and {b.shape}."
            " Run the missing cells."
        )
    draws = _resampled(a - b, np.random.default_rng(seed), resamples)
    low, high = (float(q) for q in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    better = draws > 0 if higher_is_better else draws < 0
    improves = float(better.mean() + 0.5 * (draws == 0).mean())
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    p_value = float(min(1.0, 2 * max(tail, 1.0 / resamples)))
    return Difference(
        float(np.nanmean(a - b)), low, high, improves, p_value, _verdict(low, high, higher_is_better), _flag(len(a))
    )


def _verdict(low: float, high: float, higher_is_better: bool) -> str:
    if low >= -PRACTICAL_MARGIN and high <= PRACTICAL_MARGIN:
        return "equivalent"
    if low > 0 or high < 0:
        return "better" if (low > 0) == higher_is_better else "worse"
    return "open"


def _flag(seeds: int) -> str:
    return "few_seeds" if seeds < FEW_SEEDS else ""


def _resampled(table: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of resampled tables, [D]: each drawn seed keeps its own sequences, drawn anew."""
    S, N = table.shape
    counts = np.isfinite(table)
    filled = np.where(counts, table, 0.0)
    seeds = rng.integers(S, size=(resamples, S))  # [D, S]
    out = np.empty(resamples)
    for number in range(resamples):
        columns = rng.integers(N, size=(S, N))  # [S, N]
        total = filled[seeds[number][:, None], columns].sum()
        out[number] = total / max(counts[seeds[number][:, None], columns].sum(), 1)
    return out
