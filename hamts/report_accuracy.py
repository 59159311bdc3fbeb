"""How good a model was on the last windows of a history, beside seasonal naive and its own weights with less memory.

X windows · G targets · F future steps · Q quantiles · R rows, each one (window, target)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hamts.data.panel import Panel
from hamts.evaluation import (
    Backtest,
    Windows,
    backtest,
    choose_windows,
    point_levels,
    policies_for,
    score_rows,
    seasonal_naive_forecasts,
    spent_by,
)
from hamts.forecast import quantile_at, quantile_mean
from hamts.forecaster import HAMForecaster
from hamts.metrics import DECILES, paired_interval, row_losses

__all__ = ["Accuracy", "Verdict", "measure_accuracy"]

# the model's memory and the controls, in the order of the table
METHODS = {
    "model": "HAM",
    "naive": "seasonal naive",
    "none": "emptied memory",
    "random": "as many at random",
    "full": "everything kept",
}
INTERVAL_LEVELS = (0.025, 0.975)
Forecasts = dict[str, tuple[dict[float, np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class Verdict:
    """How much lower the model's quantile loss is than another's, in percent of the other's."""

    against: str
    difference: float
    low: float
    high: float
    cutoffs: int

    @property
    def words(self) -> str:
        """One sentence."""
        other = {
            METHODS["naive"]: "than seasonal naive",
            METHODS["none"]: "than the same weights with an emptied memory",
            METHODS["random"]: "than the same weights with as many random steps kept",
        }[self.against]
        if not math.isfinite(self.difference):
            return f"No outcome was observed, so nothing can be said {other.replace('than', 'against', 1)}."
        size = f"{abs(self.difference):.1f} % {'lower' if self.difference > 0 else 'higher'}"
        if not math.isfinite(self.low):
            return f"The quantile loss is {size} {other}; {self.cutoffs} moments are too few to tell this from chance."
        interval = f"95 % interval of the gain {self.low:+.1f} to {self.high:+.1f} %"
        if round(self.low, 2) > 0 or round(self.high, 2) < 0:
            return f"The quantile loss is {size} {other} ({interval})."
        return (
            f"The quantile loss is {size} {other}: no difference that {self.cutoffs} moments could show ({interval})."
        )


@dataclass(frozen=True)
class Accuracy:
    """Scores, verdicts and the forecasts behind them.

    Attributes:
        rows: one per method, see ``HAMForecaster.evaluate``.
        verdicts: against seasonal naive, the emptied memory and random steps.
        coverage: observed share of truths at or below each decile.
        windows: the cutoffs.
        quantiles: of the model, [X, G, F, Q] float64; levels as trained.
    """

    rows: list[dict[str, Any]]
    verdicts: list[Verdict]
    coverage: dict[float, float]
    windows: Windows
    quantiles: np.ndarray

    def verdict(self, against: str) -> Verdict:
        return next(each for each in self.verdicts if each.against == METHODS[against])


def measure_accuracy(
    model: HAMForecaster, panel: Panel, *, n_windows: int, share: float, seed: int, draws: int = 2000
) -> Accuracy:
    """Forecast the last complete windows of each item under four memories, and score them.

    Raises DataError E-SHORT where no item has a complete window.
    """
    windows = choose_windows(panel, model.h, n_windows=n_windows, step_size=None, cutoffs=None)
    network, unit = model._fitted.network, model._fitted.plan.time_unit
    results: dict[str, Backtest] = {}
    for memory in ("model", "none", "random", "full"):
        spent = spent_by(network, results["model"].rollout, panel.n_items) if memory == "random" else None
        policies = policies_for(network, memory, share, spent=spent, seed=seed)
        results[memory] = backtest(network, panel, windows, policies, time_unit=unit, keep_traces=memory == "model")
    levels = model.config.quantiles
    forecasts = {name: _levels_and_mean(result.quantiles, levels) for name, result in results.items()}
    naive = seasonal_naive_forecasts(panel, windows)
    forecasts["naive"] = (point_levels(naive), naive)
    forecasts = {name: forecasts[name] for name in METHODS}
    costs = {
        name: {"usage_share": result.rollout.usage_share, "bytes": result.bytes_per_item}
        for name, result in results.items()
    }
    nothing = {"usage_share": math.nan, "bytes": math.nan}
    rows = [
        {**row, **costs.get(row["method"], nothing), "method": METHODS[row["method"]]}
        for row in score_rows(panel, windows, forecasts, None)
    ]
    verdicts = [_verdict(other, forecasts, windows, seed=seed, draws=draws) for other in ("naive", "none", "random")]
    return Accuracy(rows, verdicts, _coverage(forecasts["model"][0], windows), windows, results["model"].quantiles)


def _levels_and_mean(quantiles: np.ndarray, levels: Sequence[float]) -> tuple[dict[float, np.ndarray], np.ndarray]:
    wanted = (INTERVAL_LEVELS[0], *DECILES, INTERVAL_LEVELS[1])
    return {level: quantile_at(quantiles, levels, level) for level in wanted}, quantile_mean(quantiles, levels)


def _verdict(other: str, forecasts: Forecasts, windows: Windows, *, seed: int, draws: int) -> Verdict:
    """Every item and target weighs the same: losses are in units of its mean size."""
    X, G, F = windows.actual.shape
    size = np.full((X, G), np.nan)
    for item in np.unique(windows.items):
        mine = windows.items == item
        size[mine] = _mean(np.abs(windows.actual[mine]))
    unit = np.where(size > 0, size, np.nan).reshape(X * G, 1)

    def losses(name: str) -> np.ndarray:
        levels, mean = forecasts[name]
        scaled = {level: levels[level].reshape(X * G, F) / unit for level in DECILES}
        actual = windows.actual.reshape(X * G, F) / unit
        return row_losses(actual, quantile_forecasts=scaled, mean=mean.reshape(X * G, F) / unit)["quantile_loss"]

    theirs, own = losses(other), losses("model")  # 2 x [R]
    both = np.isfinite(theirs) & np.isfinite(own)
    cutoffs = np.repeat(windows.cutoff_times, G)  # [R]
    count = len(np.unique(cutoffs[both]))
    if not both.any() or theirs[both].mean() <= 0:
        return Verdict(METHODS[other], math.nan, -math.inf, math.inf, count)
    percent = theirs[both].mean() / 100
    difference, low, high = paired_interval(
        theirs[both] / percent, own[both] / percent, seed=seed, level=0.95, cutoffs=cutoffs[both], draws=draws
    )
    return Verdict(METHODS[other], difference, low, high, count)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over windows and steps of what is known: [X, G, F] -> [G]."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum((0, 2))
    return total / np.where(known.any((0, 2)), known.sum((0, 2)), np.nan)


def _coverage(levels: dict[float, np.ndarray], windows: Windows) -> dict[float, float]:
    known = np.isfinite(windows.actual)
    answer = {}
    for level in DECILES:
        cells = known & np.isfinite(levels[level])
        below = (windows.actual <= levels[level]) & cells
        answer[level] = float(below.sum() / cells.sum()) if cells.any() else math.nan
    return answer
