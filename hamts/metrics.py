"""What a forecast was worth: errors through ``gluonts.ev``, baselines, and the difference of two forecasts.

R rows, each one (item, target, cutoff) window · F future steps · T steps of history · Q quantile levels

A NaN in ``actual`` means that nothing was observed there: the cell is left out of every metric, never filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "DECILES",
    "climatology_quantiles",
    "paired_interval",
    "row_losses",
    "score",
    "seasonal_naive",
    "seasonal_scale",
]

DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# of the 95 % interval, for the mean scaled interval score
MSIS_ALPHA = 0.05
MSIS_LEVELS = (0.025, 0.975)


def score(
    actual: np.ndarray,
    *,
    quantile_forecasts: Mapping[float, np.ndarray],
    mean: np.ndarray,
    insample: Sequence[np.ndarray] | None = None,
    season_steps: int = 1,
    seasonal_error: np.ndarray | None = None,
) -> dict[str, float]:
    """Score forecasts [R, F] against ``actual`` [R, F], all observed cells together.

    MAE and MASE are of the median, MSE of the mean. ``weighted_quantile_loss`` is the mean over the nine deciles of
    2 * sum(pinball) / sum(|actual|). MSIS is of the 95 % interval. ``coverage[0.1]`` is the share of actuals at or
    below that quantile, ``coverage[80%]`` the share inside the central interval, ``observed`` the number of cells. What
    needs a quantile that was not given is NaN. Rows whose seasonal error is zero or unknown are left out of MASE and
    MSIS alone.

    Args:
        quantile_forecasts: level -> forecasts [R, F].
        insample: history of each row up to its cutoff, compared with itself ``season_steps`` before; or
        seasonal_error: the result of that comparison, [R], see ``seasonal_scale``.

    Source: gluonts.ev.
    """
    levels = {_level(level): np.asarray(values, dtype=float) for level, values in quantile_forecasts.items()}
    actual, mean = np.asarray(actual, dtype=float), np.asarray(mean, dtype=float)
    _check_forecasts(actual, {"mean": mean, **{str(level): values for level, values in levels.items()}})
    if seasonal_error is None:
        seasonal_error = _insample_scale(actual, insample, season_steps)
    observed = np.isfinite(actual)
    result = dict.fromkeys(("MASE", "MSE", "MAE", "weighted_quantile_loss", "MSIS"), math.nan)
    result["observed"] = float(observed.sum())
    if observed.any():
        result |= _evaluate(actual, levels, mean)
        result |= _evaluate_scaled(actual, levels, np.asarray(seasonal_error, dtype=float))
    result |= _interval_coverage(actual, levels)
    return result


def _check_forecasts(actual: np.ndarray, forecasts: Mapping[str, np.ndarray]) -> None:
    observed = np.isfinite(actual)
    for name, values in forecasts.items():
        if values.shape != actual.shape:
            raise ValueError(f"Forecast {name} must have the shape of actual, {actual.shape}. Got {values.shape}.")
        if not np.isfinite(values[observed]).all():
            rows = np.flatnonzero((~np.isfinite(values) & observed).any(axis=1))
            raise ValueError(
                f"Forecast {name} must be finite where something was observed. Rows {rows[:5].tolist()} are not."
                " To compare on what all forecasts cover, set those cells of actual to NaN for each of them."
            )


def _insample_scale(actual: np.ndarray, insample: Sequence[np.ndarray] | None, season_steps: int) -> np.ndarray:
    if insample is None:
        raise ValueError(
            "MASE needs insample or seasonal_error. Got neither. Pass the history of each row, or its seasonal error."
        )
    if len(insample) != len(actual):
        raise ValueError(f"insample must have one history for each of {len(actual)} rows. Got {len(insample)}.")
    return np.array([seasonal_scale(history, season_steps) for history in insample])


def _evaluate(actual: np.ndarray, levels: Mapping[float, np.ndarray], mean: np.ndarray) -> dict[str, float]:
    """The metrics that need no scale."""
    from gluonts.ev import metrics as ev

    wanted: dict[str, Any] = {"MSE": ev.MSE()}
    if 0.5 in levels:
        wanted["MAE"] = ev.MAE()
    if set(DECILES) <= set(levels):
        wanted["weighted_quantile_loss"] = ev.MeanWeightedSumQuantileLoss(quantile_levels=DECILES)
    wanted |= {f"coverage[{level:g}]": ev.Coverage(q=level) for level in sorted(levels)}
    data = _masked(actual, levels) | {"mean": mean}
    if not np.any(data["label"]):
        # a weighted loss of a series of zeros has no weight
        wanted.pop("weighted_quantile_loss", None)
    return {name: float(metric(axis=None).update(data).get()) for name, metric in wanted.items()}


def _evaluate_scaled(actual: np.ndarray, levels: Mapping[float, np.ndarray], scale: np.ndarray) -> dict[str, float]:
    """The metrics that divide by the seasonal error of a row's history."""
    from gluonts.ev import metrics as ev

    if scale.shape != actual.shape[:1]:
        raise ValueError(f"seasonal_error must have one value for each of {len(actual)} rows. Got shape {scale.shape}.")
    wanted: dict[str, Any] = {}
    if 0.5 in levels:
        wanted["MASE"] = ev.MASE()
    if set(MSIS_LEVELS) <= set(levels):
        wanted["MSIS"] = ev.MSIS(alpha=MSIS_ALPHA)
    usable = np.isfinite(scale) & (scale > 0)
    if not np.isfinite(actual[usable]).any():
        return {}
    data = _masked(actual[usable], {level: values[usable] for level, values in levels.items()})
    data["seasonal_error"] = scale[usable, None]
    return {name: float(metric(axis=None).update(data).get()) for name, metric in wanted.items()}


