"""Rows of a frame, or a mapping of columns, as numbers: the light way for plain columns, the careful one for the rest.

A stream gets rows by the one or the thousand, thousands of times; reading them must cost less than a millisecond. Plain
columns (numbers, datetimes of the clock's own zone) are taken as they lie in memory. Anything else goes through the
code that reads frames for a fit, with its checks and messages.

n rows · C channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.clock import as_numbers, as_times, effective_clock, locate
from hamts.data.columns import Notes
from hamts.data.events import read_log
from hamts.data.panel import Panel, Schema
from hamts.data.source import SINGLE_ITEM, Options, open_known, read_known_channels
from hamts.errors import DataError
from hamts.fitting import LARGEST_VALUE, refuse_extremes
from hamts.stream_state import StreamItems

__all__ = ["Incoming", "read_rows"]


@dataclass(frozen=True)
class Incoming:
    """Rows as they came."""

    ids: Any  # [n] ids, or a list of one
    slots: np.ndarray  # [n] int64, -1 for items that the stream does not know
    times: np.ndarray  # [n] int64
    values: np.ndarray  # [n, C] float64, NaN missing
    offset: np.ndarray | None  # [n, C] float32, with a log only
    notes: tuple[str, ...] = ()


def read_rows(rows: Any, events: Any, items: StreamItems, schema: Schema) -> Incoming:
    """Rows in, in the order of the frame; the frame is not changed.

    Raises DataError: E-TYPE, E-SCHEMA, E-COLUMNS, E-DTYPE, E-ID-NULL, E-ID-TYPE, E-NAT, E-DATE, E-TZ-DRIFT, E-INF,
        E-RANGE, E-EVENT.
    """
    with_log = any(channel.from_log for channel in schema.channels)
    if not with_log and events is None:
        found = _plain(rows, items, schema)
        if found is not None:
            return found
    if isinstance(rows, Mapping):
        rows = _as_frame(rows)
    return _careful(rows, events, items, schema)


def _plain(rows: Any, items: StreamItems, schema: Schema) -> Incoming | None:
    """The light way; None where a column is not plain, so that the careful one can say what is wrong with it."""
    dialect = schema.dialect
    names = [dialect.time_column, *(channel.name for channel in schema.channels)]
    wanted = names if dialect.id_column is None else [dialect.id_column, *names]
    if not _has_exactly(rows, wanted):
        return None
    times = _plain_times(rows[dialect.time_column], schema)
    values = None if times is None or not len(times) else _plain_values(rows, len(times), schema)
    if times is None or values is None:
        return None
    ids = [SINGLE_ITEM] * len(times) if dialect.id_column is None else _plain_ids(rows[dialect.id_column])
    if ids is None or len(ids) != len(times):
        return None
    slots = items.slots(ids)
    # unknown ones may be of another type, or empty
    return None if int(slots.min()) < 0 else Incoming(ids, slots, times, values, None)


def _has_exactly(rows: Any, wanted: list[str]) -> bool:
    """Whether a pandas frame or a mapping has these columns, each once, and no other."""
    if isinstance(rows, pd.DataFrame):
        return len(rows.columns) == len(wanted) and set(rows.columns) == set(wanted)
    return isinstance(rows, Mapping) and set(rows) == set(wanted)


def _plain_values(rows: Any, n: int, schema: Schema) -> np.ndarray | None:
    """Values of all channels, [n, C]; None where one is not of plain, finite numbers."""
    values = np.empty((n, len(schema.channels)))
    for place, channel in enumerate(schema.channels):
        column = _plain_numbers(rows[channel.name])
        if column is None or channel.kind == "categorical" or len(column) != n:
            return None
        values[:, place] = np.nan_to_num(column, nan=0.0) if channel.role == "event" else column
    # squares of larger ones leave the range; infinite ones end here too
    return values if not (np.abs(values) > LARGEST_VALUE).any() else None


def _plain_times(column: Any, schema: Schema) -> np.ndarray | None:
    """int64 of a column on the clock's own kind of time, [n]."""
    if isinstance(column, pd.Series):
        kind = column.dtype
        zone = str(kind.tz) if isinstance(kind, pd.DatetimeTZDtype) else None
        if zone != schema.dialect.time_zone:
            return None
        column = column.dt.tz_convert(None).to_numpy() if zone is not None else column.to_numpy()
    elif schema.dialect.time_zone is not None:
        return None
    times = np.atleast_1d(np.asarray(column))
    wanted = "iu" if schema.frequency.kind == "integer" else "M"
    if times.dtype.kind not in wanted or times.ndim != 1 or (wanted == "M" and bool(np.isnat(times).any())):
        return None
    return as_numbers(times)


