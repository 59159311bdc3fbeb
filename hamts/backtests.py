"""Cross-validation and evaluation of a fitted model, as frames.

I items · X windows · G targets · F future steps · Q quantiles
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hamts.controls import control_policies
from hamts.data.answer import forecast_frame
from hamts.data.cutoffs import truncate
from hamts.data.library import plain_frame
from hamts.data.panel import Panel
from hamts.errors import DataError, DataWarning
from hamts.evaluation import (
    CONTROLS,
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
from hamts.fitting import Fitted, fit_panel, validation_tail
from hamts.forecast import Asked, Forecast, quantile_at, quantile_mean, targets_first
from hamts.groups import item_groups, mark_worst
from hamts.metrics import DECILES, MSIS_LEVELS
from hamts.reader import HAMNetwork
from hamts.refusals import refuse_rival

__all__ = ["cross_validate", "evaluate_methods"]

MOST_PHASES = 8


def cross_validate(
    fitted: Fitted,
    panel: Panel,
    h: int,
    *,
    n_windows: int,
    step_size: int | None,
    cutoffs: Sequence[Any] | None,
    refit: bool,
    share: float,
    memory: str,
    asked: Asked,
) -> Any:
    """See ``HAMForecaster.cross_validation``."""
    if memory != "model":
        refuse_rival(fitted.plan.model.mixer, f"memory={memory!r}")
    windows = choose_windows(panel, h, n_windows=n_windows, step_size=step_size, cutoffs=cutoffs)
    _note_left_out(windows, h)
    if refit:
        quantiles = _refitted(fitted, panel, windows, share, memory)
    else:
        quantiles = _with_memory(fitted, panel, windows, share, memory, seed=0).quantiles
    shown = Forecast(
        quantiles=quantiles,
        levels=fitted.plan.model.quantiles,
        item_ids=panel.item_ids[windows.items],
        times=windows.times,
        schema=panel.schema,
        asked=asked,
    )
    outcome = "target" if panel.schema.dialect.name == "gluonts" else "y"
    columns = {outcome: windows.actual, **shown.value_columns()}
    frame = forecast_frame(panel.schema, shown.item_ids, shown.times, columns, cutoff=windows.cutoff_times)
    return targets_first(frame, panel.schema)


def _note_left_out(windows: Windows, h: int) -> None:
    if windows.left_out:
        text = f"W-SHORT: {windows.left_out} items have no complete window of {h} steps and are left out."
        warnings.warn(DataWarning(text), stacklevel=4)


def _with_memory(
    fitted: Fitted, panel: Panel, windows: Windows, share: float, memory: str, *, seed: int, traces: bool = False
) -> Backtest:
    """Forecasts of the fitted network under one of ``MEMORIES``."""
    network, unit = fitted.network, fitted.plan.time_unit
    spent = None
    if memory == "random":
        model = _with_memory(fitted, panel, windows, share, "model", seed=seed, traces=True)
        spent = spent_by(network, model.rollout, panel.n_items)
    policies = policies_for(network, memory, share, spent=spent, seed=seed)
    return backtest(network, panel, windows, policies, time_unit=unit, keep_traces=traces)


def _refitted(fitted: Fitted, panel: Panel, windows: Windows, share: float, memory: str) -> np.ndarray:
    """Forecasts of a model fitted anew for the last window of each item, the one before, and so on: [X, G, F, Q]."""
    answer = np.empty((*windows.actual.shape, len(fitted.plan.model.quantiles)))
    # windows of one round have the same place among the windows of their item, counted from the last
    rounds = np.concatenate([np.arange(len(cuts))[::-1] for cuts in windows.steps])  # [X]
    for each in np.unique(rounds)[::-1]:
        mine = np.flatnonzero(rounds == each)  # [X']
        ends = np.zeros(panel.n_items, dtype=np.int64)
        ends[windows.items[mine]] = windows.cuts[mine]
        before = truncate(panel, ends)
        plan = fitted.plan
        tail = validation_tail(before.lengths, h=plan.h, patch_steps=plan.model.patch_steps, val_size=plan.val_size)
        again = fit_panel(before, plan, tail=tail, progress=False, verbose=False)
        steps = [np.array([end]) if end else np.zeros(0, dtype=np.int64) for end in ends]
        part = replace(
            windows,
            steps=steps,
            **{
                name: getattr(windows, name)[mine]
                for name in ("items", "cuts", "actual", "known", "times", "cutoff_times")
            },
        )
        answer[mine] = _with_memory(again, panel, part, share, memory, seed=0).quantiles
    return answer


def evaluate_methods(  # noqa: PLR0913 - what ``HAMForecaster.evaluate`` takes
    fitted: Fitted,
    panel: Panel,
    h: int,
    *,
    n_windows: int,
    step_size: int | None,
    cutoffs: Sequence[Any] | None,
    against: Sequence[str],
    by: str | None,
    share: float,
    seed: int,
    oracle: Any = None,
    graft: HAMNetwork | str | None = None,
    group_col: str | None = None,
) -> Any:
    """See ``HAMForecaster.evaluate``."""
    unknown = [name for name in against if name not in CONTROLS]
    if unknown or isinstance(against, str):
        raise DataError(
            "E-OPTION", f"against must be a list of {list(CONTROLS)}. Got {against!r}.", fix="against=['no_memory']"
        )
    for name in against:
        if CONTROLS[name] is not None:
            refuse_rival(fitted.plan.model.mixer, name)
    windows = choose_windows(panel, h, n_windows=n_windows, step_size=step_size, cutoffs=cutoffs)
    _note_left_out(windows, h)
    groups = item_groups(panel, by, group_col)
    learned_from = any(CONTROLS[name] not in (None, "none", "full") for name in against)
    model = _with_memory(fitted, panel, windows, share, "model", seed=seed, traces=learned_from)
    levels = fitted.plan.model.quantiles
    forecasts = {"HAM": _levels_and_mean(model, levels)}
    costs = {"HAM": _costs(model)}
    for name in against:
        memory = CONTROLS[name]
        if memory is None:
            naive = seasonal_naive_forecasts(panel, windows)
            forecasts[name] = (point_levels(naive), naive)
            costs[name] = {"usage_share": float("nan"), "bytes": float("nan")}
            continue
        for label, phase in _phases(name, model):
            if memory in ("none", "full"):
                policies = policies_for(fitted.network, memory, share)
            else:
                policies = control_policies(
                    fitted.network, panel, windows, memory, share=share, model=model.rollout, seed=seed, phase=phase,
                    time_unit=fitted.plan.time_unit, oracle=oracle, graft=graft,
                )  # fmt: skip
            result = backtest(fitted.network, panel, windows, policies, time_unit=fitted.plan.time_unit)
            forecasts[label], costs[label] = _levels_and_mean(result, levels), _costs(result)
    rows = [{**row, **costs[row["method"]]} for row in score_rows(panel, windows, forecasts, by, groups)]
    if groups is not None:
        rows = mark_worst(rows)
    return plain_frame(panel.schema.dialect, {name: [row[name] for row in rows] for name in rows[0]})


def _levels_and_mean(result: Backtest, levels: Sequence[float]) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """What scoring needs of a forecast: some quantiles by level and the mean, [X, G, F] each."""
    wanted = (MSIS_LEVELS[0], *DECILES, MSIS_LEVELS[1])
    quantiles = {level: quantile_at(result.quantiles, levels, level) for level in wanted}
    return quantiles, quantile_mean(result.quantiles, levels)


def _phases(name: str, model: Backtest) -> list[tuple[str, float]]:
    """The rows of a control: a schedule is tried at every phase, or at as many as tell."""
    if name != "stride_memory":
        return [(name, 0.0)]
    period = 1.0 / max(model.rollout.usage_share, 1e-3)  # patches
    count = int(np.clip(round(period), 1, MOST_PHASES))
    return [(f"{name}@{number}", number * period / count) for number in range(count)]


def _costs(result: Backtest) -> dict[str, float]:
    return {"usage_share": result.rollout.usage_share, "bytes": result.bytes_per_item}
