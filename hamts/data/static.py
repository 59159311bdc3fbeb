"""The static frame -> one row of float64 per item."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from hamts.data.columns import (
    Notes,
    categories_of,
    column_kind,
    dtype_error,
    encode_categories,
    match_ids,
    open_frame,
    read_ids,
    read_numbers,
    some,
)
from hamts.data.panel import Dialect, Schema, StaticColumn
from hamts.data.schema import ID_NAMES, check_kind
from hamts.errors import DataError

__all__ = ["read_static"]


def read_static(
    static_df: Any, item_ids: np.ndarray, dialect: Dialect, notes: Notes, known: Schema | None
) -> tuple[tuple[StaticColumn, ...], np.ndarray | None]:
    """Static columns by name, and their values [I, E]; none and None without a static frame.

    Raises DataError: E-STATIC (an item without a row, a repeated row, a missing column), E-DTYPE, E-CARD, E-INF.
    """
    wanted = known.static if known else None
    if static_df is None:
        if wanted:
            names = [c.name for c in wanted]
            raise DataError(
                "E-STATIC", f"Fitting saw static columns {names}, no static_df came.", fix="Pass static_df."
            )
        return (), None
    if wanted == ():
        notes.add("W-IGNORED", "static_df was not there when fitting and is not read.")
        return (), None
    frame = open_frame(static_df, name="static_df", index_columns=(dialect.id_column, *ID_NAMES))
    id_column = _id_column(frame, dialect)
    rows = _row_of_item(frame, id_column, item_ids)
    names = [c for c in frame.columns if c != id_column]
    columns = wanted or tuple(_new_column(frame[name]) for name in sorted(names))
    extra = sorted(set(names) - {c.name for c in columns})
    if extra:
        notes.add("W-IGNORED", f"static columns {extra} were not there when fitting and are not read.")
    if not columns:
        raise DataError("E-STATIC", f"static_df has no column besides {id_column!r}.", fix="Leave static_df out.")
    values = np.stack([_read(frame, column, notes)[rows] for column in columns], axis=1)
    return columns, values


def _id_column(frame: nw.DataFrame[Any], dialect: Dialect) -> str | None:
    found = next((n for n in (dialect.id_column, *ID_NAMES) if n in frame.columns), None)
    if found is None and dialect.id_column is not None:
        raise DataError(
            "E-STATIC",
            f"static_df needs the column {dialect.id_column!r}. It has {some(frame.columns)}.",
            column=dialect.id_column,
            fix="Name the column of ids as in the frame.",
        )
    return found


def _row_of_item(frame: nw.DataFrame[Any], id_column: str | None, item_ids: np.ndarray) -> np.ndarray:
    """Row of the static frame of every item, [I]."""
    if id_column is None or len(item_ids) == len(frame) == 1:
        if len(frame) != 1:
            raise DataError(
                "E-STATIC", f"static_df of one item must have one row. Got {len(frame)}.", fix="Keep one row."
            )
        return np.zeros(1, dtype=np.int64)
    ids = read_ids(frame[id_column], name="static_df")
    if len(ids.values) < len(frame):
        again = np.flatnonzero(pd.Series(ids.codes).duplicated().to_numpy())
        raise DataError(
            "E-STATIC",
            f"static_df must have one row per item. {len(again)} rows repeat one.",
            column=id_column,
            series=ids.values[ids.codes[again[:5]]].tolist(),
            rows=[f"row {i}" for i in again[:5]],
            fix=f"static_df.drop_duplicates({id_column!r})",
        )
    rows = match_ids(item_ids, ids.values, column=id_column, name="df")
    missing = item_ids[rows < 0]
    if len(missing):
        raise DataError(
            "E-STATIC",
            f"static_df must have a row for every item. {len(missing)} have none.",
            column=id_column,
            series=missing[:5].tolist(),
            fix="Add their rows.",
        )
    return rows


def _new_column(column: nw.Series[Any]) -> StaticColumn:
    kind = column_kind(column)
    if kind is None:
        raise dtype_error(column, role="static")
    return StaticColumn(column.name, kind, categories_of(column) if kind == "categorical" else ())


def _read(frame: nw.DataFrame[Any], wanted: StaticColumn, notes: Notes) -> np.ndarray:
    if wanted.name not in frame.columns:
        raise DataError(
            "E-STATIC",
            f"Fitting saw a static column {wanted.name!r}, static_df has {some(frame.columns)}.",
            column=wanted.name,
            fix="Pass the static columns of fit.",
        )
    column = frame[wanted.name]
    check_kind(column, wanted.kind, role="static")
    if wanted.kind == "categorical":
        return encode_categories(column, wanted.levels, notes)
    values = read_numbers(column, notes)
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        rows = [f"row {i}" for i in infinite[:5]]
        raise DataError(
            "E-INF", "Static values must be finite.", column=wanted.name, rows=rows, fix="Replace them by NaN."
        )
    return values
