"""Pictures of forecasts and of what was kept. Axes in, axes out; matplotlib is imported when a picture is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hamts.errors import DataError
from hamts.plot_base import (
    BAND,
    FAINT,
    ID_NAMES,
    INK,
    REASONS,
    SHADE,
    TIME_NAMES,
    as_pandas,
    between,
    calm,
    choose,
    find_column,
    legend,
    own_axes,
    reasons_of,
    save_picture,
    thin,
    two_axes,
    wall,
)  # fmt: skip
from hamts.plot_memory import plot_channels, plot_survival, plot_usage
from hamts.plot_quality import plot_calibration, plot_frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_calibration", "plot_channels", "plot_forecast", "plot_frontier", "plot_routes", "plot_scores",
    "plot_survival", "plot_usage", "save_picture",
]  # fmt: skip

MODEL_NAMES = ("HAM", "predictions", "mean")


def plot_forecast(
    forecast: Any,
    history: Any = None,
    *,
    item: Any = None,
    target: str | None = None,
    history_steps: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """One forecast with its intervals, after the end of the history.

    Args:
        forecast: long frame of ``predict`` or ``cross_validation``, of either dialect, pandas or polars; ``y`` in it is
            drawn as the truth.
        history: the frame that was forecast, in the same dialect.
        item, target: which to draw where there are several; default the first.
        history_steps: how many of the last rows of the history; default four times the forecast.
    """
    rows = choose(as_pandas(forecast), "forecast", item=item)
    if "target_name" in rows:
        target = rows["target_name"].iloc[0] if target is None else target
        rows = rows[rows["target_name"] == target]
    time, item_column = find_column(rows, TIME_NAMES), find_column(rows, ID_NAMES, missing_ok=True)
    axes = own_axes(axes)
    point, rows = find_column(rows, MODEL_NAMES), wall(rows, time)
    for low, high, level in _bands(rows, point):
        axes.fill_between(
            rows[time], rows[low].astype(float), rows[high].astype(float), color=BAND, alpha=0.25, lw=0,
            label=f"{level:g} %",
        )  # fmt: skip
    axes.plot(rows[time], rows[point].astype(float), color=REASONS["learned"][0], lw=1.5, label="forecast")
    name = target or "y"
    if "y" in rows:
        axes.plot(rows[time], rows["y"].astype(float), color=INK, lw=1, ls=":", label="truth")
    if history is not None:
        past = choose(as_pandas(history), "history", item=None if item_column is None else rows[item_column].iloc[0])
        past = wall(past, time)
        past = past[past[time] <= rows[time].max()].tail(history_steps or 4 * len(rows))
        name = name if name in past else find_column(past, ("y", "target"))
        axes.plot(*thin(past[time], past[name]), color=INK, lw=1, label=name)
    axes.set_ylabel(name)
    legend(axes)
    calm(axes, rows[time])
    return axes


def plot_routes(
    frame: Any,
    table: pd.DataFrame,
    channel: str,
    *,
    item: Any = None,
    windows: pd.DataFrame | None = None,
    start: Any = None,
    end: Any = None,
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, Axes]:
    """A series with its kept steps in the colour of their reason; below it, each patch's score against its threshold.

    Args:
        frame: the series, as given to ``fit`` or ``routes``.
        table: of ``routes``, one row per entry, refused ones included.
        channel: the column to draw.
        item: which, where there are several; default the first of the table.
        windows: labelled windows to shade (``unique_id, start, end, label``); default the patches with a tag.
        start, end: part of the time to draw.
        axes: two axes of one figure; default a new figure.

    Returns: the axes above and below, with a linked time.
    """
    entries = choose(table, "table", item=item)
    item = entries["unique_id"].iloc[0]
    if channel not in set(entries["channel"]):
        raise DataError(
            "E-COLUMNS",
            f"The table has no channel {channel!r} of item {item!r}. It has {sorted(set(entries['channel']))}.",
            column=channel,
            fix="Pass one of these.",
        )
    series = choose(as_pandas(frame), "frame", item=item)
    time = find_column(series, TIME_NAMES)
    shaded = wall(_windows(windows, entries[entries["tag"] != ""], item), "start", "end")
    series = between(wall(series, time), time, start, end)
    entries = wall(entries[entries["channel"] == channel], "ds_start", "ds_end")
    entries = between(entries, "ds_start", start, end)
    above, below = two_axes(axes)
    shaded = between(between(shaded, "end", start, None), "start", None, end)
    _shade(above, shaded, label="tagged" if windows is None else "event")
    _shade(below, shaded)
    _draw_series(above, series[time], series[channel].astype(float), entries)
    _draw_scores(below, entries)
    above.set_ylabel(channel)
    above.set_title(f"{item}: what was kept", loc="left", fontsize="medium")
    legend(above)
    calm(above, series[time], labels=False)
    calm(below, series[time])
    return above, below


def plot_scores(table: pd.DataFrame, channel: str, *, item: Any = None, axes: Axes | None = None) -> Axes:
    """Each patch's score and its threshold on one axis; kept ones marked in the colour of their reason.

    Args:
        table: of ``routes``, one row per entry, refused ones included.
        channel, item: which to draw; the item defaults to the first of the table.
    """
    entries = choose(table, "table", item=item)
    entries = entries[entries["channel"] == channel]
    if entries.empty:
        raise DataError("E-COLUMNS", f"The table has no channel {channel!r}.", column=channel, fix="Pass one it has.")
    axes, entries = own_axes(axes), wall(entries, "ds_start", "ds_end")
    _draw_scores(axes, entries)
    calm(axes, entries["ds_start"])
    return axes


def _draw_series(axes: Axes, times: pd.Series, values: pd.Series, entries: pd.DataFrame) -> None:
    """The series in grey, kept and pending steps over it, and a strip of marks along the bottom."""
    axes.plot(*thin(times, values), color=FAINT, lw=0.9, zorder=1)
    clock, numbers = times.to_numpy(), values.to_numpy(float)
    strip = axes.get_xaxis_transform()
    for reason, (colour, marker) in reasons_of(entries).items():
        own = entries[(entries["status"] == "kept") & (entries["reason"] == reason)]
        if own.empty:
            continue
        kept = _inside(clock, own["ds_start"].to_numpy(), own["ds_end"].to_numpy())
        chosen = np.where(kept, numbers, np.nan)
        axes.plot(*thin(times, pd.Series(chosen)), color=colour, lw=1.6, zorder=2)
        # a line needs two points
        known = np.pad(~np.isnan(chosen), 1)
        alone = known[1:-1] & ~known[:-2] & ~known[2:]
        if alone.any():
            axes.plot(clock[alone], chosen[alone], marker, color=colour, ms=3, zorder=2)
        place = np.full(len(own), 0.03)
        axes.plot(own["ds_start"], place, marker, color=colour, ms=3.5, ls="", transform=strip, clip_on=False,
                  label=f"kept: {reason} ({len(own)})")  # fmt: skip
    gone = entries[entries["status"].isin(["evicted", "quota_full"])]
    if not gone.empty:
        axes.plot(gone["ds_start"], np.full(len(gone), 0.03), "x", color=FAINT, ms=3, transform=strip,
                  label=f"evicted ({len(gone)})")  # fmt: skip
    waiting = entries[entries["status"] == "pending"]
    if not waiting.empty:
        axes.axvspan(waiting["ds_start"].min(), waiting["ds_end"].max(), color=BAND, alpha=0.3, lw=0, label="window")


def _draw_scores(axes: Axes, entries: pd.DataFrame) -> None:
    times, score = entries["ds_start"], entries["score"].astype(float)
    axes.plot(*thin(times, score), color="#9a9a9a", lw=0.7, label="score")
    axes.plot(*thin(times, entries["threshold"].astype(float)), color="black", lw=1, ls="--", label="threshold")
    for reason, (colour, marker) in reasons_of(entries).items():
        own = entries[(entries["status"] == "kept") & (entries["reason"] == reason)]
        axes.plot(own["ds_start"], own["score"], marker, color=colour, ms=4)
    axes.set_ylabel("score")
    legend(axes)


def _windows(windows: pd.DataFrame | None, tagged: pd.DataFrame, item: Any) -> pd.DataFrame:
    """What to shade: ``start, end, label``."""
    if windows is not None:
        own = windows[windows["unique_id"] == item] if "unique_id" in windows else windows
        return own if "label" in own else own.assign(label="")
    patches = tagged.drop_duplicates(["ds_start", "tag"]).sort_values("ds_start")
    # neighbouring patches with the same tag are one
    joined = patches.assign(run=(patches["tag"] != patches["tag"].shift()).cumsum())
    far = patches["ds_start"].diff() > 2 * (patches["ds_end"] - patches["ds_start"])
    joined["run"] += far.cumsum()
    return joined.groupby(["run", "tag"]).agg(start=("ds_start", "min"), end=("ds_end", "max")).reset_index().rename(
        columns={"tag": "label"}
    )  # fmt: skip


def _shade(axes: Axes, windows: pd.DataFrame, label: str | None = None) -> None:
    for row in windows.itertuples():
        axes.axvspan(row.start, row.end, color=SHADE, alpha=0.35, lw=0, zorder=0, label=label)
        label = None


def _inside(clock: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which times lie in one of some intervals that are sorted and do not overlap, [T] bool."""
    order = np.argsort(starts)
    place = np.searchsorted(starts[order], clock, side="right") - 1
    return (place >= 0) & (clock <= ends[order][np.maximum(place, 0)])


def _bands(rows: pd.DataFrame, point: str) -> list[tuple[str, str, float]]:
    """Pairs of columns around the median and the share between them in percent, widest first."""
    pairs = []
    for name in map(str, rows.columns):
        if found := re.fullmatch(rf"{re.escape(point)}-lo-([\d.]+)", name):
            pairs.append((name, f"{point}-hi-{found[1]}", float(found[1])))
    quantiles = {}
    for name in map(str, rows.columns):
        if found := re.fullmatch(rf"(?:{re.escape(point)}_ql)?(0?\.\d+)", name):
            quantiles[round(float(found[1]), 6)] = name
    for level, name in quantiles.items():
        other = quantiles.get(round(1 - level, 6))
        if level < 0.5 and other is not None:
            pairs.append((name, other, round(100 * (1 - 2 * level), 4)))
    return sorted(pairs, key=lambda pair: -pair[2])
