"""Calendar features of times: where a stamp lies in its hour, day, week, month and year, as points on circles."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hamts.data.clock import as_numbers, is_utc
from hamts.data.frequency import NS_PER_SECOND, clock_of
from hamts.data.panel import Frequency

__all__ = ["calendar_features", "calendar_periods", "supported_phases"]

# values that each gluonts feature can take; it maps them to [-.5, .5], both ends included
PERIODS = {
    "second_of_minute": 60,
    "minute_of_hour": 60,
    "hour_of_day": 24,
    "day_of_week": 7,
    "day_of_month": 31,
    "day_of_year": 366,
    "week_of_year": 53,
    "month_of_year": 12,
}

WEEK_DAYS, YEAR_DAYS = 7.0, 365.25
# a phase must have come round so often
TURNS = 3
DAYS = {
    "second_of_minute": 1 / 1440,
    "minute_of_hour": 1 / 24,
    "hour_of_day": 1.0,
    "day_of_week": 7.0,
    "day_of_month": 30.44,
    "day_of_year": 365.25,
    "week_of_year": 365.25,
    "month_of_year": 365.25,
}


def calendar_features(times: np.ndarray, frequency: Frequency, time_zone: str | None = None) -> np.ndarray:
    """sin and cos of 2 pi phase for each time feature that gluonts gives to this frequency, float32 [n, F].

    The phase of hour k is k / 24 and so on: gluonts divides by one less, which would make 23:00 and 00:00, or Sunday
    and Monday, the same point. Local time counts. F is the same for all times of one clock; 0 for integer ones.

    Args:
        times: [n] datetime64 (UTC where zoned), or integers.
    """
    times = np.asarray(times)
    if times.dtype.kind != "M":
        return np.zeros((len(times), 0), dtype=np.float32)
    codes, stamps = pd.factorize(as_numbers(times))
    index = pd.DatetimeIndex(stamps.view("M8[ns]"))
    if not is_utc(time_zone):
        index = index.tz_localize("UTC").tz_convert(time_zone)
    return _circles(index, _feature_alias(frequency))[codes]


def calendar_periods(frequency: Frequency) -> np.ndarray:
    """Days in one turn of each column of ``calendar_features``, float64 [F]; 0 columns for integer clocks."""
    from gluonts.time_feature import time_features_from_frequency_str

    if frequency.kind == "integer":
        return np.zeros(0)
    names = [feature.__name__ for feature in time_features_from_frequency_str(_feature_alias(frequency))]
    return np.repeat([DAYS[name] for name in names], 2)


def supported_phases(frequency: Frequency, days: float) -> np.ndarray:
    """Which columns of ``calendar_features`` so many days of data can tell from a date, bool [F].

    Phases up to a week need three turns. Longer ones need three years: together with hour and weekday, the day of a
    month or of a year points at one date of the past until the calendar has come round a few times.
    """
    periods = calendar_periods(frequency)
    needed = np.where(periods <= WEEK_DAYS, TURNS * periods, TURNS * YEAR_DAYS)
    return needed <= days


def _circles(index: pd.DatetimeIndex, alias: str) -> np.ndarray:
    from gluonts.time_feature import time_features_from_frequency_str

    columns = []
    for feature in time_features_from_frequency_str(alias):
        period = PERIODS[feature.__name__]
        phase = (np.asarray(feature(index), dtype=np.float64) + 0.5) * (period - 1) / period
        columns += [np.sin(2 * np.pi * phase), np.cos(2 * np.pi * phase)]
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(index), 0), dtype=np.float32)


def _feature_alias(frequency: Frequency) -> str:
    """The plain frequency whose features are used; irregular clocks have those of minutes."""
    if frequency.kind == "irregular":
        return "min"
    clock = clock_of(frequency.alias)
    if clock.family == "elapsed":
        minute = 60 * NS_PER_SECOND
        return "h" if clock.step >= 60 * minute else "min" if clock.step >= minute else "s"
    if clock.family == "day":
        return "D" if clock.step % 7 else "W"
    if clock.family == "month":
        return "YE" if clock.step % 12 == 0 else "QE" if clock.step % 3 == 0 else "ME"
    return {"business": "B", "semimonth": "W"}[clock.family]
