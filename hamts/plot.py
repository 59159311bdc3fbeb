"""Pictures of forecasts and of what was kept. Axes in, axes out; matplotlib is imported when a picture is asked for.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers; reasons also differ in marker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hamts.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_forecast", "plot_routes", "save_picture"]

INK, FAINT = "#4d4d4d", "#bfbfbf"
BAND, SHADE = "#56B4E9", "#F0E442"
# colour and marker of every reason
REASONS = {
    "event": ("#E69F00", "s"),
    "action": ("#CC79A7", "D"),
    "surprise": ("#D55E00", "^"),
    "innovation": ("#009E73", "v"),
    "learned": ("#0072B2", "o"),
}
ID_NAMES, TIME_NAMES = ("unique_id", "item_id"), ("ds", "timestamp")
MODEL_NAMES = ("HAM", "predictions", "mean")
# points of a line beyond which more cannot be seen
MOST_POINTS = 4000


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
    rows = _choose(_pandas(forecast), "forecast", item=item)
    if "target_name" in rows:
        target = rows["target_name"].iloc[0] if target is None else target
        rows = rows[rows["target_name"] == target]
    time, item_column = _column(rows, TIME_NAMES), _column(rows, ID_NAMES, missing_ok=True)
    axes = _axes(axes)
    point, rows = _column(rows, MODEL_NAMES), _wall(rows, time)
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
        past = _choose(_pandas(history), "history", item=None if item_column is None else rows[item_column].iloc[0])
        past = _wall(past, time)
        past = past[past[time] <= rows[time].max()].tail(history_steps or 4 * len(rows))
        name = name if name in past else _column(past, ("y", "target"))
        axes.plot(*_thin(past[time], past[name]), color=INK, lw=1, label=name)
    axes.set_ylabel(name)
    _legend(axes)
    _calm(axes, rows[time])
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
    entries = _choose(table, "table", item=item)
    item = entries["unique_id"].iloc[0]
    if channel not in set(entries["channel"]):
        raise DataError(
            "E-COLUMNS",
            f"The table has no channel {channel!r} of item {item!r}. It has {sorted(set(entries['channel']))}.",
            column=channel,
            fix="Pass one of these.",
        )
    series = _choose(_pandas(frame), "frame", item=item)
    time = _column(series, TIME_NAMES)
    shaded = _wall(_windows(windows, entries[entries["tag"] != ""], item), "start", "end")
    series = _between(_wall(series, time), time, start, end)
    entries = _wall(entries[entries["channel"] == channel], "ds_start", "ds_end")
    entries = _between(entries, "ds_start", start, end)
    above, below = _two_axes(axes)
    shaded = _between(_between(shaded, "end", start, None), "start", None, end)
    _shade(above, shaded, label="tagged" if windows is None else "event")
    _shade(below, shaded)
    _draw_series(above, series[time], series[channel].astype(float), entries)
    _draw_scores(below, entries)
    above.set_ylabel(channel)
    above.set_title(f"{item}: what was kept", loc="left", fontsize="medium")
    _legend(above)
    _calm(above, series[time], labels=False)
    _calm(below, series[time])
    return above, below


def _draw_series(axes: Axes, times: pd.Series, values: pd.Series, entries: pd.DataFrame) -> None:
    """The series in grey, kept and pending steps over it, and a strip of marks along the bottom."""
    axes.plot(*_thin(times, values), color=FAINT, lw=0.9, zorder=1)
    clock, numbers = times.to_numpy(), values.to_numpy(float)
    strip = axes.get_xaxis_transform()
    for reason, (colour, marker) in REASONS.items():
        own = entries[(entries["status"] == "kept") & (entries["reason"] == reason)]
        if own.empty:
            continue
        kept = _inside(clock, own["ds_start"].to_numpy(), own["ds_end"].to_numpy())
        chosen = np.where(kept, numbers, np.nan)
        axes.plot(*_thin(times, pd.Series(chosen)), color=colour, lw=1.6, zorder=2)
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
    axes.plot(*_thin(times, score), color=INK, lw=0.7, label="score")
    axes.plot(*_thin(times, entries["threshold"].astype(float)), color=INK, lw=1, ls="--", label="threshold")
    for reason, (colour, marker) in REASONS.items():
        own = entries[(entries["status"] == "kept") & (entries["reason"] == reason)]
        axes.plot(own["ds_start"], own["score"], marker, color=colour, ms=4)
    axes.set_ylabel("score")
    _legend(axes)


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


def _thin(times: pd.Series, values: pd.Series, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``most`` points of a line: of every stretch its lowest and its highest, so that spikes survive.

    A stretch without a value stays a gap.
    """
    clock, numbers = np.asarray(times), np.asarray(values, dtype=float)
    size = -(-len(numbers) // max(most // 2, 1))
    if size <= 2:
        return clock, numbers
    stretches = -(-len(numbers) // size)
    padded = np.full(stretches * size, np.nan)
    padded[: len(numbers)] = numbers
    grid = padded.reshape(stretches, size)
    known = ~np.isnan(grid)
    low = np.where(known, grid, np.inf).argmin(1)
    high = np.where(known, grid, -np.inf).argmax(1)
    picked = np.sort(np.stack([low, high], 1), axis=1) + np.arange(stretches)[:, None] * size
    index = np.minimum(picked.ravel(), len(numbers) - 1)
    return clock[index], numbers[index]


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


def _pandas(frame: Any) -> pd.DataFrame:
    return frame if isinstance(frame, pd.DataFrame) else frame.to_pandas()


def _column(frame: pd.DataFrame, names: Sequence[str], *, missing_ok: bool = False) -> Any:
    """The first of these columns that the frame has."""
    found = next((name for name in names if name in frame), None)
    if found is None and not missing_ok:
        raise DataError(
            "E-COLUMNS",
            f"A frame to be drawn needs one of the columns {list(names)}. It has {list(frame.columns)}.",
            fix="Rename the column.",
        )
    return found


def _choose(frame: pd.DataFrame, name: str, *, item: Any) -> pd.DataFrame:
    """The rows of one item; the first where none is named, all where there are no items."""
    column = _column(frame, ID_NAMES, missing_ok=True)
    if frame.empty:
        raise DataError("E-EMPTY", f"{name} has no rows to draw.", fix="Pass a frame with rows.")
    if column is None:
        return frame
    chosen = frame[column].iloc[0] if item is None else item
    rows = frame[frame[column] == chosen]
    if rows.empty:
        raise DataError(
            "E-COLUMNS",
            f"{name} has no item {chosen!r}.",
            column=column,
            series=chosen,
            rows=list(frame[column].unique()[:5]),
            fix="Pass item=... with one of its ids.",
        )
    return rows


def _between(frame: pd.DataFrame, column: str, start: Any, end: Any) -> pd.DataFrame:
    for bound, keep in ((start, "ge"), (end, "le")):
        if bound is None or frame.empty:
            continue
        stamp = bound if pd.api.types.is_integer_dtype(frame[column]) else pd.Timestamp(bound)
        frame = frame[getattr(frame[column], keep)(_no_zone(stamp))]
    return frame


def _no_zone(stamp: Any) -> Any:
    return stamp.tz_localize(None) if getattr(stamp, "tzinfo", None) is not None else stamp


def _wall(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Times of a zone as what a clock on the wall showed."""
    zoned = [name for name in columns if isinstance(frame[name].dtype, pd.DatetimeTZDtype)]
    return frame.assign(**{name: frame[name].dt.tz_localize(None) for name in zoned})


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(9, 3.2), layout="constrained")[1]


def _two_axes(axes: Sequence[Axes] | None) -> tuple[Axes, Axes]:
    if axes is not None:
        above, below = axes
        below.sharex(above)
        return above, below
    import matplotlib.pyplot as plt

    _, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(10, 4.8), layout="constrained", height_ratios=(2.2, 1))
    return above, below


def _legend(axes: Axes) -> None:
    """One line above the axes, where nothing is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels) or 1, frameon=False,
        fontsize="small", borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip


def _calm(axes: Axes, times: pd.Series, *, labels: bool = True) -> None:
    """No box, short dates."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if pd.api.types.is_datetime64_any_dtype(times):
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.tick_params(labelbottom=labels, labelsize="small")


def save_picture(axes: Axes, path: str | Path, *, dots_per_inch: int = 130) -> None:
    """Write the figure of these axes to a file, and let go of it."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(path, dpi=dots_per_inch)
    plt.close(figure)
