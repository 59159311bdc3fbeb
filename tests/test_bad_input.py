"""What is refused, and how: every code has a case, and its message says column, item, rows and the way out."""

# the tables of cases have one case a line
# ruff: noqa: E501

from __future__ import annotations

import datetime
import decimal
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from frames import quiet_panel
from hypothesis import given, settings
from hypothesis import strategies as st

from hamts.data.frame import encode_future, future_frame, split, to_panel
from hamts.errors import DataError, DataWarning


def long_frame(n_items: int = 2, rows: int = 5, *, freq: str = "h", zone: str | None = None) -> pd.DataFrame:
    ids = np.repeat([f"s{i}" for i in range(n_items)], rows)
    stamps = pd.date_range("2024-01-01", periods=rows, freq=freq, tz=zone)
    return pd.DataFrame({"unique_id": ids, "ds": list(stamps) * n_items, "y": np.arange(n_items * rows) * 1.0})


def with_cell(column: str, row: int, value: Any) -> pd.DataFrame:
    df = long_frame()
    df[column] = df[column].astype(object)
    df.loc[row, column] = value
    return df


def with_column(**columns: Any) -> pd.DataFrame:
    return long_frame().assign(**columns)


def nested() -> pd.DataFrame:
    df = long_frame()
    df.columns = pd.MultiIndex.from_product([["a"], df.columns])
    return df


def doubled() -> pd.DataFrame:
    df = long_frame()
    df.insert(3, "y", 1.0, allow_duplicates=True)
    return df


def repeated_rows() -> pd.DataFrame:
    return pd.concat([long_frame(), long_frame().iloc[[6]]], ignore_index=True)


def irregular() -> pd.DataFrame:
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta([0, 7, 18, 39, 42], unit="min")
    return long_frame(1).assign(ds=stamps)


def mixed_zones() -> pd.DataFrame:
    stamps = [pd.Timestamp("2024-01-01", tz=zone) for zone in ("UTC", "UTC", "Asia/Tokyo", "UTC", "UTC")]
    return long_frame(1).assign(ds=pd.Series(stamps, dtype=object))


def fold() -> pd.DataFrame:
    local = pd.date_range("2024-10-26", "2024-10-29", freq="h", tz="Europe/Berlin").tz_localize(None)
    return pd.DataFrame({"unique_id": "s0", "ds": local, "y": 1.0 * np.arange(len(local))})


LOG = pd.DataFrame({"unique_id": ["s0"], "ds": [pd.Timestamp("2024-01-01 02:30")], "type": ["t"]})
STATIC = pd.DataFrame({"unique_id": ["s0", "s1"], "size": [1, 2]})

