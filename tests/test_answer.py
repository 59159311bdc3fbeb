"""The way out: frames to fill in, known-ahead values, answers in the dialect of the user, and splits."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import polars as pl
import polars.testing
import pytest
from frames import long_frame, quiet_panel

from hamts.data.clock import future_times
from hamts.data.frame import encode_future, forecast_frame, future_frame, split, to_panel
from hamts.errors import DataError, DataWarning


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