def _masked(actual: np.ndarray, levels: Mapping[float, np.ndarray]) -> dict[str, Any]:
    """What gluonts.ev takes: a masked label, and forecasts by the text of their level."""
    # zeros under the mask, since a NaN there would still raise warnings
    label = np.ma.masked_array(np.nan_to_num(actual), mask=~np.isfinite(actual))
    return {"label": label, **{str(level): values for level, values in levels.items()}}


def _interval_coverage(actual: np.ndarray, levels: Mapping[float, np.ndarray]) -> dict[str, float]:
    """Share of actuals inside each central interval that two of the levels make."""
    observed = np.isfinite(actual)
    shares = {}
    for low in sorted(level for level in levels if level < 0.5):
        high = _level(1 - low)
        if high in levels:
            inside = (levels[low] <= actual) & (actual <= levels[high])
            share = float(inside[observed].mean()) if observed.any() else math.nan
            shares[f"coverage[{100 * (high - low):g}%]"] = share
    return shares


def row_losses(
    actual: np.ndarray,
    *,
    quantile_forecasts: Mapping[float, np.ndarray],
    mean: np.ndarray,
    seasonal_error: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The losses of each row, [R]; NaN for a row without an observation. Plain numpy, for paired comparisons.

    ``quantile_loss`` is 2 * pinball, averaged over the deciles that were given; ``observed`` the cells behind a row.
    """
    actual = np.asarray(actual, dtype=float)
    observed = np.isfinite(actual)
    levels = {_level(level): np.asarray(values, dtype=float) for level, values in quantile_forecasts.items()}
    losses = {"observed": observed.sum(axis=1), "MSE": _row_mean((actual - mean) ** 2)}
    pinballs = [
        2 * np.abs((actual - levels[level]) * ((levels[level] >= actual) - level))  # [R, F]
        for level in DECILES
        if level in levels
    ]
    if pinballs:
        losses["quantile_loss"] = _row_mean(np.mean(pinballs, axis=0))
    if 0.5 in levels:
        losses["MAE"] = _row_mean(np.abs(actual - levels[0.5]))
        if seasonal_error is not None:
            usable = np.where(np.asarray(seasonal_error, dtype=float) > 0, seasonal_error, np.nan)
            losses["MASE"] = losses["MAE"] / usable
    return losses


def _row_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where there is nothing."""
    known = np.isfinite(values)
    count = known.sum(axis=-1)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def paired_interval(
    loss_a: np.ndarray,
    loss_b: np.ndarray,
    *,
    seed: int,
    level: float = 0.9,
    cutoffs: np.ndarray | None = None,
    block_cutoffs: int | None = None,
    draws: int = 2000,
) -> tuple[float, float, float]:
    """Mean of ``loss_a - loss_b`` over rows, and an interval for it: (difference, low, high).

    Moving-block bootstrap over cutoffs: rows of one cutoff are drawn together, since items share their weather, and
    neighbouring cutoffs in blocks, since a bad day is followed by another. With fewer than two blocks the interval is
    infinite: nothing can be said.

    Args:
        loss_a, loss_b: losses of the same rows, [R], see ``row_losses``; pairs with a NaN are left out.
        cutoffs: the cutoff of each row, [R], in any order; None: each row is one cutoff, in order.
        block_cutoffs: neighbouring cutoffs in a block; None: the cube root of their number.

    Source: Künsch (1989), The Annals of Statistics 17(3).
    """
    difference = np.asarray(loss_a, dtype=float) - np.asarray(loss_b, dtype=float)  # [R]
    known = np.isfinite(difference)
    labels = np.arange(len(difference)) if cutoffs is None else np.asarray(cutoffs)
    if len(labels) != len(difference):
        raise ValueError(f"cutoffs must have one entry for each of {len(difference)} rows. Got {len(labels)}.")
    if not known.any():
        return math.nan, -math.inf, math.inf
    _, where = np.unique(labels[known], return_inverse=True)
    totals = np.bincount(where, weights=difference[known])  # [cutoffs]
    counts = np.bincount(where)  # [cutoffs]
    mean = float(totals.sum() / counts.sum())
    length = block_cutoffs or math.ceil(len(totals) ** (1 / 3))
    if len(totals) < 2 * length:
        return mean, -math.inf, math.inf
    means = _block_means(totals, counts, length=length, draws=draws, rng=np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def _block_means(
    totals: np.ndarray, counts: np.ndarray, *, length: int, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Means over rows of series put together from random blocks of neighbouring cutoffs, [draws]."""
    block_totals, block_counts = (np.convolve(each, np.ones(length), "valid") for each in (totals, counts))
    drawn = rng.integers(0, len(block_totals), size=(draws, math.ceil(len(totals) / length)))
    return block_totals[drawn].sum(axis=1) / block_counts[drawn].sum(axis=1)


def seasonal_scale(history: np.ndarray, season_steps: int) -> float:
    """Mean absolute difference between steps one season apart, over the pairs that were observed; NaN without one.

    A history that is not longer than a season is compared with the step before, as gluonts does.
    """
    history = np.asarray(history, dtype=float)
    lag = season_steps if season_steps < len(history) else 1
    return float(_row_mean(np.abs(history[lag:] - history[:-lag])))


def seasonal_naive(history: np.ndarray, *, season_steps: int, h: int) -> np.ndarray:
    """The last observed value of the same phase of the season, for the h steps after ``history`` [..., T] -> [..., h].

    A phase that was never observed takes the last observed value of any phase; a history of NaN gives NaN.
    """
    history = np.asarray(history, dtype=float)
    *outer, T = history.shape
    if T == 0:
        return np.full((*outer, h), np.nan)
    periods = math.ceil(T / season_steps)
    padded = np.full((*outer, periods * season_steps), np.nan)
    padded[..., periods * season_steps - T :] = history
    by_phase = padded.reshape(*outer, periods, season_steps)
    last = _last_observed(np.moveaxis(by_phase, -2, -1))  # [..., season_steps]
    last = np.where(np.isnan(last), _last_observed(history)[..., None], last)
    return last[..., np.arange(h) % season_steps]


def _last_observed(values: np.ndarray) -> np.ndarray:
    """The last value of the last axis that is not NaN; NaN where all are."""
    steps_back = np.argmax(~np.isnan(values[..., ::-1]), axis=-1, keepdims=True)
    return np.take_along_axis(values, values.shape[-1] - 1 - steps_back, axis=-1)[..., 0]


def climatology_quantiles(
    history: np.ndarray, *, phases: np.ndarray, future_phases: np.ndarray, levels: Sequence[float]
) -> np.ndarray:
    """Quantiles of all that one item showed in the same phase of its season: [T], [T], [F] -> [F, Q].

    ``phases`` are any labels, such as the hour of the day. A phase that was never observed takes the quantiles of the
    whole history; a history of NaN gives NaN.
    """
    history, phases = np.asarray(history, dtype=float), np.asarray(phases)
    known = ~np.isnan(history)
    if not known.any():
        return np.full((len(future_phases), len(levels)), np.nan)
    wanted, where = np.unique(np.asarray(future_phases), return_inverse=True)
    table = np.empty((len(wanted), len(levels)))
    for row, phase in enumerate(wanted):
        chosen = known & (phases == phase)
        table[row] = np.quantile(history[chosen if chosen.any() else known], levels)
    return table[where]


def _level(level: float) -> float:
    """A quantile level without the noise of floating point, so that 1 - 0.9 finds 0.1."""
    return round(float(level), 6)