# code, what is passed, a pattern in the message, column, item, a pattern in the first row, a pattern in the fix
Case = tuple[str, Callable[[], dict[str, Any]], str, Any, Any, str, str]
REFUSED: dict[str, Case] = {
    "a list": ("E-TYPE", lambda: {"df": [1, 2]}, "builtins.list", None, None, "", "DataFrame"),
    "an arrow table": ("E-TYPE", lambda: {"df": pl.from_pandas(long_frame()).to_arrow()}, "pyarrow", None, None, "", "to_pandas"),
    "a lazy frame": ("E-TYPE", lambda: {"df": pl.from_pandas(long_frame()).lazy()}, "lazy", None, None, "", "collect"),
    "no rows": ("E-EMPTY", lambda: {"df": long_frame().head(0)}, "no rows", None, None, "", "rows per item"),
    "nothing left": (
        "E-EMPTY", lambda: {"df": with_column(y=np.nan), "on_bad": "skip"}, "No item is left", None, None, "", "longer"),
    "nested columns": ("E-COLUMNS", lambda: {"df": nested()}, "2 levels", None, None, "", "join"),
    "doubled columns": ("E-COLUMNS", lambda: {"df": doubled()}, r"positions \[2, 3\]", "y", None, "", "drop"),
    "numbered columns": ("E-COLUMNS", lambda: {"df": pd.DataFrame(np.ones((3, 2)))}, "must be text", None, None, "", "map"),
    "no time": ("E-COLUMNS", lambda: {"df": long_frame().rename(columns={"ds": "dss"})}, "Did you mean 'dss'", "ds", None, "", "time_col"),
    "no target": ("E-COLUMNS", lambda: {"df": long_frame().rename(columns={"y": "sales"})}, r"\['unique_id', 'ds', 'sales'\]", "y", None, "", "target="),
    "another target": ("E-COLUMNS", lambda: {"df": long_frame(), "target": "yy"}, "no column 'yy'", "yy", None, "", "target="),
    "another covariate": ("E-COLUMNS", lambda: {"df": with_column(temp=1.0), "futr_cols": ["tmp"]}, "Did you mean 'temp'", "tmp", None, "", "futr_cols"),
    "time in index and columns": ("E-COLUMNS", lambda: {"df": long_frame().set_index("ds", drop=False)}, "both a column and the index", "ds", None, "", "reset_index"),
    "two times": ("E-COLUMNS", lambda: {"df": with_column(timestamp=1)}, r"\['ds', 'timestamp'\]", "ds", None, "", "time_col"),
    "no numbers in a wide frame": ("E-COLUMNS", lambda: {"df": pd.DataFrame({"ds": [1, 2], "a": ["u", "v"]})}, "at least one numeric", None, None, "", "target"),
    "a target among covariates": ("E-LEAK", lambda: {"df": long_frame(), "futr_cols": ["y"]}, "'y' is also listed in futr_cols", "y", None, "", "Take it out"),
    "two roles": ("E-ROLE", lambda: {"df": with_column(x=1.0), "futr_cols": ["x"], "action_cols": ["x"]}, "in action_cols and is futr_cols", "x", None, "", "one list"),
    "time as covariate": ("E-ROLE", lambda: {"df": long_frame(), "futr_cols": ["ds"]}, "the id or time column", "ds", None, "", "one list"),
    "names as one text": ("E-ROLE", lambda: {"df": with_column(x=1.0), "futr_cols": "x"}, "a list of names", "x", None, "", r"\['x'\]"),
    "no targets": ("E-ROLE", lambda: {"df": long_frame(), "target": []}, "at least one", None, None, "", "target"),
    "numbers as texts": ("E-DTYPE", lambda: {"df": with_column(y=[str(i) for i in range(10)])}, r"\['0', '1', '2'\]", "y", None, "", "pd.to_numeric"),
    "a boolean target": ("E-DTYPE", lambda: {"df": with_column(y=[True, False] * 5)}, "Got bool", "y", None, "", "astype"),
    "a complex target": ("E-DTYPE", lambda: {"df": with_column(y=np.arange(10) * 1j)}, "complex128", "y", None, "", "abs"),
    "decimals": ("E-DTYPE", lambda: {"df": with_column(y=[decimal.Decimal(i) for i in range(10)])}, "such as", "y", None, "", "astype"),
    "durations": ("E-DTYPE", lambda: {"df": with_column(y=pd.to_timedelta(range(10), unit="h"))}, "timedelta64", "y", None, "", "total_seconds"),
    "dates as covariate": ("E-DTYPE", lambda: {"df": with_column(d=pd.Timestamp("2024")), "past_cols": ["d"]}, "numbers, booleans or categories", "d", None, "", "Leave 'd' out"),
    "mixed values": ("E-DTYPE", lambda: {"df": with_column(m=[1, "a"] * 5), "past_cols": ["m"]}, r"\['1', 'a', '1'\]", "m", None, "", "to_numeric"),
    "too many categories": ("E-CARD", lambda: {"df": long_frame(2, 600).assign(c=[f"v{i}" for i in range(1200)])}, "has 1200", "c", None, "", "past_cols"),
    "no id": ("E-ID-NULL", lambda: {"df": with_cell("unique_id", 3, None)}, "1 rows have none", "unique_id", None, "row 3", "dropna"),
    "an empty id": ("E-ID-NULL", lambda: {"df": with_cell("unique_id", 3, "")}, "1 rows have none", "unique_id", None, "row 3", "dropna"),
    "mixed ids": ("E-ID-TYPE", lambda: {"df": with_cell("unique_id", 3, 1)}, "'number': 1, 'text': 's0'", "unique_id", None, "", "astype"),
    "ids of another type": ("E-ID-TYPE", lambda: {"df": with_column(unique_id=[(i // 5,) for i in range(10)])}, "tuple", "unique_id", None, "", "astype"),
    "no time in a row": ("E-NAT", lambda: {"df": with_column(ds=[None, *long_frame()["ds"][1:]])}, "1 rows have none", "ds", None, "row 0", "dropna"),
    "no number in a clock": ("E-NAT", lambda: {"df": with_column(ds=[np.nan, *range(9)])}, "1 rows have none", "ds", None, "row 0", "dropna"),
    "day or month first": ("E-DATE", lambda: {"df": with_column(ds=["03/04/2024"] * 10)}, r"2024-04-03 \(day first\) or 2024-03-04", "ds", None, "row 0: 03/04/2024", "dayfirst"),
    "no date": ("E-DATE", lambda: {"df": with_cell("ds", 4, "soon").astype({"ds": str})}, "ISO dates", "ds", None, "row 4: soon", "format"),
    "a leap second": ("E-DATE", lambda: {"df": with_column(ds=["2016-12-31T23:59:60"] * 10)}, "ISO dates", "ds", None, "row 0", "format"),
    "the year 2500": ("E-DATE", lambda: {"df": with_column(ds=np.array(["2500-01-01"] * 10, dtype="M8[s]"))}, "1678 and 2262", "ds", None, "row 0", "integer"),
    "the year 1500": ("E-DATE", lambda: {"df": with_column(ds=[datetime.date(1500, 1, 1)] * 10)}, "1678 and 2262", "ds", None, "", ""),
    "half steps": ("E-DATE", lambda: {"df": with_column(ds=np.arange(10) / 2)}, "whole ones", "ds", None, "row 1: 0.5", "datetimes"),
    "booleans as time": ("E-DATE", lambda: {"df": with_column(ds=[True, False] * 5)}, "Got bool", "ds", None, "", "to_datetime"),
    "mixed zones": ("E-TZ", lambda: {"df": mixed_zones()}, r"\['Asia/Tokyo', 'UTC'\]", "ds", None, "row 0: UTC", "utc=True"),
    "mixed offsets": ("E-TZ", lambda: {"df": long_frame(1, 2).assign(ds=["2024-03-31T01:00+01:00", "2024-03-31T03:00+02:00"])}, "one time zone", "ds", None, r"UTC\+01:00", "utc=True"),
    "zoned and naive": ("E-TZ", lambda: {"df": long_frame(1, 2).assign(ds=["2024-03-31T01:00", "2024-03-31T03:00Z"])}, "one time zone", "ds", None, "no zone", "utc=True"),
    "repeated rows": ("E-DUP", lambda: {"df": repeated_rows()}, "1 rows repeat", "ds", ["s1"], "row 6: unique_id='s1', ds='2024-01-01 01:00:00', y=6.0", "duplicates='mean'"),
    "a clock change": ("E-DUP", lambda: {"df": fold()}, "1 rows repeat", "ds", ["s0"], "row", "ambiguous='infer'"),
    "forgotten ids": ("E-DUP", lambda: {"df": long_frame().rename(columns={"unique_id": "shop"})}, "5 rows repeat", "ds", None, "row 0", "id_col='shop'"),
    "infinite targets": ("E-INF", lambda: {"df": with_column(y=[*range(7), np.inf, -np.inf, 1])}, "2 infinite", "y", ["s1"], r"row 7: .*y=inf", "on_bad='skip'"),
    "infinite covariates": ("E-INF", lambda: {"df": with_column(x=[np.inf, *range(9)])}, "1 infinite", "x", ["s0"], "row 0", "replace"),
    "no values": ("E-ALLNAN", lambda: {"df": with_column(y=[np.nan] * 5 + [1.0] * 5)}, "1 of 2", "y", ["s0"], "row 0", "on_bad='skip'"),
    "one row": ("E-SHORT", lambda: {"df": long_frame().head(6)}, "at least two rows. 1 of 2", "y", ["s1"], "row 5", "on_bad='skip'"),
    "irregular rows": ("E-FREQ", lambda: {"df": irregular()}, "0 days 00:07:00 x 1", "ds", None, "", "irregular='native'"),
    "a wrong frequency": ("E-FREQ", lambda: {"df": long_frame(), "freq": "2h"}, "0 days 01:00:00 x 8", "ds", None, "'s0' at 2024-01-01 01:00:00", "freq='h'"),
    "no frequency": ("E-FREQ", lambda: {"df": long_frame(), "freq": "often"}, "'often'", None, None, "", "15min"),
    "a frequency going back": ("E-FREQ", lambda: {"df": long_frame(), "freq": -1}, "at least one", None, None, "", "positive"),
    "frequency and native": ("E-FREQ", lambda: {"df": irregular(), "freq": "h", "irregular": "native"}, "no frequency", None, None, "", "one of the two"),
    "two frequencies": ("E-FREQ-MIX", lambda: {"df": pd.concat([long_frame(2, 9), long_frame(1, 9, freq="2h").assign(unique_id="s2")])}, "h: 2 items", "ds", ["s2"], "", "per group"),
    "a clock that jumps": ("E-GAP", lambda: {"df": long_frame(2, 9, freq="ms").assign(ds=lambda d: d["ds"].where(d.index != 8, pd.Timestamp("2099")))}, "regular clock", None, "s0", "", "wrong date"),
    "an event on an unknown item": ("E-EVENT", lambda: {"df": long_frame(), "events": LOG.assign(unique_id="who")}, "1 on unknown items", "ds", ["who"], "row 0: unique_id='who'", "on_bad='skip'"),
    "an event without a type": ("E-EVENT", lambda: {"df": long_frame(), "events": LOG.assign(type=None)}, "needs a type", "type", None, "row 0: unique_id='s0'", "drop"),
    "an event too late": ("E-EVENT", lambda: {"df": long_frame(), "events": LOG.assign(ds=pd.Timestamp("2024-01-01 05:00"))}, "1 outside", "ds", ["s0"], "row 0", "futr_df"),
    "an event too early": ("E-EVENT", lambda: {"df": long_frame(), "events": LOG.assign(ds=pd.Timestamp("2023-12-31 23:59:59"))}, "1 outside", "ds", ["s0"], "row 0", "skip"),
    "a log without types": ("E-COLUMNS", lambda: {"df": long_frame(), "events": LOG.rename(columns={"type": "typ"})}, "Did you mean 'typ'", "type", None, "", "event log"),
    "a type named like a column": ("E-ROLE", lambda: {"df": long_frame(), "events": LOG.assign(type="y")}, "'y' is also a column", "y", None, "", "Rename"),
    "too many types": ("E-CARD", lambda: {"df": long_frame(), "events": pd.concat([LOG.assign(type=f"t{i}") for i in range(101)])}, "Got 101", "type", None, "", "Group"),
    "infinite events": ("E-INF", lambda: {"df": long_frame(), "events": LOG.assign(value=np.inf)}, "finite", "value", None, "row 0", "drop"),
    "texts as values of events": ("E-DTYPE", lambda: {"df": long_frame(), "events": LOG.assign(value="2")}, "such as", "value", None, "", "to_numeric"),
    "events in another zone": ("E-TZ-DRIFT", lambda: {"df": long_frame(), "events": LOG.assign(ds=LOG["ds"].dt.tz_localize("UTC"))}, "in events they have UTC", "ds", None, "", r"tz_localize\(None\)"),
    "an item without static row": ("E-STATIC", lambda: {"df": long_frame(), "static_df": STATIC.head(1)}, "1 have none", "unique_id", ["s1"], "", "Add"),
    "two static rows": ("E-STATIC", lambda: {"df": long_frame(), "static_df": pd.concat([STATIC, STATIC.head(1)])}, "1 rows repeat", "unique_id", ["s0"], "row 2", "drop_duplicates"),
    "a static frame without ids": ("E-STATIC", lambda: {"df": long_frame(), "static_df": STATIC[["size"]]}, "needs the column 'unique_id'", "unique_id", None, "", "ids"),
    "a static frame of ids": ("E-STATIC", lambda: {"df": long_frame(), "static_df": STATIC[["unique_id"]]}, "no column besides", None, None, "", "Leave"),
    "static ids of another type": ("E-ID-TYPE", lambda: {"df": long_frame(), "static_df": STATIC.assign(unique_id=[0, 1])}, "texts .* numbers", "unique_id", None, "", "astype"),
    "infinite static values": ("E-INF", lambda: {"df": long_frame(), "static_df": STATIC.assign(size=[1, np.inf])}, "finite", "size", None, "row 1", "NaN"),
    "static dates": ("E-DTYPE", lambda: {"df": long_frame(), "static_df": STATIC.assign(size=pd.Timestamp("2024"))}, "static", "size", None, "", "Leave"),
}  # fmt: skip


def check(error: DataError, case: Case) -> None:
    code, _, message, column, series, row, fix = case
    assert error.code == code
    assert re.search(message, error.message), error.message
    assert (error.column, error.series) == (column, series)
    assert re.search(row, (*error.rows, "")[0]), error.rows
    assert bool(error.rows) >= bool(row)
    assert len(error.rows) <= 5
    assert re.search(fix, error.fix), error.fix
    text = str(error)
    assert text.startswith(f"[{code}] ")
    assert error.message in text and error.fix in text


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_fitting(name):
    arguments = REFUSED[name][1]()
    with pytest.raises(DataError) as caught:
        quiet_panel(**arguments)
    check(caught.value, REFUSED[name])


def fitted_frame() -> pd.DataFrame:
    return long_frame().assign(x=np.arange(10.0), c=list("uvuvuvuvuv"), a=1.0)


DRIFT: dict[str, Case] = {
    "a column is gone": ("E-SCHEMA", lambda: {"df": fitted_frame().rename(columns={"x": "xx"})}, "needs column 'x'.*Did you mean 'xx'", "x", None, "", "columns of fit"),
    "the time is gone": ("E-SCHEMA", lambda: {"df": fitted_frame().drop(columns="ds")}, "column 'ds'", "ds", None, "", "columns of fit"),
    "numbers became texts": ("E-SCHEMA", lambda: {"df": fitted_frame().assign(x="1")}, "was numeric .* categorical", "x", None, "", "Convert"),
    "categories became numbers": ("E-SCHEMA", lambda: {"df": fitted_frame().assign(c=0.5)}, "was categorical .* numeric", "c", None, "", "Convert"),
    "the target became texts": ("E-DTYPE", lambda: {"df": fitted_frame().assign(y="1")}, "such as", "y", None, "", "to_numeric"),
    "a column became dates": ("E-DTYPE", lambda: {"df": fitted_frame().assign(x=pd.Timestamp("2024"))}, "such as", "x", None, "", "Leave"),
    "ids became numbers": ("E-ID-TYPE", lambda: {"df": fitted_frame().assign(unique_id=[0] * 5 + [1] * 5)}, "texts .* int64", "unique_id", None, "", r"astype\(str\)"),
    "times became zoned": ("E-TZ-DRIFT", lambda: {"df": fitted_frame().assign(ds=lambda d: d["ds"].dt.tz_localize("UTC"))}, "zone None .* UTC", "ds", None, "", r"tz_localize\(None\)"),
    "times became numbers": ("E-SCHEMA", lambda: {"df": fitted_frame().assign(ds=list(range(5)) * 2)}, "dates when fitting, .* whole numbers", "ds", None, "", "kind of fit"),
    "rows off the clock": ("E-FREQ", lambda: {"df": fitted_frame().assign(ds=list(pd.date_range("2024", periods=5, freq="30min")) * 2)}, "4 of 10 rows are not on the clock", "ds", None, "00:30:00", "30min"),
    "another frequency": ("E-FREQ", lambda: {"df": fitted_frame(), "freq": "D"}, "was 'h' when fitting", "ds", None, "", "Leave freq out"),
    "repeated rows": ("E-DUP", lambda: {"df": pd.concat([fitted_frame(), fitted_frame().head(1)], ignore_index=True)}, "1 rows repeat", "ds", ["s0"], "row 0", "duplicates"),
    "infinite values": ("E-INF", lambda: {"df": fitted_frame().assign(y=np.inf)}, "10 infinite", "y", ["s0", "s1"], "row 0", "skip"),
    "no log": ("E-SCHEMA", lambda: {"events": None}, r"types \['t'\]", None, None, "", "empty log"),
    "no static frame": ("E-STATIC", lambda: {"static_df": None}, r"\['size'\]", None, None, "", "Pass static_df"),
    "a static column is gone": ("E-STATIC", lambda: {"static_df": STATIC.rename(columns={"size": "s"})}, "'size'", "size", None, "", "columns of fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", DRIFT)
def test_refused_when_predicting(name):
    everything = {"events": LOG, "static_df": STATIC}
    schema = quiet_panel(fitted_frame(), futr_cols=["x"], action_cols=["a"], **everything).schema
    with pytest.raises(DataError) as caught:
        quiet_panel(**({"df": fitted_frame(), **everything} | DRIFT[name][1]()), schema=schema)
    check(caught.value, DRIFT[name])


def test_naive_times_after_zoned_ones_are_refused():
    schema = to_panel(long_frame(zone="Europe/Berlin")).schema
    with pytest.raises(DataError) as caught:
        to_panel(long_frame(), schema=schema)
    assert caught.value.code == "E-TZ-DRIFT"
    assert ".dt.tz_localize('Europe/Berlin')" in caught.value.fix


def test_text_ids_after_numbers_are_refused():
    schema = to_panel(long_frame().assign(unique_id=[1] * 5 + [2] * 5)).schema
    with pytest.raises(DataError) as caught:
        to_panel(long_frame().assign(unique_id=["1"] * 5 + ["2"] * 5), schema=schema)
    assert caught.value.code == "E-ID-TYPE"
    assert "astype(int)" in caught.value.fix


def future(edit: Callable[[pd.DataFrame], Any] = lambda f: f) -> Callable[[], Any]:
    return lambda: edit(
        pd.DataFrame(
            {
                "unique_id": ["s0"] * 2 + ["s1"] * 2,
                "ds": pd.to_datetime(["2024-01-01 05:00", "2024-01-01 06:00"] * 2),
                "x": [0.0, 1, 2, 3],
                "a": 1.0,
            }
        )
    )


FUTURE: dict[str, tuple[str, Callable[[], Any], str, Any, Any, str, str]] = {
    "no frame": ("E-FUTURE", lambda: None, r"\['x', 'a'\] must be known ahead", None, None, "", r"model.future_frame\(2\)"),
    "no column": ("E-FUTURE", future(lambda f: f.rename(columns={"x": "xx"})), "needs the column 'x'.*'xx'", "x", None, "", "future_frame"),
    "no planned action": ("E-FUTURE", future(lambda f: f.drop(columns="a")), "needs the column 'a'", "a", None, "", "future_frame"),
    "no ids": ("E-FUTURE", future(lambda f: f.drop(columns="unique_id")), "needs the column 'unique_id'", "unique_id", None, "", "future_frame"),
    "a missing row": ("E-FUTURE", future(lambda f: f.drop(index=3)), "1 of 4 are missing", "ds", ["s1"], r"\('s1', 2024-01-01 06:00:00\)", "future_frame"),
    "a missing item": ("E-FUTURE", future(lambda f: f.head(2)), "2 of 4", "ds", ["s1"], r"\('s1', 2024-01-01 05:00:00\)", "future_frame"),
    "rows off the clock": ("E-FUTURE", future(lambda f: f.assign(ds=f["ds"] + pd.Timedelta("1min"))), "4 rows off the clock", "ds", ["s0", "s1"], "s0", "future_frame"),
    "only history": ("E-FUTURE-OVERLAP", future(lambda f: f.assign(ds=f["ds"] - pd.Timedelta("2h"))), "4 rows in the history", "ds", None, "row 0: unique_id='s0'", "future_frame"),
    "missing values": ("E-FUTURE-NAN", future(lambda f: f.assign(x=[0, np.nan, 1, np.nan])), "'x' of futr_df has 2 missing", "x", None, "row 1", "Fill"),
    "infinite values": ("E-INF", future(lambda f: f.assign(x=[0, np.inf, 1, 2])), "1 infinite", "x", None, "row 1", "Fill"),
    "repeated rows": ("E-DUP", future(lambda f: pd.concat([f, f.head(1)], ignore_index=True)), "1 times have several", "ds", None, "row 0", "Drop"),
    "another zone": ("E-TZ-DRIFT", future(lambda f: f.assign(ds=f["ds"].dt.tz_localize("UTC"))), "in futr_df they have UTC", "ds", None, "", "tz_localize"),
    "ids of another type": ("E-ID-TYPE", future(lambda f: f.assign(unique_id=[0, 0, 1, 1])), "numbers .* texts", "unique_id", None, "", "astype"),
    "another kind": ("E-SCHEMA", future(lambda f: f.assign(x="warm")), "was numeric", "x", None, "", "Convert"),
    "no time in a row": ("E-NAT", future(lambda f: f.assign(ds=[None, *f["ds"][1:]])), "futr_df needs a time", "ds", None, "row 0", "futr_df.dropna"),
    "no rows": ("E-EMPTY", future(lambda f: f.head(0)), "futr_df has no rows", None, None, "", ""),
    "a dictionary": ("E-TYPE", lambda: {"x": 1}, "futr_df must be", None, None, "", "DataFrame"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUTURE)
def test_refused_as_future(name):
    panel = to_panel(fitted_frame(), futr_cols=["x"], action_cols=["a"])
    with pytest.raises(DataError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        encode_future(panel, FUTURE[name][1](), h=2)
    check(caught.value, FUTURE[name])


@pytest.mark.parametrize("h", [0, -1, 1.5, True, "1", None])
def test_the_horizon_is_a_whole_number(h):
    panel = to_panel(long_frame())
    for ask in (lambda: encode_future(panel, None, h=h), lambda: future_frame(panel, h)):
        with pytest.raises(DataError) as caught:
            ask()
        assert caught.value.code == "E-HORIZON"


def test_missing_future_times_are_shown_in_local_time():
    df = fitted_frame().assign(ds=list(pd.date_range("2024", periods=5, freq="h", tz="Asia/Tokyo")) * 2)
    panel = quiet_panel(df, futr_cols=["x"])
    with pytest.raises(DataError) as caught:
        encode_future(panel, future_frame(panel, 2).assign(x=1.0).head(3), h=2)
    assert caught.value.rows == ("('s1', 2024-01-01 06:00:00+09:00)",)


NOTED = {
    "W-GAP": (lambda: {"df": long_frame().drop(index=2)}, "1 of 10 steps"),
    "W-EPOCH": (lambda: {"df": long_frame(1).assign(ds=1_700_000_000 + 3600 * np.arange(5))}, "unit='s'"),
    "W-EPOCH ms": (lambda: {"df": long_frame(1).assign(ds=1_700_000_000_000 + 3600 * np.arange(5))}, "unit='ms'"),
    "W-EPOCH 1970": (lambda: {"df": long_frame(1).assign(ds=pd.to_datetime(1_700_000_000 + 3600 * np.arange(5)))}, "January 1970"),
    "W-PRECISION": (lambda: {"df": with_column(y=2**53 + 1 + np.arange(10))}, r"2\*\*53"),
    "W-IGNORED": (lambda: {"df": with_column(d=pd.Timestamp("2024"))}, "column 'd'"),
    "W-CONSTANT": (lambda: {"df": with_column(x=1.0)}, "column 'x'"),
    "W-ALLNAN": (lambda: {"df": with_column(z=[1.0] * 5 + [np.nan] * 5), "target": ["y", "z"]}, "'z' has no value at all in 1 items"),
    "W-DUP": (lambda: {"df": repeated_rows(), "duplicates": "last"}, "1 rows"),
    "W-SKIP": (lambda: {"df": long_frame().head(6), "on_bad": "skip"}, "E-SHORT.*'s1'"),
    "W-INF": (lambda: {"df": with_column(y=[np.inf, *range(9)]), "on_bad": "skip"}, "1 infinite"),
    "W-EVENT": (lambda: {"df": long_frame(), "events": pd.concat([LOG, LOG.assign(unique_id="who")]), "on_bad": "skip"}, "1 events"),
    "W-EVENT zero": (lambda: {"df": long_frame(), "events": LOG.assign(value=0)}, "add up to 0 in 1 steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_noted(name):
    make, pattern = NOTED[name]
    code = name.split(" ")[0]
    with pytest.warns(DataWarning, match=f"{code}: .*{pattern}") as caught:
        panel = to_panel(**make())
    assert any(re.match(f"{code}: .*{pattern}", note) for note in panel.notes)
    # where the caller called, not somewhere inside
    assert {w.filename for w in caught if issubclass(w.category, DataWarning)} == {__file__}
    assert len({str(w.message) for w in caught}) == len(caught)


def test_a_missing_local_hour_is_explained():
    local = pd.date_range("2024-03-30", "2024-04-02", freq="h", tz="Europe/Berlin").tz_localize(None)
    panel = quiet_panel(pd.DataFrame({"unique_id": "s0", "ds": local, "y": 1.0 * np.arange(len(local))}))
    assert "clock-change Sundays" in panel.notes[0]


def test_unknown_choices_are_refused():
    for name in ("duplicates", "on_bad", "irregular"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            to_panel(long_frame(), **{name: "maybe"})


def test_every_refusal_works_on_polars_too():
    for name in (
        "repeated rows",
        "infinite targets",
        "no values",
        "one row",
        "a boolean target",
        "numbers as texts",
        "a wrong frequency",
    ):
        arguments = REFUSED[name][1]()
        with pytest.raises(DataError) as caught:
            quiet_panel(**arguments | {"df": pl.from_pandas(arguments["df"])})
        assert caught.value.code == REFUSED[name][0]


def test_a_zone_in_the_split_of_naive_times_is_refused():
    with pytest.raises(DataError) as caught:
        split(long_frame(), at=pd.Timestamp("2024-01-01 03:00", tz="UTC"))
    assert caught.value.code == "E-TZ-DRIFT"


VALUES = st.one_of(
    st.lists(st.floats(), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.integers(-5, 5)), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.booleans()), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=2), st.floats(), st.dates()), min_size=6, max_size=6),
    st.lists(st.decimals(allow_nan=False, allow_infinity=False), min_size=6, max_size=6),
)
STAMPS = st.one_of(
    st.lists(st.integers(0, 9).map(lambda i: pd.Timestamp("2024-01-01") + pd.Timedelta(hours=i)), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.datetimes()), min_size=6, max_size=6),
    st.lists(st.integers(-(2**62), 2**62), min_size=6, max_size=6),
    st.lists(st.integers(0, 20), min_size=6, max_size=6, unique=True),
    st.lists(st.one_of(st.text(max_size=5), st.dates().map(str)), min_size=6, max_size=6),
    st.just(list(pd.date_range("2024-01-01", periods=6, freq="D", tz="Europe/Berlin"))),
)  # fmt: skip
IDS = st.lists(st.one_of(st.sampled_from(["a", "b"]), st.none(), st.integers(0, 1)), min_size=6, max_size=6)


def in_polars(df: pd.DataFrame) -> list[pl.DataFrame]:
    """The same frame in polars, or nothing where polars has no such column."""
    kinds = [{type(v) for v in df[name] if not pd.isna(v)} for name in df]
    # it panics on some decimals
    if any(len(kind) > 1 or decimal.Decimal in kind for kind in kinds):
        return []
    try:
        return [pl.DataFrame({name: df[name].tolist() for name in df}, strict=True)]
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        return []


@given(
    st.one_of(st.just(["a"] * 6), st.just(list("aaabbb")), IDS),
    STAMPS,
    VALUES,
    VALUES,
    st.sampled_from(["error", "skip"]),
)
@settings(max_examples=300)
def test_any_frame_gives_a_panel_or_a_data_error(ids, stamps, targets, covariate, on_bad):
    df = pd.DataFrame({"unique_id": ids, "ds": stamps, "y": targets, "x": covariate})
    copy = df.copy(deep=True)
    for frame in (df, *in_polars(df)):
        for options in ({}, {"duplicates": "mean"}, {"irregular": "native", "duplicates": "last"}):
            try:
                panel = quiet_panel(frame, on_bad=on_bad, **options)
            except DataError as error:
                assert re.fullmatch("E-[A-Z-]+", error.code)
                assert error.message and error.fix
                continue
            assert not np.isinf(panel.values).any()
            assert panel.offsets[-1] == len(panel.values)
            assert (panel.lengths >= 2).all()
            if not any(note.startswith("W-SKIP") for note in panel.notes):
                again = quiet_panel(frame, on_bad=on_bad, **options, schema=panel.schema)
                assert again.schema == panel.schema
                np.testing.assert_array_equal(again.values, panel.values)
    pd.testing.assert_frame_equal(df, copy)
