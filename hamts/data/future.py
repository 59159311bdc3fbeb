"""What is known ahead: the frame to fill in, and the filled one as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np

from hamts.data.answer import key_frame
from hamts.data.clock import as_numbers, effective_clock, future_times, locate, show_times
from hamts.data.columns import (
    Notes,
    describe_rows,
    encode_categories,
    match_ids,
    nearest,
    open_frame,
    read_ids,
    read_numbers,
    some,
)
from hamts.data.panel import KNOWN_AHEAD, Channel, Panel
from hamts.data.schema import check_kind
from hamts.data.source import check_zone
from hamts.data.timestamps import read_times
from hamts.errors import DataError

__all__ = ["encode_future", "future_frame"]


@dataclass(frozen=True)
class Places:
    """Where the rows of a future frame lie: ``rows`` [n] in the frame, ``items`` and ``ahead`` [n] in the horizon."""

    rows: np.ndarray
    items: np.ndarray
    ahead: np.ndarray
    left_out: str  # what the other rows were, for messages
    in_history: int


def future_frame(panel: Panel, h: int) -> Any:
    """Ids and times of the ``h`` steps after the end of each item, a row each, in the user's dialect and library."""
    check_horizon(h)
    return key_frame(panel.schema.dialect, np.repeat(panel.item_ids, h), future_times(panel, h).ravel(), {})


def check_horizon(h: Any) -> None:
    """Raises DataError E-HORIZON unless ``h`` is a whole number above zero."""
    if isinstance(h, bool) or not isinstance(h, int | np.integer) or h < 1:
        raise DataError(
            "E-HORIZON", f"h must be a whole number of steps, at least 1. Got {h!r}.", fix="Pass h=24, say."
        )


def encode_future(panel: Panel, futr_df: Any, *, h: int) -> np.ndarray:
    """Known-ahead channels of the next ``h`` steps, float64 [I, h, C]; NaN in every other channel.

    Future and action columns must be there in full, event columns may be. Target and past columns of ``futr_df`` are
    never read. Rows of the history, beyond the horizon, off the clock or of other items are left out with a warning.

    Raises DataError: E-FUTURE (no frame, column or row where one is needed), E-FUTURE-NAN, E-FUTURE-OVERLAP (only rows
        of the history), E-DUP, E-INF, E-HORIZON, and what reading ids, times and columns raises.
    """
    check_horizon(h)
    channels = panel.schema.channels
    values = np.full((panel.n_items, h, len(channels)), np.nan)
    needed = [c for c in channels if c.role in KNOWN_AHEAD]
    if futr_df is None:
        if needed:
            names = [c.name for c in needed]
            raise DataError("E-FUTURE", f"Columns {names} must be known ahead, no futr_df came.", fix=_fix(h))
        return values
    notes = Notes()
    dialect = panel.schema.dialect
    frame = open_frame(futr_df, name="futr_df", index_columns=(dialect.id_column, dialect.time_column))
    _check_names(frame, [n for n in (dialect.id_column, dialect.time_column) if n] + [c.name for c in needed], h)
    read = [c for c in channels if c in needed or (c.role == "event" and c.name in frame.columns)]
    if read:
        places = _places(frame, panel, h, notes)
        _check_complete(frame, places, panel, h, rows_needed=bool(needed))
        for channel in read:
            column = _read(frame, channel, places, h, notes)
            values[places.items, places.ahead, channels.index(channel)] = column
    notes.issue()
    return values


def _fix(h: int) -> str:
    return f"Take future = model.future_frame({h}), fill in these columns, and pass futr_df=future."


def _check_names(frame: nw.DataFrame[Any], names: list[str], h: int) -> None:
    for name in names:
        if name not in frame.columns:
            what = f"futr_df needs the column {name!r}. It has {some(frame.columns)}.{nearest(name, frame.columns)}"
            raise DataError("E-FUTURE", what, column=name, fix=_fix(h))


