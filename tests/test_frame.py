"""Frames of every dialect, library and dtype -> Panel, and back."""

from __future__ import annotations

import datetime
import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import polars.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamts.data.clock import future_times
from hamts.data.frame import encode_future, forecast_frame, future_frame, resolve_schema, split, to_panel
from hamts.data.panel import Panel, Schema
from hamts.errors import DataError, DataWarning


def long_frame(n_items: int = 2, rows: int = 5, *, freq: str = "h", zone: str | None = None) -> pd.DataFrame:
    """Items b0, a1, b2, ...: targets count up through all items."""
    ids = np.repeat([f"{'ba'[i % 2]}{i}" for i in range(n_items)], rows)
    stamps = pd.date_range("2024-01-01", periods=rows, freq=freq, tz=zone)
    return pd.DataFrame({"unique_id": ids, "ds": list(stamps) * n_items, "y": np.arange(n_items * rows) * 1.0})


def quiet_panel(df: Any, **options: Any) -> Panel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return to_panel(df, **options)


def assert_same(one: Panel, other: Panel) -> None:
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    np.testing.assert_array_equal(one.starts, other.starts)
    np.testing.assert_array_equal(one.item_ids.astype(str), other.item_ids.astype(str))
    assert one.schema.channels == other.schema.channels
    assert one.schema.frequency == other.schema.frequency


def test_a_long_frame_by_hand():
    panel = to_panel(long_frame())
    assert panel.values.dtype == np.float64
    np.testing.assert_array_equal(panel.values[:, 0], np.arange(10.0))
    assert panel.offsets.tolist() == [0, 5, 10]
    assert panel.item_ids.tolist() == ["b0", "a1"]
    assert panel.starts.dtype == "M8[ns]"
    assert panel.starts.tolist() == [pd.Timestamp("2024-01-01").value] * 2
    assert (panel.times, panel.event_offset, panel.static_values, panel.notes) == (None, None, None, ())
    assert panel.schema.targets == ("y",)
    assert panel.schema.frequency.alias == "h"
    assert panel.item(1).tolist() == [[5.0], [6.0], [7.0], [8.0], [9.0]]


def test_unsorted_rows_are_sorted_and_items_stay_in_order_of_appearance():
    df = long_frame()
    shuffled = df.iloc[[9, 3, 1, 5, 0, 7, 2, 8, 6, 4]]
    panel = to_panel(shuffled)
    assert panel.item_ids.tolist() == ["a1", "b0"]
    np.testing.assert_array_equal(panel.values[:, 0], [5, 6, 7, 8, 9, 0, 1, 2, 3, 4])


def test_gaps_become_rows_of_nan_with_a_note():
    df = long_frame().drop(index=[2, 6, 7])
    with pytest.warns(DataWarning, match="W-GAP: 3 of 10 steps have no row"):
        panel = to_panel(df)
    np.testing.assert_array_equal(panel.values[:, 0], [0, 1, np.nan, 3, 4, 5, np.nan, np.nan, 8, 9])
    assert panel.notes[0].startswith("W-GAP")


def test_missing_targets_stay_missing():
    df = long_frame()
    df.loc[[1, 2], "y"] = np.nan
    assert np.flatnonzero(np.isnan(to_panel(df).values[:, 0])).tolist() == [1, 2]


def test_gluonts_names_are_answered_in_kind():
    df = long_frame().rename(columns={"unique_id": "item_id", "ds": "timestamp", "y": "target"})
    panel = to_panel(df)
    assert panel.schema.dialect.name == "gluonts"
    answer = forecast_frame(panel, panel.item_ids, future_times(panel, 2), {"predictions": np.zeros((2, 2))})
    assert list(answer.columns) == ["item_id", "timestamp", "predictions"]


def test_custom_names():
    df = long_frame().rename(columns={"unique_id": "shop", "ds": "when", "y": "sales"})
    panel = to_panel(df, id_col="shop", time_col="when", target="sales")
    assert panel.schema.dialect.name == "nixtla"
    assert panel.schema.targets == ("sales",)
    assert list(future_frame(panel, 1).columns) == ["shop", "when"]


