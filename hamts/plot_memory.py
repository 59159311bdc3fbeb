"""Pictures of the memory as a whole: many channels at once, layers over time, and how long entries live.

K kept patches · T times of a series · J bins of time · L layers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hamts.errors import DataError
from hamts.plot_base import (
    FAINT,
    TIME_NAMES,
    as_pandas,
    between,
    calm,
    choose,
    find_column,
    legend,
    own_axes,
    reasons_of,
    thin,
    wall,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_channels", "plot_survival", "plot_usage", "survival"]

# columns of a strip beyond which more cannot be seen
MOST_BINS = 240
ROW_POINTS = 1500
INCHES_PER_CHANNEL = 0.34


def plot_channels(
    frame: Any,
    table: pd.DataFrame,
    *,
    item: Any = None,
    channels: Sequence[str] | None = None,
    start: Any = None,
    end: Any = None,
    axes: Axes | None = None,
) -> Axes:
    """All channels of one item below one another, each in its own scale; kept patches in the colour of their reason.

    Args:
        frame: the series, as given to ``fit`` or ``routes``.
        table: of ``routes``, one row per entry.
        item: which; default the first of the table.
        channels: columns of the frame to draw, from the top; default all of the table that are numbers.
        start, end: part of the time to draw.
    """
    entries = choose(table, "table", item=item)
    series = choose(as_pandas(frame), "frame", item=entries["unique_id"].iloc[0])
    time = find_column(series, TIME_NAMES)
    names = _numeric(series, entries) if channels is None else list(channels)
    missing = [name for name in names if name not in series]
    if missing or not names:
        raise DataError("E-COLUMNS", f"The frame has no column {missing}.", fix="Pass channels=... that it has.")
    series = between(wall(series, time), time, start, end)
    entries = between(wall(entries, "ds_start", "ds_end"), "ds_start", start, end)
    axes = own_axes(axes, height=0.9 + INCHES_PER_CHANNEL * len(names))
    kept = entries[entries["status"] == "kept"]
    colours = reasons_of(kept)
    for row, name in enumerate(names):
        _draw_row(axes, series[time], series[name].astype(float), kept[kept["channel"] == name], -row, colours)
    for reason, (colour, marker) in colours.items():
        count = int((kept["reason"] == reason).sum())
        axes.plot([], [], marker, color=colour, ms=4, label=f"kept: {reason} ({count})")
    axes.set_yticks(-np.arange(len(names)), [_short(name) for name in names])
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.tick_params(axis="y", length=0)
    legend(axes)
    calm(axes, series[time])
    axes.spines["left"].set_visible(False)
    return axes


def _numeric(series: pd.DataFrame, entries: pd.DataFrame) -> list[str]:
    present = set(entries["channel"])
    return [str(name) for name in series if name in present and pd.api.types.is_numeric_dtype(series[name])]


def _draw_row(
    axes: Axes,
    times: pd.Series,
    values: pd.Series,
    kept: pd.DataFrame,
    centre: float,
    colours: dict[str, tuple[str, str]],
) -> None:
    """One channel between centre - 0.42 and centre + 0.42; bars under it where patches were kept."""
    low, high = values.min(), values.max()
    unit = high - low if high > low else 1.0
    placed = centre - 0.28 + 0.7 * (values - low) / unit
    axes.plot(*thin(times, placed, ROW_POINTS), color="#7f7f7f", lw=0.6, zorder=2)
    for reason, (colour, _) in colours.items():
        own = kept[kept["reason"] == reason]
        if own.empty:
            continue
        axes.vlines(own["ds_start"], centre - 0.42, centre + 0.42, color=colour, lw=0.7, alpha=0.35, zorder=1)
        axes.hlines(np.full(len(own), centre - 0.4), own["ds_start"], own["ds_end"], color=colour, lw=3, zorder=3)


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def plot_usage(table: pd.DataFrame, *, item: Any = None, axes: Axes | None = None) -> Axes:
    """A strip for each layer: which share of the observed tokens of each stretch of time it holds, or has held.

    Args:
        table: of ``routes``, one row per entry, refused ones included.
        item: which; default all items together.
    """
    entries = table if item is None else choose(table, "table", item=item)
    if entries.empty:
        raise DataError("E-EMPTY", "table has no rows to draw.", fix="Pass a table with rows.")
    entries = wall(entries, "ds_start", "ds_end")
    edges, share = _layer_shares(entries)
    axes = own_axes(axes, height=0.9 + 0.35 * len(share))
    strip = axes.pcolormesh(
        edges, np.arange(len(share) + 1) - 0.5, np.ma.masked_invalid(share), cmap="cividis", vmin=0,
        vmax=max(float(np.nanmax(share, initial=0)), 1e-9),
    )  # fmt: skip
    axes.set_yticks(range(len(share)), [f"layer {number}" for number in range(len(share))])
    axes.invert_yaxis()
    bar = axes.figure.colorbar(strip, ax=axes, pad=0.01, aspect=8)
    bar.set_label("share kept", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    calm(axes, entries["ds_start"])
    return axes


def _layer_shares(entries: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Edges of bins of time, [J + 1], and the share of tokens that each layer took there, [L, J]; NaN without any."""
    starts = entries["ds_start"].to_numpy()
    moments = np.unique(starts)
    bins = min(MOST_BINS, len(moments))
    first = moments[np.linspace(0, len(moments) - 1, bins, endpoint=False).astype(int)]
    edges = np.append(np.unique(first), entries["ds_end"].to_numpy().max())
    place = np.clip(np.searchsorted(edges, starts, side="right") - 1, 0, len(edges) - 2)  # [tokens]
    held = entries["layers"].where(entries["status"] != "pending", "").str.split(",").explode()
    held = held[held.ne("") & held.notna()].astype(int)
    layers = int(held.max()) + 1 if len(held) else 1
    total = np.bincount(place, minlength=len(edges) - 1)  # [J]
    by_row = pd.Series(place, index=entries.index)
    counts = np.zeros((layers, len(total)))  # [L, J]
    np.add.at(counts, (held.to_numpy(), by_row.loc[held.index].to_numpy()), 1)
    return edges, np.where(total > 0, counts / np.maximum(total, 1), np.nan)


