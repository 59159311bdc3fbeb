"""The event log beside a frame -> one channel per type, with the place of each event inside its step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np

from hamts.data.clock import advance, as_numbers, effective_clock, locate
from hamts.data.columns import (
    Notes,
    describe_rows,
    dtype_error,
    match_ids,
    nearest,
    open_frame,
    read_ids,
    read_numbers,
    some,
)
from hamts.data.panel import Channel, Panel, Schema
from hamts.data.schema import ID_NAMES, TIME_NAMES
from hamts.data.source import check_zone
from hamts.data.timestamps import read_times
from hamts.errors import DataError

__all__ = ["read_log"]

# every type becomes a channel as long as the stream
MAX_TYPES = 100


@dataclass(frozen=True)
class Log:
    """Events that lie inside their items, in the order of time.

    Attributes:
        rows: row of ``Panel.values`` that each belongs to, int64 [events].
        offsets: where inside the step it lies, in [0, 1), [events].
        types: name of its type, [events].
        values: float64 [events].
    """

    rows: np.ndarray
    offsets: np.ndarray
    types: np.ndarray
    values: np.ndarray


def read_log(events: Any, panel: Panel, notes: Notes, *, on_bad: str, known: Schema | None) -> Panel:
    """Panel with the log's channels after those of the frame; unchanged without a log.

    A channel holds the sum of the values of its type in each step, 0 where there was none. Steps reach from their time
    up to the next one, so an event belongs to the step before or at it.

    Raises DataError: E-EVENT (unknown item or outside of it), E-COLUMNS, E-ROLE (a type named like a column), E-CARD,
        E-DTYPE, E-SCHEMA (no log, though there was one when fitting).
    """
    wanted = tuple(c for c in known.channels if c.from_log) if known else None
    if events is None:
        if wanted:
            raise DataError(
                "E-SCHEMA",
                f"Fitting saw an event log with types {[c.name for c in wanted]}, no events came.",
                fix="Pass events=...; an empty log says that nothing happened.",
            )
        return panel
    if wanted == ():
        notes.add("W-IGNORED", "an event log was not there when fitting and is not read.")
        return panel
    log = _open_log(events, panel, notes, on_bad=on_bad)
    channels = wanted if wanted is not None else _new_channels(log, panel)
    unseen = sorted(set(log.types) - {c.name for c in channels})
    if unseen:
        notes.add("W-UNSEEN", f"event types {unseen[:5]} were not there when fitting and are not read.")
    return _with_channels(panel, log, channels, notes)


def _open_log(events: Any, panel: Panel, notes: Notes, *, on_bad: str) -> Log:
    dialect = panel.schema.dialect
    names = (dialect.id_column, dialect.time_column, *ID_NAMES, *TIME_NAMES)
    frame = open_frame(events, name="events", index_columns=names, empty=True)
    time_column = _log_column(frame, (dialect.time_column, *TIME_NAMES))
    type_column = _log_column(frame, ("type",))
    if len(frame) == 0:
        nothing = np.empty(0)
        return Log(nothing.astype(np.int64), nothing, nothing.astype(str), nothing)
    items = _items(frame, panel)
    times = read_times(frame[time_column], notes, name="events")
    check_zone(times, panel.schema, name="events", notes=notes)
    untyped = np.flatnonzero(frame[type_column].is_null().to_numpy())
    if len(untyped):
        shown = describe_rows(frame, untyped, frame.columns)
        raise DataError(
            "E-EVENT", "Every event needs a type.", column=type_column, rows=shown, fix="Name it, or drop it."
        )
    types = np.array([str(t) for t in frame[type_column].to_list()])
    values = _values(frame, notes)
    rows, offsets = _place(panel, items, times.values)
    outside = np.flatnonzero(rows < 0)
    if len(outside):
        _refuse_outside(frame, outside, (time_column, type_column), items, panel, notes, on_bad)
    order = np.argsort(times.values, kind="stable")
    order = order[rows[order] >= 0]
    return Log(rows[order], offsets[order], types[order], values[order])


def _log_column(frame: nw.DataFrame[Any], names: tuple[str, ...]) -> str:
    found = next((n for n in names if n in frame.columns), None)
    if found is None:
        raise DataError(
            "E-COLUMNS",
            f"events needs a column {names[0]!r}. It has {some(frame.columns)}.{nearest(names[0], frame.columns)}",
            column=names[0],
            fix="An event log has columns of id, time, type and perhaps value.",
        )
    return found


def _items(frame: nw.DataFrame[Any], panel: Panel) -> np.ndarray:
    """Item of every event, -1 where it is not in the panel."""
    id_column = panel.schema.dialect.id_column
    if id_column is None:
        return np.zeros(len(frame), dtype=np.int64)
    column = _log_column(frame, (id_column, *ID_NAMES))
    ids = read_ids(frame[column], name="events")
    return match_ids(ids.values, panel.item_ids, column=column, name="events")[ids.codes]


def _values(frame: nw.DataFrame[Any], notes: Notes) -> np.ndarray:
    if "value" not in frame.columns:
        return np.ones(len(frame))
    column = frame["value"]
    if not (column.dtype.is_numeric() or isinstance(column.dtype, nw.Boolean)):
        raise dtype_error(column, role="target")
    values = np.nan_to_num(read_numbers(column, notes), nan=1.0, posinf=np.inf, neginf=-np.inf)
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        rows = describe_rows(frame, infinite, frame.columns)
        raise DataError(
            "E-INF", "Values of events must be finite.", column="value", rows=rows, fix="Correct or drop them."
        )
    return values


def _place(panel: Panel, items: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row of the panel that each event falls in (-1: none), and its offset inside the step."""
    item = np.maximum(items, 0)
    starts = as_numbers(panel.starts)[item]
    if panel.times is not None:
        steps, begin, end = _among_rows(panel, item, times)
    else:
        zone = panel.schema.dialect.time_zone
        clock = effective_clock(panel.schema.frequency, zone)
        steps, _ = locate(clock, starts, times, zone)
        begin, end = advance(clock, starts, steps, zone), advance(clock, starts, steps + 1, zone)
    inside = (items >= 0) & (steps >= 0) & (steps < panel.lengths[item])
    # rounding up to 1 would be the next step
    offsets = np.minimum((times - begin) / np.maximum(end - begin, 1), np.nextafter(np.float32(1), np.float32(0)))
    return np.where(inside, panel.offsets[item] + steps, -1), offsets