def test_a_wide_frame_is_one_item_with_all_numbers_as_targets():
    df = pd.DataFrame({"date": pd.date_range("2024", periods=4, freq="h"), "b": [1, 2, 3, 4], "a": [0.5, 1, 1, 1]})
    panel = to_panel(df)
    assert panel.schema.dialect.name == "wide"
    assert panel.schema.targets == ("a", "b")
    assert panel.values.tolist() == [[0.5, 1], [1, 2], [1, 3], [1, 4]]
    assert_same(to_panel(df.set_index("date")), panel)
    assert_same(to_panel(pl.from_pandas(df)), panel)
    unnamed = df.set_index("date").rename_axis(None)
    assert_same(to_panel(unnamed), panel)
    assert to_panel(unnamed).schema.dialect.time_column == "ds"
    assert unnamed.index.name is None


def test_a_wide_frame_with_roles():
    df = pd.DataFrame(
        {
            "ds": pd.date_range("2024", periods=4, freq="h"),
            "load": [1.0, 2, 3, 4],
            "price": [4.0, 2, 1, 3],
            "temp": [0.0, 1, 2, 2],
        }
    )
    panel = to_panel(df, futr_cols=["temp"])
    assert [(c.name, c.role) for c in panel.schema.channels] == [
        ("load", "target"),
        ("price", "target"),
        ("temp", "future"),
    ]
    panel = to_panel(df, target="price")
    assert [(c.name, c.role) for c in panel.schema.channels] == [
        ("price", "target"),
        ("load", "past"),
        ("temp", "past"),
    ]


def test_a_long_frame_without_ids_is_one_item():
    panel = to_panel(long_frame(1).drop(columns="unique_id"))
    assert (panel.n_items, panel.schema.dialect.id_column, panel.schema.dialect.name) == (1, None, "nixtla")
    assert list(future_frame(panel, 1).columns) == ["ds"]


def test_keys_in_the_index_become_columns():
    df = long_frame()
    for keyed in (df.set_index("unique_id"), df.set_index(["unique_id", "ds"]), df.set_index("ds")):
        assert_same(to_panel(keyed), to_panel(df))
        assert "unique_id" in keyed.index.names or "ds" in keyed.index.names


def test_roles():
    df = long_frame().assign(p=1.5, q=[True, False] * 5, f=range(10), e=[0, 1] * 5, a=range(10), c=list("xyzxyzxyzx"))
    panel = quiet_panel(df, futr_cols=["f"], event_cols=["e"], action_cols=["a"])
    assert [(c.name, c.role, c.kind) for c in panel.schema.channels] == [
        ("y", "target", "numeric"),
        ("c", "past", "categorical"),
        ("p", "past", "numeric"),
        ("q", "past", "boolean"),
        ("f", "future", "numeric"),
        ("e", "event", "numeric"),
        ("a", "action", "numeric"),
    ]
    assert panel.values[1].tolist() == [1, 2, 1.5, 0, 1, 1, 1]
    assert any(n.startswith("W-CONSTANT: column 'p'") for n in panel.notes)
    only = quiet_panel(df, past_cols=["p"])
    assert [c.name for c in only.schema.channels] == ["y", "p"]
    assert any("W-IGNORED" in n and "['a', 'c', 'e', 'f', 'q']" in n for n in only.notes)


def test_several_targets_keep_the_order_asked_for():
    df = long_frame().assign(z=2.0, x=range(10))
    panel = quiet_panel(df, target=["z", "y"])
    assert panel.schema.targets == ("z", "y")
    assert panel.schema.indices("target") == [0, 1]


def test_categories_have_codes_and_unseen_ones_are_zero():
    df = long_frame().assign(c=pd.Categorical(["v", "u", None, "u", "w"] * 2, categories=["w", "v", "u", "never"]))
    fitted = to_panel(df)
    assert fitted.schema.channels[1].levels == ("u", "v", "w")
    np.testing.assert_array_equal(fitted.values[:5, 1], [2, 1, np.nan, 1, 3])
    with pytest.warns(DataWarning, match=r"W-UNSEEN: column 'c' .*\['new'\]"):
        later = to_panel(df.assign(c=["v", "new", "u", "u", "w"] * 2), schema=fitted.schema)
    np.testing.assert_array_equal(later.values[:5, 1], [2, 0, 1, 1, 3])


