"""Frames of every dialect, library and dtype -> Panel."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import polars.testing
import pytest
from frames import assert_same, long_frame, quiet_panel, rich_frame
from hypothesis import given
from hypothesis import strategies as st

from hamts.data.clock import future_times
from hamts.data.frame import forecast_frame, future_frame, resolve_schema, to_panel
from hamts.data.panel import Schema
from hamts.errors import DataWarning


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


def test_a_named_time_index_is_the_time_of_a_long_frame():
    df = long_frame().rename(columns={"ds": "when"})
    panel = to_panel(df.set_index("when"))
    assert panel.schema.dialect.time_column == "when"
    assert_same(panel, to_panel(df, time_col="when"))
    assert_same(to_panel(df.set_index("when"), schema=panel.schema), panel)


def test_an_index_beside_a_time_column_is_not_read():
    df = long_frame()
    there = df.set_index(pd.DatetimeIndex(df["ds"] + pd.Timedelta("9h"), name="local"))
    assert_same(to_panel(there), to_panel(df))


def test_whole_numbers_in_an_object_column_are_a_clock():
    panel = to_panel(long_frame(1).assign(ds=pd.Series([3, 4, 5, 6, 7], dtype=object)))
    assert (panel.schema.frequency.kind, panel.starts.tolist()) == ("integer", [3])


def test_encoding_holds_less_than_four_times_the_frame():
    n_items, steps = 200, 1000
    ids = np.repeat(np.array([f"item_{i}" for i in range(n_items)], dtype=object), steps)
    stamps = np.tile(pd.date_range("2024", periods=steps, freq="h").to_numpy(), n_items)
    df = pd.DataFrame({"unique_id": ids, "ds": stamps, "y": np.ones(len(ids))})
    to_panel(df)
    tracemalloc.start()
    to_panel(df)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # ids, times and values of 8 bytes each; measured 2.3 times that
    assert peak < 4 * 24 * len(df)


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


# pandas 3 makes microseconds where pandas 2 makes nanoseconds
STAMPS = pd.date_range("2024-03-01", periods=4, freq="D").as_unit("ns")
ZONED = STAMPS.tz_localize("Asia/Tokyo")
# the unit of what had none of its own
PARSED = np.datetime_data(pd.to_datetime(["2024-03-01"]).dtype)[0]
TIMES = {
    "datetime64[s]": (lambda: pd.Series(STAMPS.as_unit("s")), "s", None),
    "datetime64[ms]": (lambda: pd.Series(STAMPS.as_unit("ms")), "ms", None),
    "datetime64[us]": (lambda: pd.Series(STAMPS.as_unit("us")), "us", None),
    "datetime64[ns]": (lambda: pd.Series(STAMPS), "ns", None),
    "texts": (lambda: STAMPS.strftime("%Y-%m-%d").to_series(index=range(4)), PARSED, None),
    "texts with T": (lambda: STAMPS.strftime("%Y-%m-%dT%H:%M:%S").to_series(index=range(4)), PARSED, None),
    "texts with Z": (lambda: STAMPS.strftime("%Y-%m-%dT%H:%MZ").to_series(index=range(4)), PARSED, "UTC"),
    "texts with offset": (lambda: pd.Series(STAMPS.strftime("%Y-%m-%dT%H:%M+02:00")), PARSED, "UTC+02:00"),
    "string dtype": (lambda: pd.Series(STAMPS.strftime("%Y-%m-%d"), dtype="string[pyarrow]"), PARSED, None),
    "periods": (lambda: pd.Series(STAMPS.to_period("D")), PARSED, None),
    "python datetimes": (lambda: pd.Series(list(STAMPS.to_pydatetime()), dtype=object), PARSED, None),
    "python dates": (lambda: pd.Series(list(STAMPS.date), dtype=object), "D", None),
    "arrow dates": (lambda: pd.Series(list(STAMPS.date), dtype="date32[day][pyarrow]"), "D", None),
    "arrow stamps": (lambda: pd.Series(STAMPS).astype("timestamp[ms][pyarrow]"), "ms", None),
    "zoned": (lambda: pd.Series(ZONED), "ns", "Asia/Tokyo"),
    "arrow zoned": (lambda: pd.Series(ZONED).astype("timestamp[us, tz=Asia/Tokyo][pyarrow]"), "us", "Asia/Tokyo"),
    "zoned objects": (lambda: pd.Series(list(ZONED), dtype=object), "ns", "Asia/Tokyo"),
    "categories of texts": (lambda: pd.Series(STAMPS.strftime("%Y-%m-%d")).astype("category"), PARSED, None),
    "polars dates": (lambda: pl.Series(list(STAMPS.date)), "D", None),
    "polars us": (lambda: pl.Series(list(STAMPS)).cast(pl.Datetime("us")), "us", None),
    "polars zoned": (lambda: pl.Series(list(ZONED)).dt.cast_time_unit("ms"), "ms", "Asia/Tokyo"),
    "polars texts": (lambda: pl.Series(list(STAMPS.strftime("%Y-%m-%d"))), PARSED, None),
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
    with pytest.warns(DataWarning, match=r"W-IGNORED: columns \['extra'\]|W-GAP"):
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


def test_numbers_in_an_object_column_are_numbers_as_ids():
    df = long_frame()
    df["unique_id"] = pd.Series([7] * 5 + [3] * 5, dtype=object)
    fitted = to_panel(df)
    assert (fitted.item_ids.tolist(), fitted.schema.dialect.id_dtype) == ([7, 3], "int64")
    assert_same(to_panel(df, schema=fitted.schema), fitted)
    assert_same(to_panel(df.astype({"unique_id": int}), schema=fitted.schema), fitted)