def _plain_numbers(column: Any) -> np.ndarray | None:
    values = column.to_numpy() if isinstance(column, pd.Series) else np.atleast_1d(np.asarray(column))
    return values if values.dtype.kind in "fiub" and values.ndim == 1 else None


def _plain_ids(column: Any) -> list[Any] | None:
    if isinstance(column, pd.Series):
        return column.tolist()
    if isinstance(column, str | int):
        return [column]
    return list(np.asarray(column).tolist()) if np.ndim(column) == 1 else None


def _as_frame(rows: Mapping[str, Any]) -> pd.DataFrame:
    lengths = {name: np.size(column) for name, column in rows.items()}
    if len(set(lengths.values())) > 1:
        raise DataError("E-COLUMNS", f"Columns must be of one length. Got {lengths}.", fix="A value per row in each.")
    return pd.DataFrame({name: list(np.atleast_1d(column)) for name, column in rows.items()})


def _careful(df: Any, events: Any, items: StreamItems, schema: Schema) -> Incoming:
    notes = Notes()
    source = open_known(df, schema, notes, Options("error", "error", "error"))
    values, channels = read_known_channels(source, schema)  # [n, C - from log]
    ids = source.ids.values[source.ids.codes]
    slots = items.slots(ids.tolist())
    offset = None
    if any(channel.from_log for channel in schema.channels) or events is not None:
        values, offset = _with_log(source.times.values, slots, values, events, items, schema, notes)
    refuse_extremes(values, schema)
    return Incoming(ids, slots, np.asarray(source.times.values), values, offset, notes.issue())


def _with_log(
    times: np.ndarray,
    slots: np.ndarray,
    values: np.ndarray,
    events: Any,
    items: StreamItems,
    schema: Schema,
    notes: Notes,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Channels of the frame and of the log beside it, [n, C], and offsets inside the step; events lie on these rows."""
    plain = replace(schema, channels=tuple(channel for channel in schema.channels if not channel.from_log))
    if len(slots) and int(slots.min()) < 0:
        # refused later on, by name
        return np.concatenate([values, np.zeros((len(slots), len(schema.channels) - values.shape[1]))], 1), None
    clock = effective_clock(schema.frequency, schema.dialect.time_zone)
    owners, code = np.unique(slots, return_inverse=True)
    first = np.full(len(owners), np.iinfo(np.int64).max)
    np.minimum.at(first, code, times)
    steps, _ = locate(clock, first[code], times, schema.dialect.time_zone)  # [n]
    lengths = np.zeros(len(owners), dtype=np.int64)
    np.maximum.at(lengths, code, steps + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    names = np.array([items.ids[slot] for slot in owners])
    grid = Panel(
        values=np.full((int(offsets[-1]), values.shape[1]), np.nan),
        offsets=offsets,
        item_ids=names.astype(object) if names.dtype.kind == "U" else names,
        starts=as_times(first, integer=schema.frequency.kind == "integer"),
        schema=plain,
    )
    read = read_log(events, grid, notes, on_bad="error", known=schema)
    place = offsets[code] + steps  # [n] row of the grid
    added = read.values[:, values.shape[1] :]  # [S, C of the log]
    missed = (np.delete(added, place, axis=0) != 0).any()
    if missed:
        notes.add("W-EVENT", "events at steps without a row are not read; send a row of missing values with them.")
    shift = read.event_offset
    full = np.concatenate([values, added[place]], axis=1)  # [n, C]
    return full, np.zeros(full.shape, np.float32) if shift is None else shift[place]
