"""Any frame -> Panel: the way in.

    df --source--> values and keys --clean--> sorted rows --frequency--> grid --> Panel

Fitting resolves the roles of the columns (``schema=None``); predicting checks the frame against the schema of fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from hamts.data.answer import forecast_frame
from hamts.data.clean import clean_rows
from hamts.data.clock import as_times
from hamts.data.columns import Notes
from hamts.data.cut import split
from hamts.data.events import read_log
from hamts.data.frequency import IRREGULAR, clock_of, make_frequency, normalize_alias
from hamts.data.future import encode_future, future_frame
from hamts.data.infer import SortedTimes, check_frequency, clock_change_hint, find_frequency
from hamts.data.panel import Channel, Dialect, Frequency, Panel, Role, Schema
from hamts.data.rows import Rows, on_grid
from hamts.data.source import Options, Source, open_known, open_new, read_known_channels, read_new_channels
from hamts.data.static import read_static
from hamts.errors import DataError

__all__ = ["encode_future", "forecast_frame", "future_frame", "resolve_schema", "split", "to_panel"]


def to_panel(  # noqa: PLR0913 - one call, and each argument stands for itself
    df: Any,
    *,
    target: str | Sequence[str] | None = None,
    futr_cols: Sequence[str] | None = None,
    past_cols: Sequence[str] | None = None,
    event_cols: Sequence[str] | None = None,
    action_cols: Sequence[str] | None = None,
    events: Any = None,
    static_df: Any = None,
    freq: Any = None,
    id_col: str | None = None,
    time_col: str | None = None,
    duplicates: Literal["error", "mean", "last"] = "error",
    on_bad: Literal["error", "skip"] = "error",
    irregular: Literal["error", "native"] = "error",
    schema: Schema | None = None,
) -> Panel:
    """Encode a pandas or polars frame of any dialect. The frame itself is never changed.

    Args:
        df: long (``unique_id, ds, y`` or ``item_id, timestamp, target``, or names given below) or wide (a time and
            numeric columns: one item whose numeric columns are the targets).
        target: one or several columns; default ``y`` or ``target``.
        futr_cols, event_cols, action_cols: columns of these roles.
        past_cols: columns known up to now; default all others that are numeric, boolean or categorical.
        events: log with columns of id, time, ``type`` and perhaps ``value`` (1.0), on a clock of its own.
        static_df: one row per id.
        freq: frequency, checked against the rows; default the one that most differences have.
        duplicates: rows of the same id and time are an error, or become their ``mean`` or the ``last`` one.
        on_bad: ``skip`` leaves out items without values or with one row, infinite values, and events outside; all are
            noted.
        irregular: ``native`` takes rows as they are, one row one step, with their true times.
        schema: of the panel that was fitted. Roles, names and frequency are then taken from it, and ``freq`` must
            agree.

    Returns: values float64 [S, C] and the rest, see ``Panel``.

    Raises DataError: E-TYPE, E-EMPTY, E-COLUMNS, E-ROLE, E-LEAK, E-DTYPE, E-CARD, E-ID-NULL, E-ID-TYPE, E-NAT, E-DATE,
        E-TZ, E-DUP, E-INF, E-ALLNAN, E-SHORT, E-FREQ, E-FREQ-MIX, E-GAP, E-EVENT, E-STATIC; with a schema also
        E-SCHEMA, E-TZ-DRIFT.
    """
    notes, options = Notes(), Options(duplicates, on_bad, irregular)
    if schema is None:
        lists: dict[Role, Sequence[str] | None] = {
            "past": past_cols,
            "future": futr_cols,
            "event": event_cols,
            "action": action_cols,
        }
        source, roles = open_new(df, target, lists, id_col, time_col, notes, options)
        values, channels = read_new_channels(source, roles)
    else:
        source = open_known(df, schema, notes, options)
        values, channels = read_known_channels(source, schema)
    rows = clean_rows(source, values, channels, fitting=schema is None)
    clock = _sorted_times(source, rows)
    frequency, steps = _frequency(clock, freq, schema, options)
    return _assemble(source, rows, clock, frequency, steps, channels, events, static_df, schema)


def resolve_schema(df: Any, **arguments: Any) -> Schema:
    """Schema that fitting on this frame would fix; takes the arguments of ``to_panel`` and raises what it raises."""
    return to_panel(df, **arguments).schema


def _sorted_times(source: Source, rows: Rows) -> SortedTimes:
    times, column = source.times, source.layout.time_column
    return SortedTimes(rows.times, rows.offsets, source.ids.values[rows.items], times.integer, times.zone, column)


def _frequency(
    clock: SortedTimes, freq: Any, schema: Schema | None, options: Options
) -> tuple[Frequency, np.ndarray | None]:
    """Frequency, and the step of every row after the first of its item [rows]; no steps on an irregular clock."""
    known = schema.frequency if schema else None
    if freq is not None and (options.irregular == "native" or known == IRREGULAR):
        raise DataError(
            "E-FREQ", f"An irregular clock has no frequency. Got freq={freq!r}.", fix="Leave one of the two out."
        )
    if known and freq is not None and clock_of(normalize_alias(freq)) != clock_of(known.alias):
        raise DataError(
            "E-FREQ",
            f"The frequency was {known.alias!r} when fitting. Got freq={freq!r}.",
            column=clock.column,
            fix="Leave freq out when predicting.",
        )
    if known == IRREGULAR or (known is None and options.irregular == "native"):
        return IRREGULAR, None
    if known is None:
        known = find_frequency(clock) if freq is None else make_frequency(normalize_alias(freq))
    return known, check_frequency(clock, known)


def _assemble(
    source: Source,
    rows: Rows,
    clock: SortedTimes,
    frequency: Frequency,
    steps: np.ndarray | None,
    channels: tuple[Channel, ...],
    events: Any,
    static_df: Any,
    schema: Schema | None,
) -> Panel:
    values, offsets = rows.values, rows.offsets
    if steps is not None:
        values, offsets = on_grid(rows, steps, ids=source.ids.values)
        _note_gaps(source, rows, clock, len(values))
    integer = source.times.integer
    dialect = schema.dialect if schema else _dialect(source)
    static, static_values = read_static(static_df, clock.ids, dialect, source.notes, schema)
    panel = Panel(
        values=values,
        offsets=offsets,
        item_ids=clock.ids,
        starts=as_times(rows.times[rows.offsets[:-1]], integer=integer),
        schema=Schema(channels, static, frequency, dialect),
        # a copy: sorted stamps may still be the memory of the caller's frame
        times=None if steps is not None else as_times(rows.times.copy(), integer=integer),
        static_values=static_values,
    )
    panel = read_log(events, panel, source.notes, on_bad=source.options.on_bad, known=schema)
    return replace(panel, notes=source.notes.issue())


def _note_gaps(source: Source, rows: Rows, clock: SortedTimes, steps: int) -> None:
    missing = steps - len(rows.times)
    if missing:
        text = f"{missing} of {steps} steps have no row; they are read as missing."
        source.notes.add("W-GAP", f"{text}{clock_change_hint(clock)}")


def _dialect(source: Source) -> Dialect:
    layout, times = source.layout, source.times
    return Dialect(
        name=layout.name,
        id_column=layout.id_column,
        time_column=layout.time_column,
        library="polars" if source.frame.implementation.is_polars() else "pandas",
        time_zone=times.zone,
        time_unit=times.unit,
        id_dtype=source.ids.dtype,
    )
