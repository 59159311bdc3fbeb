"""Pictures of how good forecasts are: error against the budget, and whether quantiles hold what they promise.

A quantile levels · X cutoffs
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hamts.errors import DataError
from hamts.plot_base import FAINT, REASONS, as_pandas, legend, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["calibration", "plot_calibration", "plot_frontier"]

LINES = [REASONS[name] for name in ("learned", "surprise", "innovation", "event", "action", "mix")]


def plot_frontier(
    table: Any,
    *,
    x: str = "usage_share",
    y: str = "WQL",
    group: str | None = None,
    low: str | None = None,
    high: str | None = None,
    levels: dict[str, float] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Error against how much was kept: one line for each group.

    Args:
        table: one row per budget, and group.
        x, y: columns; x is a share, or bytes.
        group: column that tells the lines apart; default one line.
        low, high: columns with the ends of an interval around y.
        levels: errors to compare with, drawn as lines across: ``{"emptied memory": 0.7}``.
    """
    rows = as_pandas(table)
    needed = [name for name in (x, y, group, low, high) if name is not None]
    if missing := [name for name in needed if name not in rows]:
        raise DataError("E-COLUMNS", f"The table has no column {missing}. It has {list(rows.columns)}.", fix="x=, y=")
    if rows.empty:
        raise DataError("E-EMPTY", "table has no rows to draw.", fix="Pass a table with rows.")
    axes = own_axes(axes)
    groups = [(None, rows)] if group is None else list(rows.groupby(group, sort=False))
    for number, (name, own) in enumerate(groups):
        colour, marker = LINES[number % len(LINES)]
        own = own.sort_values(x)
        if low is not None and high is not None:
            axes.fill_between(own[x], own[low].astype(float), own[high].astype(float), color=colour, alpha=0.15, lw=0)
        style = "-" if number < len(LINES) else "--"
        axes.plot(own[x], own[y].astype(float), marker, ls=style, color=colour, lw=1.4, ms=5, label=name)
    for number, (name, value) in enumerate((levels or {}).items()):
        axes.axhline(value, color=FAINT, ls=("--", ":", "-.")[number % 3], lw=1.2, label=name, zorder=0)
    if rows[x].max() > 2:
        axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y.replace("_", " "))
    legend(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")
    return axes


def calibration(forecast: Any) -> pd.DataFrame:
    """Promised and observed shares of truths at or below each quantile: ``level, observed, low, high, cells``.

    ``low`` and ``high`` are two standard errors away, over cutoffs (over items where there is a single cutoff, and
    over cells where there is one item too).

    Args:
        forecast: of ``cross_validation`` with quantiles: a column of truth (``y`` or ``target``) and quantile columns.
    """
    rows = as_pandas(forecast)
    truth = next((name for name in ("y", "target") if name in rows), None)
    names = {level: name for name in map(str, rows.columns) if (level := _level(name)) is not None}
    if truth is None or not names:
        raise DataError(
            "E-COLUMNS", f"Calibration needs y and quantile columns. It has {list(rows.columns)}.",
            fix="model.cross_validation(df, quantiles=[0.1, 0.5, 0.9])",
        )  # fmt: skip
    rows = rows[rows[truth].notna()]
    if rows.empty:
        raise DataError("E-EMPTY", "No truth was observed.", column=truth, fix="Pass a history with its outcome.")
    group = next(
        (name for name in ("cutoff", "unique_id", "item_id") if name in rows and rows[name].nunique() > 1), None
    )
    keys = rows[group] if group is not None else pd.Series(np.arange(len(rows)), index=rows.index)
    lines = []
    for level, name in sorted(names.items()):
        below = (rows[truth] <= rows[name]).astype(float)
        each = below.groupby(keys).mean()
        error = 2 * float(each.std(ddof=1)) / len(each) ** 0.5 if len(each) > 1 else np.nan
        observed = float(below.mean())
        lines.append((level, observed, max(observed - error, 0.0), min(observed + error, 1.0), len(below)))
    return pd.DataFrame(lines, columns=["level", "observed", "low", "high", "cells"])


def _level(name: str) -> float | None:
    found = re.fullmatch(r"(?:.*_ql)?(0?\.\d+)", name)
    return float(found[1]) if found else None


def plot_calibration(
    forecast: Any, *, names: Sequence[str] = ("HAM",), others: Sequence[Any] = (), axes: Axes | None = None
) -> Axes:
    """Observed against promised share below each quantile; on the diagonal is what it should be.

    Args:
        forecast: of ``cross_validation`` with quantiles.
        names: what the forecasts are called, this one first.
        others: more forecasts to draw beside it, at most five.
    """
    if len(names) != 1 + len(others) or len(others) >= len(LINES):
        raise ValueError(f"names must have one entry per forecast, at most {len(LINES)}. Got {list(names)}.")
    axes = own_axes(axes, width=4.2, height=4.0)
    axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls="--", zorder=0)
    for (colour, marker), name, each in zip(LINES, names, [forecast, *others], strict=False):
        line = calibration(each)
        axes.errorbar(
            line["level"], line["observed"], yerr=[line["observed"] - line["low"], line["high"] - line["observed"]],
            color=colour, marker=marker, ms=4, lw=1.3, elinewidth=0.8, label=name,
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("promised share below the quantile")
    axes.set_ylabel("observed share")
    legend(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")
    return axes
