"""Builders: from the files of one catalogue entry to a long frame with its labels.

Most sets are plain tables, described in the catalogue by column names only; the others have a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from hamts.data.flights import build_flights
from hamts.data.forms import Found
from hamts.errors import DataError

__all__ = ["BUILDERS", "ROLE_KEYS", "Parts", "flag_windows"]

ROLE_KEYS = ("target", "futr_cols", "past_cols", "event_cols", "action_cols")

Entry = Mapping[str, Any]
Sources = Mapping[str, Found]


@dataclass(frozen=True)
class Parts:
    """What a builder makes; everything else about a set stands in the catalogue."""

    df: pd.DataFrame
    labels: pd.DataFrame | None = None
    static_df: pd.DataFrame | None = None
    graph: pd.DataFrame | None = None
    split: dict[str, Any] = field(default_factory=dict)


def role_columns(entry: Entry) -> list[str]:
    return [name for key in ROLE_KEYS for name in entry.get(key, [])]


def build_table(entry: Entry, sources: Sources) -> Parts:
    """One file, one row per item and step; the catalogue names the columns."""
    return _table_parts(entry, sources["data"].read())


def build_files(entry: Entry, sources: Sources) -> Parts:
    """One file per item, named by its part in the catalogue."""
    tables = [found.read().assign(**{entry["id_col"]: part}) for part, found in sources.items()]
    return _table_parts(entry, pd.concat(tables, ignore_index=True))


def _table_parts(entry: Entry, table: pd.DataFrame) -> Parts:
    """Rename, order and type a table as the catalogue says; flags of label columns become windows."""
    needed = [entry["time_col"], *role_columns(entry), *entry.get("label_cols", {})]
    if "id_col" in entry:
        needed.insert(0, entry["id_col"])
    if absent := [name for name in needed if name not in table.columns]:
        raise DataError(
            "E-COLUMNS",
            f"the file must have the columns {needed}. Got {list(table.columns)}.",
            column=absent[0],
            fix="Give the file that the catalogue describes.",
        )
    ids = table[entry["id_col"]].astype(str) if "id_col" in entry else entry["item"]
    table = table.assign(unique_id=ids, ds=_clock(entry, table))
    table = table.sort_values(["unique_id", "ds"], kind="stable", ignore_index=True)
    labels = [flag_windows(table, column, label) for column, label in entry.get("label_cols", {}).items()]
    return Parts(
        df=_typed(entry, table[["unique_id", "ds", *role_columns(entry)]]),
        labels=pd.concat(labels, ignore_index=True) if labels else None,
    )


def _clock(entry: Entry, table: pd.DataFrame) -> pd.Series:
    """Times of the rows: whole numbers, or timestamps in nanoseconds, zoned where the catalogue names a zone."""
    times = table[entry["time_col"]]
    if entry["freq"] == 1:
        whole = pd.api.types.is_integer_dtype(times)
        return times.astype("int64") if whole else pd.Series(np.arange(len(table)), index=table.index)
    times = pd.to_datetime(times).dt.as_unit("ns")
    if zone := entry.get("time_zone"):
        universal = times if times.dt.tz is not None else times.dt.tz_localize("UTC")
        times = universal.dt.tz_convert(zone)
    return times


def _typed(entry: Entry, df: pd.DataFrame) -> pd.DataFrame:
    """Flags are boolean, texts are text, numbers are float64, whatever form of the file they came from."""
    flags = entry.get("bool_cols", [])
    types = {}
    for name in role_columns(entry):
        if name in flags:
            types[name] = "bool"
        elif pd.api.types.is_numeric_dtype(df[name]):
            # values that one form stores in single precision are rounded alike in all
            df = df.assign(**{name: df[name].astype("float32")}) if entry.get("single_precision") else df
            types[name] = "float64"
        else:
            types[name] = "object"
    return df.astype(types)


def flag_windows(table: pd.DataFrame, column: str, label: str) -> pd.DataFrame:
    """Runs of ones in a 0/1 column of a sorted long frame, per item; both ends are labelled rows."""
    flag = table[column].to_numpy() != 0
    ids = table["unique_id"].to_numpy()
    same_item = ids[1:] == ids[:-1]
    goes_on = flag[1:] & flag[:-1] & same_item
    first = np.flatnonzero(flag & ~np.concatenate([[False], goes_on]))
    last = np.flatnonzero(flag & ~np.concatenate([goes_on, [False]]))
    starts, ends = table.iloc[first].reset_index(drop=True), table.iloc[last].reset_index(drop=True)
    return pd.DataFrame({"unique_id": starts["unique_id"], "start": starts["ds"], "end": ends["ds"], "label": label})


def build_nycflights13(entry: Entry, sources: Sources) -> Parts:
    df, labels = build_flights(sources["flights"].path, sources["weather"].path, storms=entry["storms"])
    return Parts(df=df[["unique_id", "ds", *role_columns(entry)]], labels=labels)


def build_nab(entry: Entry, sources: Sources) -> Parts:
    """One series of the benchmark, without the rows whose timestamp cannot be right."""
    table = sources["data"].read()
    table = table[table["series"].astype(str) == entry["item"]]
    times = pd.to_datetime(table["timestamp"])
    wrong = times.duplicated()
    if entry["freq"] != "irregular":
        wrong |= (times - times.iloc[0]) % pd.Timedelta(to_offset(entry["freq"])) != pd.Timedelta(0)
    table = table[~wrong].rename(columns={"value": "y"}).reset_index(drop=True)
    return _table_parts(entry, table)


def build_tep(entry: Entry, sources: Sources) -> Parts:
    """Runs of the plant as items; each run's faulty steps are one window, labelled with the fault's number."""
    table = sources["data"].read()
    parts = _table_parts(entry, table)
    runs = table.drop_duplicates("run").astype({"run": str}).set_index("run")
    split = {f"{part}_items": sorted(runs.index[runs["split"] == part]) for part in ("train", "test")}
    labels = parts.labels
    if labels is not None:
        labels = labels.assign(label="fault " + labels["unique_id"].map(runs["fault"]).astype(str))
    return Parts(df=parts.df, labels=labels, split=split)


def build_metr_la(entry: Entry, sources: Sources) -> Parts:
    """Road sensors as items, their places as static columns, their adjacency as the graph between items."""
    speed = sources["speed"].read().drop(columns="step", errors="ignore")
    sensors = [str(name) for name in speed.columns]
    clock = pd.date_range(entry["start"], periods=len(speed), freq=entry["freq"], unit="ns")
    df = pd.DataFrame(
        {
            "unique_id": np.repeat(np.asarray(sensors, dtype=object), len(clock)),
            "ds": np.tile(clock.to_numpy(), len(sensors)),
            "speed": speed.to_numpy("float32").T.ravel().astype("float64"),
        }
    )
    graph = sources["adjacency"].read().set_axis(sensors, axis=0).set_axis(sensors, axis=1)
    places = sources["places"].read()
    static = places.assign(unique_id=places["sensor_id"].astype(str))[["unique_id", "latitude", "longitude"]]
    return Parts(df=df, static_df=static, graph=graph)


BUILDERS: dict[str, Callable[[Entry, Sources], Parts]] = {
    "table": build_table,
    "files": build_files,
    "nycflights13": build_nycflights13,
    "nab": build_nab,
    "tep": build_tep,
    "metr_la": build_metr_la,
}