def _among_rows(panel: Panel, items: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """On an irregular clock: step of the last row at or before each event, its time and the time of the next one.

    The last row of an item takes its own time only.
    """
    stamps = as_numbers(panel.times)
    owner = np.repeat(np.arange(panel.n_items), panel.lengths)
    order = np.lexsort((np.r_[np.zeros(len(stamps)), np.ones(len(times))], np.r_[stamps, times], np.r_[owner, items]))
    rank = np.cumsum(order < len(stamps))
    before = np.empty(len(order), dtype=np.int64)
    before[order] = rank - 1
    row = before[len(stamps) :]
    steps = row - panel.offsets[items]
    is_last = row == panel.offsets[items + 1] - 1
    steps = np.where(is_last & (stamps[row] < times), panel.lengths[items], steps)
    following = np.minimum(row + 1, len(stamps) - 1)
    return steps, stamps[row], np.where(is_last, stamps[row] + 1, stamps[following])


def _refuse_outside(
    frame: nw.DataFrame[Any],
    outside: np.ndarray,
    columns: tuple[str, str],
    items: np.ndarray,
    panel: Panel,
    notes: Notes,
    on_bad: str,
) -> None:
    unknown = int((items[outside] < 0).sum())
    late = len(outside) - unknown
    text = f"{len(outside)} events lie on no step of the frame ({unknown} on unknown items, {late} outside their item)"
    if on_bad == "skip":
        notes.add("W-EVENT", f"{text} and are not read.")
        return
    id_column = panel.schema.dialect.id_column
    series = None
    if id_column in frame.columns:
        series = sorted({str(frame[id_column][int(i)]) for i in outside[:100]})[:5]
    raise DataError(
        "E-EVENT",
        f"{text}.",
        column=columns[0],
        series=series,
        rows=describe_rows(frame, outside, (id_column, *columns)),
        fix="Drop them from events, or pass on_bad='skip'. Events to come belong in futr_df.",
    )


def _new_channels(log: Log, panel: Panel) -> tuple[Channel, ...]:
    types = sorted(set(log.types.tolist()))
    if len(types) > MAX_TYPES:
        raise DataError(
            "E-CARD",
            f"A log may have at most {MAX_TYPES} types, each becomes a channel. Got {len(types)}: {types[:3]} ...",
            column="type",
            fix="Group the rare types.",
        )
    taken = {c.name for c in panel.schema.channels} & set(types)
    if taken:
        name = min(taken)
        raise DataError(
            "E-ROLE", f"Event type {name!r} is also a column of the frame.", column=name, fix="Rename one of them."
        )
    return tuple(Channel(name, "event", from_log=True) for name in types)


def _with_channels(panel: Panel, log: Log, channels: tuple[Channel, ...], notes: Notes) -> Panel:
    S, before = panel.values.shape
    values = np.concatenate([panel.values, np.zeros((S, len(channels)))], axis=1)  # [S, C]
    offset = np.zeros(values.shape, dtype=np.float32)  # [S, C]
    silent = 0
    for index, channel in enumerate(channels, start=before):
        mine = log.types == channel.name
        rows = log.rows[mine]
        values[:, index] = np.bincount(rows, weights=log.values[mine], minlength=S)
        # in the order of time, so the last one stays
        offset[rows, index] = log.offsets[mine]
        silent += int((values[np.unique(rows), index] == 0).sum())
    if silent:
        notes.add("W-EVENT", f"the values of events add up to 0 in {silent} steps, which reads as no event there.")
    schema = replace(panel.schema, channels=panel.schema.channels + channels)
    return replace(panel, values=values, event_offset=offset, schema=schema)
