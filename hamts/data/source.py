"""One frame, opened: its keys read, its columns turned into channels, in the order of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import narwhals.stable.v2 as nw
import numpy as np

from hamts.data.columns import (
    Ids,
    Notes,
    categories_of,
    column_kind,
    describe_rows,
    dtype_error,
    encode_categories,
    id_family,
    open_frame,
    read_ids,
    read_numbers,
)
from hamts.data.panel import Channel, Role, Schema
from hamts.data.schema import Layout, check_columns, check_kind, find_layout, name_index, role_columns
from hamts.data.timestamps import Times, read_times
from hamts.errors import DataError

__all__ = ["Options", "Source", "check_zone", "open_known", "open_new", "read_known_channels", "read_new_channels"]

SINGLE_ITEM = "item"


@dataclass(frozen=True)
class Options:
    """What the caller chose about rows that are not as they should be."""

    duplicates: Literal["error", "mean", "last"]
    on_bad: Literal["error", "skip"]
    irregular: Literal["error", "native"]

    def __post_init__(self) -> None:
        choices = {
            "duplicates": ("error", "mean", "last"),
            "on_bad": ("error", "skip"),
            "irregular": ("error", "native"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}. Got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Source:
    """One frame, opened: its columns by name, its ids and times read, and where notes go."""

    frame: nw.DataFrame[Any]
    layout: Layout
    ids: Ids
    times: Times
    notes: Notes
    options: Options

    def name_items(self, codes: np.ndarray) -> Any:
        """Ids of the first five of these items; None where the frame has no ids."""
        return None if self.layout.id_column is None else self.ids.values[codes[:5]].tolist()

    def describe(self, positions: np.ndarray, *more: str) -> list[str]:
        return describe_rows(self.frame, positions, (self.layout.id_column, self.layout.time_column, *more))


def open_new(
    df: Any,
    target: str | Sequence[str] | None,
    lists: dict[Role, Sequence[str] | None],
    id_col: str | None,
    time_col: str | None,
    notes: Notes,
    options: Options,
) -> tuple[Source, dict[str, Role]]:
    df, index_columns, time_col = name_index(df, id_col=id_col, time_col=time_col)
    frame = open_frame(df, index_columns=index_columns)
    layout = find_layout(frame, target=target, id_col=id_col, time_col=time_col)
    roles = role_columns(frame, layout, lists, notes)
    return _read_keys(frame, layout, notes, options), roles


def open_known(df: Any, schema: Schema, notes: Notes, options: Options) -> Source:
    dialect = schema.dialect
    df, index_columns, _ = name_index(df, id_col=dialect.id_column, time_col=dialect.time_column)
    frame = open_frame(df, index_columns=[*index_columns, dialect.id_column, dialect.time_column])
    check_columns(frame, schema, notes)
    layout = Layout(dialect.name, dialect.id_column, dialect.time_column, schema.targets)
    source = _read_keys(frame, layout, notes, options)
    _check_keys(source, schema)
    return source


def _read_keys(frame: nw.DataFrame[Any], layout: Layout, notes: Notes, options: Options) -> Source:
    if layout.id_column is None:
        ids = Ids(np.zeros(len(frame), dtype=np.int64), np.array([SINGLE_ITEM], dtype=object), "object")
    else:
        ids = read_ids(frame[layout.id_column])
    return Source(frame, layout, ids, read_times(frame[layout.time_column], notes), notes, options)


def _check_keys(source: Source, schema: Schema) -> None:
    """Ids and times of the kind that fitting saw. Raises DataError: E-ID-TYPE, E-TZ-DRIFT, E-SCHEMA."""
    dialect, ids, times = schema.dialect, source.ids, source.times
    was_number = any(part in dialect.id_dtype.lower() for part in ("int", "float", "double"))
    if dialect.id_column and dialect.id_dtype != "category" and was_number != (id_family(ids.values) == "numbers"):
        wanted, cast = ("numbers", "int") if was_number else ("texts", "str")
        raise DataError(
            "E-ID-TYPE",
            f"Ids were {wanted} ({dialect.id_dtype}) when fitting, here {ids.dtype} such as {ids.values[0]!r}.",
            column=dialect.id_column,
            fix=f"df[{dialect.id_column!r}] = df[{dialect.id_column!r}].astype({cast})",
        )
    check_zone(times, schema, name="df", notes=source.notes)


def check_zone(times: Times, schema: Schema, *, name: str, notes: Notes) -> None:
    """Times of the kind and zone that fitting saw. Raises DataError: E-SCHEMA (dates or integers), E-TZ-DRIFT."""
    dialect, column = schema.dialect, schema.dialect.time_column
    was_integer = dialect.time_unit not in ("D", "s", "ms", "us", "ns")
    if times.integer != was_integer:
        kinds = {True: "whole numbers", False: "dates"}
        raise DataError(
            "E-SCHEMA",
            f"Times were {kinds[was_integer]} when fitting, in {name} they are {kinds[times.integer]}.",
            column=column,
            fix="Pass times of the kind of fit.",
        )
    if (times.zone is None) != (dialect.time_zone is None):
        zone = dialect.time_zone or times.zone
        fix = f".dt.tz_localize({zone!r})" if times.zone is None else ".dt.tz_localize(None)"
        raise DataError(
            "E-TZ-DRIFT",
            f"Times had zone {dialect.time_zone} when fitting, in {name} they have {times.zone}.",
            column=column,
            fix=f"{name}[{column!r}] = {name}[{column!r}]{fix}",
        )
    if times.zone != dialect.time_zone:
        notes.add("W-TZ", f"times in zone {times.zone} are read as the same instants in {dialect.time_zone}.")


def read_new_channels(source: Source, roles: dict[str, Role]) -> tuple[np.ndarray, tuple[Channel, ...]]:
    values = np.empty((len(source.frame), len(roles)))
    channels = []
    for index, (name, role) in enumerate(roles.items()):
        column = source.frame[name]
        kind = column_kind(column)
        if kind is None or (role == "target" and kind != "numeric"):
            raise dtype_error(column, role=role)
        levels = categories_of(column) if kind == "categorical" else ()
        channels.append(Channel(name, role, kind, levels))
        values[:, index] = _read_channel(column, channels[-1], source)
    return values, tuple(channels)


def read_known_channels(source: Source, schema: Schema) -> tuple[np.ndarray, tuple[Channel, ...]]:
    channels = tuple(c for c in schema.channels if not c.from_log)
    values = np.empty((len(source.frame), len(channels)))
    for index, channel in enumerate(channels):
        column = source.frame[channel.name]
        check_kind(column, channel.kind, role=channel.role)
        values[:, index] = _read_channel(column, channel, source)
    return values, channels


def _read_channel(column: nw.Series[Any], channel: Channel, source: Source) -> np.ndarray:
    if channel.kind == "categorical":
        values = encode_categories(column, channel.levels, source.notes)
    else:
        values = read_numbers(column, source.notes)
    infinite = np.isinf(values)
    if infinite.any():
        values = _without_infinite(values, infinite, channel, source)
    if channel.role == "event":
        values = np.nan_to_num(values, nan=0.0)
    return values


def _without_infinite(values: np.ndarray, infinite: np.ndarray, channel: Channel, source: Source) -> np.ndarray:
    positions = np.flatnonzero(infinite)
    if source.options.on_bad == "error":
        raise DataError(
            "E-INF",
            f"Values must be finite. Column {channel.name!r} has {len(positions)} infinite ones.",
            column=channel.name,
            series=source.name_items(np.unique(source.ids.codes[positions])),
            rows=source.describe(positions, channel.name),
            fix=f"df[{channel.name!r}] = df[{channel.name!r}].replace([np.inf, -np.inf], np.nan), or on_bad='skip'.",
        )
    source.notes.add("W-INF", f"{len(positions)} infinite values of {channel.name!r} are read as missing.")
    return np.where(infinite, np.nan, values)