def survival(table: pd.DataFrame) -> pd.DataFrame:
    """How long entries live in the scratchpad, by reason: ``reason, age, alive, at_risk``.

    ``age`` is the time since an entry was written, as the table's clock has it; ``alive`` the share that lives longer
    (Kaplan and Meier, 1958: those that are still kept at the query time are counted as long as they were seen).
    """
    wrote = table[table["written_at"].notna()]
    last = table["ds_end"].max()
    until = wrote["evicted_at"].where(wrote["evicted_at"].notna(), last)
    rows = pd.DataFrame({"reason": wrote["reason"], "age": until - wrote["written_at"]})
    rows["gone"] = wrote["evicted_at"].notna()
    parts = []
    for reason, own in rows.groupby("reason", sort=False):
        ages = own.groupby("age")["gone"].agg(["sum", "size"]).sort_index()
        at_risk = len(own) - ages["size"].cumsum().shift(fill_value=0)
        alive = (1 - ages["sum"] / at_risk).cumprod()
        parts.append(
            pd.DataFrame(
                {"reason": reason, "age": ages.index, "alive": alive.to_numpy(), "at_risk": at_risk.to_numpy()}
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["reason", "age", "alive", "at_risk"])


def plot_survival(table: pd.DataFrame, *, item: Any = None, axes: Axes | None = None) -> Axes:
    """Share of entries that live longer than an age, by reason; ticks mark those still kept.

    Args:
        table: of ``routes``, one row per entry.
        item: which; default all items together.
    """
    entries = table if item is None else choose(table, "table", item=item)
    curves = survival(entries)
    if curves.empty:
        raise DataError("E-EMPTY", "No step was ever kept.", fix="Raise budget_share, or pass a longer history.")
    axes = own_axes(axes)
    ages, unit = _in_units(curves["age"])
    for reason, (colour, marker) in reasons_of(curves).items():
        own = (curves["reason"] == reason).to_numpy()
        age = np.concatenate([[0.0], ages[own]])
        alive = np.concatenate([[1.0], curves.loc[own, "alive"]])
        count = int(curves.loc[own, "at_risk"].max())
        axes.step(age, alive, where="post", color=colour, lw=1.5, label=f"{reason} ({count})")
        seen = np.linspace(0, len(age) - 1, min(len(age), 12)).astype(int)
        axes.plot(age[seen], alive[seen], marker, color=colour, ms=4)
    axes.axhline(0, color=FAINT, lw=0.6)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel(f"age in {unit}")
    axes.set_ylabel("share still kept")
    legend(axes)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _in_units(ages: pd.Series) -> tuple[np.ndarray, str]:
    """Ages as numbers of a fitting unit."""
    if not pd.api.types.is_timedelta64_dtype(ages):
        return ages.to_numpy(float), "steps"
    seconds = ages.dt.total_seconds().to_numpy()
    for name, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds.max() >= 3 * size:
            return seconds / size, name
    return seconds, "seconds"