def _places(frame: nw.DataFrame[Any], panel: Panel, h: int, notes: Notes) -> Places:
    dialect = panel.schema.dialect
    items = np.zeros(len(frame), dtype=np.int64)
    if dialect.id_column is not None:
        ids = read_ids(frame[dialect.id_column], name="futr_df")
        items = match_ids(ids.values, panel.item_ids, column=dialect.id_column, name="futr_df")[ids.codes]
    times = read_times(frame[dialect.time_column], notes, name="futr_df")
    check_zone(times, panel.schema, name="futr_df", notes=notes)
    known = items >= 0
    ahead, on_clock = _steps_ahead(panel, np.maximum(items, 0), times.values, known)
    inside = known & on_clock & (ahead >= 0) & (ahead < h)
    counts = {
        "of unknown items": int((~known).sum()),
        "off the clock": int((known & ~on_clock).sum()),
        "in the history": int((known & on_clock & (ahead < 0)).sum()),
        "beyond the horizon": int((known & on_clock & (ahead >= h)).sum()),
    }
    left_out = ", ".join(f"{count} rows {what}" for what, count in counts.items() if count)
    if left_out:
        notes.add("W-FUTURE", f"not read from futr_df: {left_out}.")
    rows = np.flatnonzero(inside)
    return Places(rows, items[rows], ahead[rows], left_out, counts["in the history"])


def _steps_ahead(
    panel: Panel, items: np.ndarray, times: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Steps after the end of its item for every row (0 is the first one), and whether it lies on the clock."""
    if panel.times is None:
        zone = panel.schema.dialect.time_zone
        clock = effective_clock(panel.schema.frequency, zone)
        steps, on_clock = locate(clock, as_numbers(panel.starts)[items], times, zone)
        return steps - panel.lengths[items], on_clock
    # irregular rows have no clock to be off: the first row after the end is the first step
    late = known & (times > as_numbers(panel.times)[panel.offsets[items + 1] - 1])
    rows = np.flatnonzero(late)
    order = rows[np.lexsort((times[rows], items[rows]))]
    count = np.bincount(items[order], minlength=panel.n_items)
    ahead = np.full(len(items), -1, dtype=np.int64)
    ahead[order] = np.arange(len(order)) - (np.cumsum(count) - count)[items[order]]
    return ahead, np.ones(len(items), dtype=bool)


def _check_complete(frame: nw.DataFrame[Any], places: Places, panel: Panel, h: int, *, rows_needed: bool) -> None:
    dialect = panel.schema.dialect
    keys = (dialect.id_column, dialect.time_column)
    seen = np.bincount(places.items * h + places.ahead, minlength=panel.n_items * h)
    if (seen > 1).any():
        again = places.rows[seen[places.items * h + places.ahead] > 1]
        what = f"futr_df must have one row per item and time. {int((seen > 1).sum())} times have several."
        raise DataError(
            "E-DUP", what, column=keys[1], rows=describe_rows(frame, again, keys), fix="Drop the repeated rows."
        )
    if not rows_needed or (seen == 1).all():
        return
    if not len(places.rows) and places.in_history:
        raise DataError(
            "E-FUTURE-OVERLAP",
            f"futr_df must hold the steps after the history. All it has: {places.left_out}.",
            column=keys[1],
            rows=describe_rows(frame, np.arange(min(5, len(frame))), keys),
            fix=_fix(h),
        )
    missing = np.flatnonzero(seen == 0)
    times = as_numbers(future_times(panel, h)).ravel()[missing[:5]]
    stamps = show_times(times, integer=panel.starts.dtype.kind != "M", zone=dialect.time_zone)
    pairs = [f"({panel.item_ids[i // h]!r}, {stamp})" for i, stamp in zip(missing, stamps, strict=False)]
    rest = f" It also has {places.left_out}." if places.left_out else ""
    raise DataError(
        "E-FUTURE",
        f"futr_df must have a row per item for {h} steps. {len(missing)} of {len(seen)} are missing.{rest}",
        column=keys[1],
        series=list(dict.fromkeys(panel.item_ids[missing[:1000] // h].tolist()))[:5],
        rows=pairs,
        fix=_fix(h),
    )


def _read(frame: nw.DataFrame[Any], channel: Channel, places: Places, h: int, notes: Notes) -> np.ndarray:
    """Values of one channel at the places, [n]."""
    column = frame[channel.name]
    check_kind(column, channel.kind, role=channel.role)
    if channel.kind == "categorical":
        values = encode_categories(column, channel.levels, notes)[places.rows]
    else:
        values = read_numbers(column, notes)[places.rows]
    if channel.role == "event":
        values = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf)
    for code, bad, what in (("E-FUTURE-NAN", np.isnan(values), "missing"), ("E-INF", np.isinf(values), "infinite")):
        if bad.any():
            raise DataError(
                code,
                f"Known-ahead values must be finite. {channel.name!r} of futr_df has {int(bad.sum())} {what} ones.",
                column=channel.name,
                rows=describe_rows(frame, places.rows[bad], frame.columns[:4]),
                fix="Fill them in, for example with the last plan or a forecast of them.",
            )
    return values