def test_event_columns_have_no_event_where_nothing_is_said():
    df = long_frame().assign(e=pd.array([None, True, None, False, None] * 2, dtype="boolean")).drop(index=8)
    panel = quiet_panel(df, event_cols=["e"])
    # the gap itself is a step without a row, not one without an event
    np.testing.assert_array_equal(panel.values[:, 1], [0, 1, 0, 0, 0, 0, 1, 0, np.nan, 0])


def test_the_event_log_by_hand():
    log = pd.DataFrame(
        {
            "unique_id": ["a1", "b0", "b0", "b0", "a1"],
            "ds": [pd.Timestamp(2024, 1, 1, h, m) for h, m in [(4, 59), (0, 15), (0, 45), (2, 0), (0, 0)]],
            "type": ["alarm", "alarm", "alarm", "visit", "visit"],
            "value": [1, 2, 3, None, 0.5],
        }
    )
    panel = to_panel(long_frame(), events=log)
    assert [(c.name, c.role, c.from_log) for c in panel.schema.channels[1:]] == [
        ("alarm", "event", True),
        ("visit", "event", True),
    ]
    np.testing.assert_array_equal(panel.values[:, 1], [5, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(panel.values[:, 2], [0, 0, 1, 0, 0, 0.5, 0, 0, 0, 0])
    assert panel.event_offset.dtype == np.float32 and panel.event_offset.shape == panel.values.shape
    assert panel.event_offset[0].tolist() == [0, 0.75, 0]
    assert panel.event_offset[9, 1] == np.float32(59 / 60)
    assert panel.event_offset[2, 2] == 0


def test_the_log_is_counted_the_same_on_every_kind_of_clock():
    log = pd.DataFrame({"unique_id": "b0", "ds": pd.to_datetime(["2024-03-15", "2024-01-01"]), "type": "t"})
    monthly = long_frame(1, 4, freq="MS")
    panel = to_panel(monthly, events=log)
    assert panel.values[:, 1].tolist() == [1, 0, 1, 0]
    assert panel.event_offset[2, 1] == pytest.approx(14 / 31)
    irregular = monthly.assign(ds=pd.to_datetime(["2024-01-01", "2024-01-04", "2024-02-15", "2024-04-15"]))
    native = to_panel(irregular, events=log, irregular="native")
    assert native.values[:, 1].tolist() == [1, 0, 1, 0]
    assert native.event_offset[2, 1] == pytest.approx(29 / 60)
    numbers = pd.DataFrame({"unique_id": "b0", "ds": [3, 6, 9], "y": [1.0, 2, 3]})
    counted = to_panel(numbers, events=pd.DataFrame({"unique_id": ["b0"], "ds": [8], "type": ["t"]}))
    assert counted.values[:, 1].tolist() == [0, 1, 0]
    assert counted.event_offset[1, 1] == pytest.approx(2 / 3)


def test_a_log_fills_gaps_and_an_empty_one_says_nothing_happened():
    df = long_frame().drop(index=2)
    log = pd.DataFrame({"unique_id": ["b0"], "ds": [pd.Timestamp("2024-01-01 02:30")], "type": ["t"]})
    panel = quiet_panel(df, events=log)
    assert np.isnan(panel.values[2, 0]) and panel.values[2, 1] == 1
    again = quiet_panel(df, events=log.head(0), schema=panel.schema)
    assert again.schema == panel.schema
    assert again.values[:, 1].tolist() == [0] * 10


def test_static_columns():
    static = pd.DataFrame(
        {"unique_id": ["zz", "a1", "b0"], "size": [9, 1, 2], "kind": ["u", "v", None], "open": [True, True, False]}
    )
    panel = to_panel(long_frame(), static_df=static)
    assert [(c.name, c.kind, c.levels) for c in panel.schema.static] == [
        ("kind", "categorical", ("u", "v")),
        ("open", "boolean", ()),
        ("size", "numeric", ()),
    ]
    np.testing.assert_array_equal(panel.static_values, [[np.nan, 0, 2], [2, 1, 1]])
    again = quiet_panel(long_frame(), static_df=pl.from_pandas(static), schema=panel.schema)
    np.testing.assert_array_equal(again.static_values, panel.static_values)


NUMBERS = [1, 2, None, 4, 5]
DTYPES = {
    "float32": lambda: pd.Series(NUMBERS, dtype="float32"),
    "object with None": lambda: pd.Series([1, 2.0, None, 4, 5], dtype=object),
    "Int64": lambda: pd.Series(NUMBERS, dtype="Int64"),
    "UInt8": lambda: pd.Series(NUMBERS, dtype="UInt8"),
    "Float64": lambda: pd.Series(NUMBERS, dtype="Float64"),
    "arrow int": lambda: pd.Series(NUMBERS, dtype="int64[pyarrow]"),
    "arrow float": lambda: pd.Series(NUMBERS, dtype="double[pyarrow]"),
    "sparse": lambda: pd.Series(pd.arrays.SparseArray([1, 2, np.nan, 4, 5])),
    "polars int": lambda: pl.Series(NUMBERS, dtype=pl.Int16),
    "polars float": lambda: pl.Series(NUMBERS, dtype=pl.Float32),
}


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_of_every_dtype(name):
    values = DTYPES[name]()
    frame = pl.DataFrame if isinstance(values, pl.Series) else pd.DataFrame
    stamps = pd.date_range("2024", periods=5, freq="h")
    df = frame({"ds": pl.Series(list(stamps)) if frame is pl.DataFrame else stamps, "y": values, "x": values})
    np.testing.assert_array_equal(to_panel(df).values, [[1, 1], [2, 2], [np.nan, np.nan], [4, 4], [5, 5]])


def test_small_unsigned_numbers_do_not_wrap_around():
    df = long_frame(1).assign(y=np.array([3, 1, 0, 255, 2], dtype=np.uint8))
    assert to_panel(df).values[:, 0].tolist() == [3, 1, 0, 255, 2]


STAMPS = pd.date_range("2024-03-01", periods=4, freq="D")
TIMES = {
    "datetime64[s]": (lambda: pd.Series(STAMPS.as_unit("s")), "s", None),
    "datetime64[ms]": (lambda: pd.Series(STAMPS.as_unit("ms")), "ms", None),
    "datetime64[us]": (lambda: pd.Series(STAMPS.as_unit("us")), "us", None),
    "datetime64[ns]": (lambda: pd.Series(STAMPS), "ns", None),
    "texts": (lambda: STAMPS.strftime("%Y-%m-%d").to_series(index=range(4)), "ns", None),
    "texts with T": (lambda: STAMPS.strftime("%Y-%m-%dT%H:%M:%S").to_series(index=range(4)), "ns", None),
    "texts with Z": (lambda: STAMPS.strftime("%Y-%m-%dT%H:%MZ").to_series(index=range(4)), "ns", "UTC"),
    "texts with offset": (lambda: STAMPS.strftime("%Y-%m-%dT%H:%M+02:00").to_series(index=range(4)), "ns", "UTC+02:00"),
    "string dtype": (lambda: pd.Series(STAMPS.strftime("%Y-%m-%d"), dtype="string[pyarrow]"), "ns", None),
    "periods": (lambda: pd.Series(STAMPS.to_period("D")), "ns", None),
    "python datetimes": (lambda: pd.Series(list(STAMPS.to_pydatetime()), dtype=object), "ns", None),
    "python dates": (lambda: pd.Series(list(STAMPS.date), dtype=object), "D", None),
    "arrow dates": (lambda: pd.Series(list(STAMPS.date), dtype="date32[day][pyarrow]"), "D", None),
    "arrow stamps": (lambda: pd.Series(STAMPS).astype("timestamp[ms][pyarrow]"), "ms", None),
    "zoned": (lambda: pd.Series(STAMPS.tz_localize("Asia/Tokyo")), "ns", "Asia/Tokyo"),
    "arrow zoned": (lambda: pd.Series(STAMPS.tz_localize("Asia/Tokyo")).astype("timestamp[us, tz=Asia/Tokyo][pyarrow]"), "us", "Asia/Tokyo"),
    "zoned objects": (lambda: pd.Series(list(STAMPS.tz_localize("Asia/Tokyo")), dtype=object), "ns", "Asia/Tokyo"),
    "categories of texts": (lambda: pd.Series(STAMPS.strftime("%Y-%m-%d")).astype("category"), "ns", None),
    "polars dates": (lambda: pl.Series(list(STAMPS.date)), "D", None),
    "polars us": (lambda: pl.Series(list(STAMPS)).cast(pl.Datetime("us")), "us", None),
    "polars zoned": (lambda: pl.Series(list(STAMPS)).cast(pl.Datetime("ms")).dt.replace_time_zone("Asia/Tokyo"), "ms", "Asia/Tokyo"),
    "polars texts": (lambda: pl.Series(list(STAMPS.strftime("%Y-%m-%d"))), "ns", None),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
def test_times_of_every_dtype_are_read_and_answered_in_their_unit_and_zone(name):
    make, unit, zone = TIMES[name]
    times = make()
    frame = pl.DataFrame if isinstance(times, pl.Series) else pd.DataFrame
    panel = to_panel(frame({"ds": times, "y": [1.0, 2, 3, 4]}))
    assert (panel.schema.dialect.time_unit, panel.schema.dialect.time_zone) == (unit, zone)
    assert panel.schema.frequency.alias == "D"
    hours = {None: 0, "UTC": 0, "UTC+02:00": 2, "Asia/Tokyo": 9}[zone]
    assert panel.starts[0] == np.datetime64("2024-03-01") - np.timedelta64(hours, "h")
    ahead = future_frame(panel, 2)["ds"]
    if frame is pd.DataFrame:
        assert str(ahead.dt.tz or "") == (zone or "")
        assert ahead.dt.unit == {"D": "s"}.get(unit, unit)
        assert ahead.dt.tz_localize(None).tolist() == [pd.Timestamp("2024-03-05"), pd.Timestamp("2024-03-06")]
    else:
        assert ahead.dtype == (pl.Date if unit == "D" else pl.Datetime(unit, zone))
        assert [str(v)[:10] for v in ahead.to_list()] == ["2024-03-05", "2024-03-06"]


@pytest.mark.parametrize(
    "dtype", ["object", "string", "string[pyarrow]", "category", "int64", "Int64", "int32", "float64"]
)
def test_ids_come_back_in_their_dtype(dtype):
    df = long_frame()
    ids = df["unique_id"].map({"b0": 7, "a1": 3}) if dtype[0] in "iIf" else df["unique_id"]
    panel = to_panel(df.assign(unique_id=ids.astype(dtype)))
    assert panel.item_ids.tolist() == ([7, 3] if dtype[0] in "iIf" else ["b0", "a1"])
    assert future_frame(panel, 1)["unique_id"].dtype == pd.api.types.pandas_dtype(dtype) or dtype == "category"


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical, pl.Int64, pl.Int16])
def test_polars_ids_come_back_in_their_dtype(dtype):
    df = long_frame()
    numeric = dtype in (pl.Int64, pl.Int16)
    df["unique_id"] = df["unique_id"].map({"b0": 7, "a1": 3}) if numeric else df["unique_id"]
    frame = pl.from_pandas(df).with_columns(pl.col("unique_id").cast(dtype))
    panel = to_panel(frame)
    ahead = future_frame(panel, 2)
    assert ahead["unique_id"].dtype == dtype
    joined = ahead.join(frame.select("unique_id").unique(), on="unique_id")
    assert len(joined) == 4


def test_integer_clocks_come_back_in_their_dtype():
    df = long_frame().assign(ds=np.array(list(range(5)) * 2, dtype=np.int32))
    ahead = future_frame(to_panel(df), 2)
    assert (ahead["ds"].dtype, ahead["ds"].tolist()) == (np.int32, [5, 6, 5, 6])
    assert future_frame(to_panel(pl.from_pandas(df)), 2)["ds"].dtype == pl.Int32


def rich_frame(rng: np.random.Generator, *, with_gaps: bool = True) -> pd.DataFrame:
    """Three items with gaps, missing values, and columns of all kinds."""
    df = long_frame(3, 12)
    df["y"] = np.where(rng.random(36) < 0.2, np.nan, rng.normal(size=36))
    df["f"] = rng.normal(size=36)
    df["c"] = rng.choice(["u", "v", "w"], size=36)
    df["q"] = rng.random(36) < 0.5
    df["n"] = rng.integers(0, 9, size=36)
    return df.drop(index=[3, 4, 17, 30]) if with_gaps else df


def test_polars_and_pandas_frames_give_the_same_panel(rng):
    df = rich_frame(rng)
    assert_same(quiet_panel(pl.from_pandas(df), futr_cols=["f"]), quiet_panel(df, futr_cols=["f"]))


@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_columns_and_items_does_not_matter(random):
    df = rich_frame(np.random.default_rng(5))
    expected = quiet_panel(df, futr_cols=["f"], event_cols=["q"])
    rows, columns = list(range(len(df))), list(df.columns)
    random.shuffle(rows)
    random.shuffle(columns)
    panel = quiet_panel(df.iloc[rows][columns], futr_cols=["f"], event_cols=["q"])
    assert panel.schema == expected.schema
    for item, name in enumerate(panel.item_ids):
        there = expected.item_ids.tolist().index(name)
        np.testing.assert_array_equal(panel.item(item), expected.item(there))
        assert panel.starts[item] == expected.starts[there]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_the_callers_frames_are_never_changed(library, rng):
    df = rich_frame(rng).sample(frac=1, random_state=1)
    log = pd.DataFrame({"unique_id": ["b0"], "ds": [pd.Timestamp("2024-01-01 02:30")], "type": ["t"]})
    static = pd.DataFrame({"unique_id": ["b0", "a1", "b2"], "k": ["u", "v", "w"]})
    frames: list[Any] = [df, log, static]
    if library == "polars":
        frames = [pl.from_pandas(f) for f in frames]
    copies = [f.copy() if library == "pandas" else f.clone() for f in frames]
    panel = quiet_panel(frames[0], futr_cols=["f"], events=frames[1], static_df=frames[2])
    panel.values[:] = 0
    for frame, copy in zip(frames, copies, strict=True):
        (pd.testing.assert_frame_equal if library == "pandas" else pl.testing.assert_frame_equal)(frame, copy)


def test_read_only_columns_are_fine_and_stay_unchanged():
    values = np.arange(5.0)
    df = pd.DataFrame({"ds": pd.date_range("2024", periods=5, freq="h"), "y": values}, copy=False)
    values.setflags(write=False)
    to_panel(df).values[:] = -1
    assert values.tolist() == [0, 1, 2, 3, 4]


def test_the_schema_survives_json(rng):
    log = pd.DataFrame({"unique_id": ["b0"], "ds": [pd.Timestamp("2024-01-01 02:30")], "type": ["t"]})
    panel = quiet_panel(rich_frame(rng), futr_cols=["f"], events=log)
    schema = Schema.from_dict(json.loads(json.dumps(panel.schema.to_dict())))
    assert schema == panel.schema
    assert_same(quiet_panel(rich_frame(np.random.default_rng(20)), events=log, schema=schema), panel)


def test_predicting_reads_columns_by_name_and_ignores_others(rng):
    df = rich_frame(rng)
    fitted = quiet_panel(df, futr_cols=["f"])
    with pytest.warns(DataWarning, match=r"W-IGNORED: columns \['extra'\]"):
        later = to_panel(df[df.columns[::-1]].assign(extra=1), schema=fitted.schema)
    np.testing.assert_array_equal(later.values, fitted.values)
    assert later.schema == fitted.schema


def test_predicting_takes_new_items_single_rows_and_empty_targets():
    schema = to_panel(long_frame()).schema
    new = pd.DataFrame({"unique_id": ["new"], "ds": pd.to_datetime(["2030-05-05"]), "y": [np.nan]})
    panel = to_panel(new, schema=schema)
    assert panel.item_ids.tolist() == ["new"]
    assert panel.values.shape == (1, 1)


def test_polars_may_fit_and_pandas_predict(rng):
    df = rich_frame(rng)
    fitted = quiet_panel(pl.from_pandas(df))
    assert_same(quiet_panel(df, schema=fitted.schema), fitted)


def test_times_in_another_zone_are_the_same_instants():
    fitted = to_panel(long_frame(zone="Europe/Berlin"))
    there = long_frame(zone="Europe/Berlin")
    there["ds"] = there["ds"].dt.tz_convert("Asia/Tokyo")
    with pytest.warns(DataWarning, match="W-TZ"):
        assert_same(to_panel(there, schema=fitted.schema), fitted)


def test_duplicates_are_merged_when_asked():
    df = pd.concat([long_frame(1).assign(c="u"), long_frame(1).iloc[[1, 3]].assign(y=[10.0, np.nan], c="v")])
    mean = quiet_panel(df, duplicates="mean")
    assert mean.values[:, 0].tolist() == [0, 5.5, 2, 3, 4]
    assert mean.values[:, 1].tolist() == [1, 2, 1, 2, 1]
    last = quiet_panel(df, duplicates="last")
    np.testing.assert_array_equal(last.values[:, 0], [0, 10, 2, np.nan, 4])
    assert last.notes[0] == "W-DUP: 2 rows repeat an item and time; kept: last."


def test_bad_items_are_left_out_when_asked():
    df = pd.concat(
        [
            long_frame(2),
            pd.DataFrame({"unique_id": "short", "ds": pd.to_datetime(["2024-01-01"]), "y": [1.0]}),
            long_frame(1).assign(unique_id="empty", y=np.nan),
        ]
    )
    df.loc[(df["unique_id"] == "a1") & (df["y"] == 7), "y"] = np.inf
    panel = quiet_panel(df, on_bad="skip")
    assert panel.item_ids.tolist() == ["b0", "a1"]
    np.testing.assert_array_equal(panel.values[:, 0], [0, 1, 2, 3, 4, 5, 6, np.nan, 8, 9])
    assert [n.split(":")[0] for n in panel.notes] == ["W-INF", "W-SKIP", "W-SKIP"]


def test_resolve_schema_is_that_of_the_panel():
    assert resolve_schema(long_frame().assign(x=range(10)), futr_cols=["x"]).indices("future") == [1]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_the_future_frame_round_trips(library):
    df = long_frame().assign(x=np.arange(10) % 3, a=[0.0, 1] * 5, c=list("uvuvuvuvuv"), p=np.arange(10) ** 2)
    log = pd.DataFrame({"unique_id": ["b0"], "ds": [pd.Timestamp("2024-01-01 02:30")], "type": ["t"]})
    frame = df if library == "pandas" else pl.from_pandas(df)
    panel = quiet_panel(frame, futr_cols=["x", "c"], action_cols=["a"], events=log)
    ahead = future_frame(panel, 3)
    if library == "polars":
        ahead = ahead.to_pandas()
    # what is not known ahead may be in the frame and is never read
    ahead = ahead.assign(x=range(6), c=list("uvuvuu"), a=1.0, t=[0, None, 2, 0, 0, 0], y="never", p=np.inf)
    futr = ahead.sample(frac=1, random_state=3)
    values = encode_future(panel, pl.from_pandas(futr) if library == "polars" else futr, h=3)
    assert values.shape == (2, 3, 6)
    names = [c.name for c in panel.schema.channels]
    assert names == ["y", "p", "c", "x", "a", "t"]
    assert np.isnan(values[:, :, :2]).all()
    np.testing.assert_array_equal(values[:, :, 2], [[1, 2, 1], [2, 1, 1]])
    np.testing.assert_array_equal(values[:, :, 3], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(values[:, :, 5], [[0, 0, 2], [0, 0, 0]])
    assert np.isnan(encode_future(panel, futr.drop(columns="t"), h=3)[:, :, 5]).all()


def test_items_may_end_at_different_times():
    df = long_frame().assign(x=np.arange(10)).drop(index=[8, 9])
    panel = to_panel(df, futr_cols=["x"])
    ahead = future_frame(panel, 2)
    assert ahead["ds"].dt.hour.tolist() == [5, 6, 3, 4]
    np.testing.assert_array_equal(encode_future(panel, ahead.assign(x=[1, 2, 3, 4]), h=2)[:, :, 1], [[1, 2], [3, 4]])


def test_other_rows_of_a_future_frame_are_left_out_with_a_warning():
    df = long_frame().assign(x=np.arange(10))
    panel = to_panel(df, futr_cols=["x"])
    futr = pd.concat([df[["unique_id", "ds", "x"]], future_frame(panel, 5).assign(x=range(10))])
    futr.loc[len(futr)] = ["other", pd.Timestamp("2024-01-01"), 0]
    futr.iloc[-1, 0] = "other"
    with pytest.warns(DataWarning, match="rows of unknown items, 8 rows in the history, 6 rows beyond|W-FUTURE"):
        values = encode_future(panel, futr, h=2)
    np.testing.assert_array_equal(values[:, :, 1], [[0, 1], [5, 6]])


def test_without_known_ahead_columns_no_future_frame_is_needed():
    panel = to_panel(long_frame())
    values = encode_future(panel, None, h=2)
    assert values.shape == (2, 2, 1) and np.isnan(values).all()
    assert np.isnan(encode_future(panel, future_frame(panel, 2), h=2)).all()


def test_irregular_items_read_the_next_rows():
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta([0, 7, 18, 39], unit="min")
    df = pd.DataFrame({"unique_id": "s", "ds": stamps, "y": [1.0, 2, 3, 4], "x": [0, 1, 2, 3]})
    panel = to_panel(df, futr_cols=["x"], irregular="native")
    futr = pd.DataFrame({"unique_id": "s", "ds": stamps[-1] + pd.to_timedelta([9, 2, 50], unit="min"), "x": [1, 2, 3]})
    with pytest.warns(DataWarning, match="1 rows beyond the horizon"):
        assert encode_future(panel, futr, h=2)[0, :, 1].tolist() == [2, 1]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_the_answer_is_stacked_by_item_target_and_step(library):
    df = long_frame(zone="Europe/Berlin").assign(z=1.0)
    panel = quiet_panel(df if library == "pandas" else pl.from_pandas(df), target=["y", "z"])
    numbers = np.arange(12.0).reshape(2, 2, 3)
    cutoff = panel.starts + np.timedelta64(4, "h")
    answer = forecast_frame(panel.schema, panel.item_ids, future_times(panel, 3), {"HAM": numbers}, cutoff=cutoff)
    assert isinstance(answer, pd.DataFrame if library == "pandas" else pl.DataFrame)
    if library == "polars":
        assert answer.schema["ds"] == pl.Datetime("ns", "Europe/Berlin")
        answer = answer.to_pandas()
    assert list(answer.columns) == ["unique_id", "ds", "target_name", "cutoff", "HAM"]
    assert answer["HAM"].tolist() == list(range(12))
    assert answer["target_name"].tolist() == ["y"] * 3 + ["z"] * 3 + ["y"] * 3 + ["z"] * 3
    assert answer["unique_id"].tolist() == ["b0"] * 6 + ["a1"] * 6
    assert str(answer["ds"].dtype) == str(answer["cutoff"].dtype) == "datetime64[ns, Europe/Berlin]"
    assert answer["ds"].dt.hour.tolist() == [5, 6, 7] * 4
    assert answer["cutoff"].dt.hour.tolist() == [4] * 12


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_split_by_time_and_by_steps(library):
    df = long_frame().sample(frac=1, random_state=0)
    frame = df if library == "pandas" else pl.from_pandas(df)
    train, test = split(frame, at="2024-01-01 03:00")
    assert type(train) is type(frame)
    assert (len(train), len(test)) == (6, 4)
    assert test["ds"].min() == datetime.datetime(2024, 1, 1, 3)
    train, test = split(frame, test_steps=2)
    assert (len(train), len(test)) == (6, 4)
    assert sorted(test["y"].to_list()) == [3, 4, 8, 9]


def test_split_reads_moments_in_the_zone_of_the_frame():
    df = long_frame(1, zone="Asia/Tokyo").set_index("ds")
    train, test = split(df, at="2024-01-01 03:00")
    assert (len(train), len(test)) == (3, 2)
    assert test.index[0] == pd.Timestamp("2024-01-01 03:00", tz="Asia/Tokyo")
    numbers = long_frame(1).assign(ds=range(5))
    assert len(split(numbers, at=4)[1]) == 1


@pytest.mark.parametrize(
    "arguments", [{}, {"at": "2024", "test_steps": 1}, {"test_steps": 0}, {"test_steps": 9}, {"at": "2030"}]
)
def test_a_split_that_splits_nothing_is_refused(arguments):
    with pytest.raises(DataError) as caught:
        split(long_frame(), **arguments)
    assert caught.value.code == "E-SPLIT"


def test_importing_the_package_imports_no_pandas():
    import subprocess
    import sys

    code = "import sys, hamts; assert not {'pandas', 'narwhals', 'polars'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arrow_backed_frames_are_read(rng):
    df = rich_frame(rng)
    arrow = df.convert_dtypes(dtype_backend="pyarrow")
    assert_same(quiet_panel(arrow, futr_cols=["f"]), quiet_panel(df, futr_cols=["f"]))
    nullable = df.convert_dtypes()
    assert_same(quiet_panel(nullable, futr_cols=["f"]), quiet_panel(df, futr_cols=["f"]))


def test_a_frame_may_have_a_row_index_of_any_kind(rng):
    df = rich_frame(rng)
    odd = df.set_axis(["x"] * len(df), axis=0)
    assert_same(quiet_panel(odd), quiet_panel(df))
