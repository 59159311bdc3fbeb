"""What a long memory is worth: the error of a stream that starts anew, as it ages, beside one that read everything.

I items · X windows · G targets · F future steps · Q quantiles
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hamts.data.cutoffs import cutoff_steps
from hamts.data.library import plain_frame
from hamts.data.panel import Panel
from hamts.data.patches import build_store
from hamts.errors import DataError
from hamts.evaluation import Windows, choose_windows, seasonal_errors
from hamts.forecast import quantile_at, quantile_mean
from hamts.metrics import DECILES, score
from hamts.rollout import roll

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster

__all__ = ["forecaster_ages"]


def forecaster_ages(
    model: HAMForecaster,
    df: Any,
    start: Any,
    h: int | None = None,
    *,
    step_size: int | None = None,
    budget_share: float | None = None,
    static_df: Any = None,
    events: Any = None,
) -> Any:
    """Error against age since the start of a stream, cold and warm.

    Both streams forecast the same windows with the same weights. The cold one knows nothing before ``start``: its
    state, scratchpad and normaliser begin empty there. The warm one has read the history from its first row. Where
    their errors meet, what happened before ``start`` no longer matters to the forecast.

    Args:
        df: history that goes on beyond ``start``, with its outcome.
        start: the last time that the cold stream does not see.
        h, budget_share, static_df, events: as in ``evaluate``.
        step_size: steps between forecasts; default h.

    Returns: one row per age and method (``cold``, ``warm``): ``age_from``, ``age_to`` (steps since ``start``; each
        bound is twice the one before, the first is one season), ``windows``, MASE, MAE and WQL.

    Raises DataError: E-OPTION, E-SHORT (no item has a window after ``start``), and what reading the frame raises.
    """
    steps, panel = model._horizon(h), model._panel_of(df, static_df, events)
    apart = steps if step_size is None else step_size
    begin = np.array([cuts[-1] if len(cuts) else 0 for cuts in cutoff_steps(panel, [start])])  # [I] steps before it
    network, plan = model._fitted.network, model._fitted.plan
    windows = _windows_after(panel, steps, apart, begin, start, youngest=network.config.patch_steps)
    policy = network.policy(torch.tensor([model._share(budget_share)]))
    store = build_store(panel, patch_steps=network.config.patch_steps, extra_steps=0, time_unit=plan.time_unit)
    # the cold stream begins with the first whole patch after the start
    first = -(-(store.lead.numpy() + begin) // network.config.patch_steps)  # [I]
    ends = np.array([cuts[-1] if len(cuts) else 0 for cuts in windows.steps])  # [I]
    forecasts = {}
    # items without a window are not read at all
    first = np.minimum(first, (store.lead.numpy() + ends) // store.patch_steps)  # [I]
    for method, starts in (("cold", first), ("warm", None)):
        result = roll(network, store, cutoffs=windows.steps, steps=steps, policies=policy, starts=starts, ends=ends)
        result.quantiles[~windows.known] = np.nan
        forecasts[method] = result.quantiles  # [X, G, F, Q]
    return plain_frame(panel.schema.dialect, _table(panel, windows, begin, forecasts, network.config.quantiles))


def _windows_after(panel: Panel, h: int, apart: int, begin: np.ndarray, start: Any, *, youngest: int) -> Windows:
    """All windows of each item whose cutoff lies at least ``apart`` and ``youngest`` steps after its ``begin``."""
    room = panel.lengths - h - begin  # [I]
    if isinstance(apart, bool) or not isinstance(apart, int | np.integer) or apart < 1:
        what = f"step_size must be a whole number, at least 1. Got {apart!r}."
        raise DataError("E-OPTION", what, fix="step_size=1, say.")
    youngest = max(apart, youngest)
    if room.max() < youngest:
        raise DataError(
            "E-SHORT",
            f"Ages need {youngest + h} rows after the start: {youngest} to read and {h} to forecast. Got at most"
            f" {max(int((panel.lengths - begin).max()), 0)} rows after {start!r}.",
            fix="Pass an earlier start, a longer history, or a smaller h.",
        )
    windows = choose_windows(panel, h, n_windows=int(room.max()) // apart, step_size=apart, cutoffs=None)
    later = windows.cuts >= begin[windows.items] + youngest  # [X]
    names = ("items", "cuts", "actual", "known", "times", "cutoff_times")
    steps = [cuts[cuts >= low + youngest] for cuts, low in zip(windows.steps, begin, strict=True)]
    return replace(windows, steps=steps, **{name: getattr(windows, name)[later] for name in names})


def _table(
    panel: Panel, windows: Windows, begin: np.ndarray, forecasts: dict[str, np.ndarray], levels: tuple[float, ...]
) -> dict[str, list[Any]]:
    """Columns of the answer."""
    season = panel.schema.frequency.season_steps
    targets = panel.schema.indices("target")
    scales = [
        seasonal_errors(panel.item(i)[:, targets], cuts, season) for i, cuts in enumerate(windows.steps) if len(cuts)
    ]
    scale = np.concatenate(scales)  # [X, G]
    age = windows.cuts - begin[windows.items]  # [X]
    covered = np.all([np.isfinite(q).all(-1) for q in forecasts.values()], axis=0)  # [X, G, F]
    actual = np.where(covered, windows.actual, np.nan)  # [X, G, F]
    rows: list[dict[str, Any]] = []
    low, high = 0, season
    while low < age.max():
        chosen = (age > low) & (age <= high)  # [X]
        for method, quantiles in forecasts.items() if chosen.any() else ():
            wanted = {level: quantile_at(quantiles[chosen], levels, level) for level in DECILES}
            result = score(
                actual[chosen].reshape(-1, actual.shape[2]),
                quantile_forecasts={level: _rows(values) for level, values in wanted.items()},
                mean=_rows(quantile_mean(quantiles[chosen], levels)),
                seasonal_error=scale[chosen].ravel(),
            )
            row = {"age_from": low, "age_to": high, "method": method, "windows": int(chosen.sum())}
            rows.append({**row, "MASE": result["MASE"], "MAE": result["MAE"], "WQL": result["weighted_quantile_loss"]})
        low, high = high, 2 * high
    return {name: [row[name] for row in rows] for name in rows[0]}


def _rows(values: np.ndarray) -> np.ndarray:
    """[X, G, F] -> [X G, F]."""
    return values.reshape(-1, values.shape[-1])
