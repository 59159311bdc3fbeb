"""Frequencies: spelling, seasons, inference by vote, and the arithmetic of clocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from frames import quiet_panel
from hypothesis import given
from hypothesis import strategies as st

from hamts.data.calendar import calendar_features
from hamts.data.clock import future_times, lead_steps, step_times, steps_between
from hamts.data.frame import to_panel
from hamts.data.frequency import IRREGULAR, clock_of, legacy_alias, make_frequency, normalize_alias, period_alias
from hamts.data.panel import Dialect, Schema
from hamts.errors import DataError

ALIASES = [
    "s", "30s", "min", "5min", "15min", "h", "2h", "D", "2D", "B", "W-SUN", "W-WED", "2W-MON", "SMS", "SME", "MS", "ME",
    "BMS", "BME", "2MS", "QS-JAN", "QS-FEB", "QE-DEC", "QE-JAN", "QE-NOV", "BQE-DEC", "YS-JAN", "YS-APR", "YE-DEC",
    "YE-JUN", "2YS-JAN",
]  # fmt: skip
ZONES = ["UTC", "Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe"]


def schema_of(alias: str, zone: str | None = None) -> Schema:
    return Schema((), (), make_frequency(alias), Dialect("nixtla", "unique_id", "ds", "pandas", time_zone=zone))


def frame_of(*series: Any) -> pd.DataFrame:
    """One item for each series of times."""
    parts = [
        pd.DataFrame({"unique_id": f"s{i}", "ds": times, "y": np.arange(len(times)) * 1.5})
        for i, times in enumerate(series)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    ("spelled", "modern"),
    [
        ("H", "h"), ("T", "min"), ("15T", "15min"), ("S", "s"), ("L", "ms"), ("U", "us"), ("N", "ns"), ("M", "ME"),
        ("Q", "QE-DEC"), ("Y", "YE-DEC"), ("A-JUN", "YE-JUN"), ("AS", "YS-JAN"), ("BM", "BME"), ("BQ", "BQE-DEC"),
        ("SM", "SME"), ("W", "W-SUN"), ("w", "W-SUN"), ("d", "D"), ("b", "B"), ("2Q-MAR", "2QE-MAR"), ("1h", "h"),
        ("1mo", "MS"), ("1d", "D"), (" 15min ", "15min"), ("0.5h", "30min"), ("1h30min", "90min"),
        (pd.Timedelta("15min"), "15min"), (pd.Timedelta("1D"), "D"), (pd.Timedelta("7D"), "7D"),
        (pd.offsets.MonthEnd(), "ME"), (pd.offsets.Hour(2), "2h"), (1, "1"), (np.int64(5), "5"), ("10", "10"),
    ],
)  # fmt: skip
def test_every_spelling_becomes_the_modern_one(spelled, modern):
    assert normalize_alias(spelled) == modern
    assert normalize_alias(modern) == modern


@pytest.mark.parametrize("alias", ALIASES)
def test_the_legacy_spelling_comes_back_as_the_modern_one(alias):
    assert normalize_alias(legacy_alias(alias)) == alias


def test_periods_take_the_period_spelling():
    assert [period_alias(a) for a in ("MS", "ME", "QS-JAN", "YE-DEC", "h", "W-SUN")] == [
        "M",
        "M",
        "Q-JAN",
        "Y-DEC",
        "h",
        "W-SUN",
    ]


@pytest.mark.parametrize(
    "freq", [0, -1, "-1h", "0D", pd.Timedelta(0), "fortnight", "m", "15m", True, 1.5, [], "bh", "C", "SMS-10"]
)
def test_a_bad_frequency_is_refused_with_the_choices(freq):
    with pytest.raises(DataError) as caught:
        make_frequency(normalize_alias(freq))
    assert caught.value.code == "E-FREQ"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("alias", "season"),
    [
        ("s", 3600), ("5s", 720), ("min", 1440), ("5min", 288), ("15min", 96), ("30min", 48), ("h", 24), ("2h", 12),
        ("7h", 1), ("24h", 7), ("D", 7), ("2D", 1), ("7D", 52), ("B", 5), ("W-SUN", 52), ("SMS", 24), ("MS", 12),
        ("ME", 12), ("BME", 12), ("2MS", 6), ("QS-JAN", 4), ("QE-DEC", 4), ("YS-JAN", 1), ("YE-DEC", 1), ("ms", 1),
        ("1", 1), ("10", 1),
    ],
)  # fmt: skip
def test_seasons(alias, season):
    assert make_frequency(alias).season_steps == season


def test_a_day_holds_whole_steps_or_none():
    found = {a: make_frequency(a).steps_per_day for a in ("15min", "h", "7h", "D", "2D", "W-SUN", "ME", "3")}
    assert found == {"15min": 96, "h": 24, "7h": 0, "D": 1, "2D": 0, "W-SUN": 0, "ME": 0, "3": 0}


@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
@pytest.mark.parametrize("alias", ALIASES)
def test_the_frequency_is_found_despite_a_gap_and_a_short_item(alias, zone):
    long = pd.date_range("2019-03-28", periods=40, freq=alias, tz=zone)
    panel = quiet_panel(frame_of(long.delete([7, 8]), long[3:5]))
    # QE-JAN and QE-OCT are two names of one clock
    assert clock_of(panel.schema.frequency.alias) == clock_of(alias)
    assert panel.lengths.tolist() == [40, 2]
    assert np.isnan(panel.values[[7, 8], 0]).all()


@pytest.mark.parametrize("step", [1, 5])
def test_integer_clocks_are_found(step):
    panel = quiet_panel(frame_of(np.arange(0, 100 * step, step), np.array([3, 3 + step, 3 + 3 * step])))
    assert (panel.schema.frequency.kind, panel.schema.frequency.alias) == ("integer", str(step))
    assert panel.lengths.tolist() == [100, 4]
    assert panel.starts.tolist() == [0, 3]


def test_two_rows_are_enough():
    assert quiet_panel(frame_of(pd.date_range("2020", periods=2, freq="ME"))).schema.frequency.alias == "ME"
    assert quiet_panel(frame_of(pd.date_range("2020", periods=2, freq="36h"))).schema.frequency.alias == "36h"


def test_weekdays_without_a_weekend_between_are_days():
    assert quiet_panel(frame_of(pd.date_range("2024-01-01", periods=5, freq="D"))).schema.frequency.alias == "D"


def test_weeks_on_different_weekdays_are_seven_days():
    weekly = [pd.date_range("2024-01-01", periods=9, freq=f"W-{day}") for day in ("MON", "THU")]
    assert quiet_panel(frame_of(*weekly)).schema.frequency.alias == "7D"


def test_items_may_start_off_the_hour():
    quarter_past = pd.date_range("2024-01-01 00:15", periods=5, freq="h")
    panel = quiet_panel(frame_of(quarter_past, quarter_past + pd.Timedelta("7min")))
    assert panel.schema.frequency.alias == "h"


def test_local_hours_across_a_clock_change_have_no_gap():
    stamps = pd.date_range("2024-10-26", "2024-10-29", freq="h", tz="Europe/Berlin")
    panel = quiet_panel(frame_of(stamps))
    assert panel.lengths.tolist() == [len(stamps)]
    assert not np.isnan(panel.values).any()


def test_a_given_frequency_is_checked_and_the_right_one_named():
    df = frame_of(pd.date_range("2024-01-01", periods=9, freq="MS"))
    with pytest.raises(DataError) as caught:
        to_panel(df, freq="M")
    assert caught.value.code == "E-FREQ"
    assert "'ME'" in caught.value.message and "31 days 00:00:00 x 5" in caught.value.message
    assert "'MS'" in caught.value.fix
    assert caught.value.rows[0].startswith("'s0' at 2024-01-01")
    assert to_panel(df, freq="MS").schema.frequency.alias == "MS"


@pytest.mark.parametrize(
    ("freq", "hint"), [("min", "too fine"), ("2h", "not on the clock"), (1, "holds dates"), ("W", "W-SUN")]
)
def test_a_frequency_that_does_not_fit_is_refused(freq, hint):
    with pytest.raises(DataError, match=hint) as caught:
        to_panel(frame_of(pd.date_range("2024-01-01", periods=9, freq="h")), freq=freq)
    assert caught.value.code == "E-FREQ"


def test_a_calendar_frequency_on_integers_is_refused():
    with pytest.raises(DataError, match="whole numbers"):
        to_panel(frame_of(np.arange(5)), freq="h")


def test_a_frequency_given_for_a_sparse_frame_makes_gaps():
    stamps = pd.date_range("2024-01-01", periods=100, freq="D")[[0, 1, 30, 60, 99]]
    assert quiet_panel(frame_of(stamps), freq="D").lengths.tolist() == [100]


def test_irregular_rows_are_refused_with_their_differences():
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta([0, 7, 18, 39, 41, 90], unit="min")
    with pytest.raises(DataError) as caught:
        to_panel(frame_of(stamps))
    assert caught.value.code == "E-FREQ"
    assert "0 days 00:02:00 x 1" in caught.value.message
    assert "native" in caught.value.fix


def test_a_clock_with_more_gaps_than_rows_is_only_taken_when_named():
    stamps = pd.date_range("2024-01-01", periods=100, freq="h")[[0, 1, 5, 9, 10, 14, 60, 99]]
    with pytest.raises(DataError) as caught:
        to_panel(frame_of(stamps))
    assert caught.value.code == "E-FREQ"
    assert "All rows lie on 'h', but only 29% of the differences" in caught.value.message
    assert "freq='h'" in caught.value.fix
    assert quiet_panel(frame_of(stamps), freq="h").lengths.tolist() == [100]


def test_irregular_rows_are_taken_as_they_are_when_asked():
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta([0, 7, 18, 39, 41, 90], unit="min")
    panel = to_panel(frame_of(stamps, stamps[2:]), irregular="native")
    assert panel.schema.frequency == IRREGULAR
    assert panel.lengths.tolist() == [6, 4]
    np.testing.assert_array_equal(panel.times, np.concatenate([stamps, stamps[2:]]))
    # gaps of 7, 11, 21, 2 and 49 minutes
    assert future_times(panel, 1)[0, 0] == np.datetime64("2024-01-01T01:41")
    with pytest.raises(DataError, match="irregular"):
        step_times(panel, panel.starts, np.arange(2))


@pytest.mark.parametrize("other", ["2h", "30min", "D"])
def test_items_with_their_own_frequency_are_named(other):
    hourly = pd.date_range("2024-01-01", periods=50, freq="h")
    with pytest.raises(DataError) as caught:
        to_panel(frame_of(hourly, hourly, pd.date_range("2024-01-01", periods=9, freq=other)))
    assert caught.value.code == "E-FREQ-MIX"
    assert caught.value.series == ["s2"]
    assert "'s0', 's1'" in caught.value.message


@st.composite
def clock_cases(draw: Any) -> tuple[str, str | None, pd.DatetimeIndex]:
    alias = draw(st.sampled_from(ALIASES))
    zone = draw(st.sampled_from([None, *ZONES]))
    first = pd.Timestamp("1990-01-01") + pd.Timedelta(hours=draw(st.integers(0, 40 * 8766)))
    if alias not in ("s", "30s", "min", "5min", "15min", "h", "2h"):
        first = first.normalize()
    return alias, zone, pd.date_range(first, periods=60, freq=alias)


@given(clock_cases())
def test_steps_and_times_are_inverse(case):
    alias, zone, naive = case
    schema, steps = schema_of(alias, zone), np.arange(-20, 40)
    start = naive[20]
    if zone is not None:
        start = start.tz_localize(zone, ambiguous=True, nonexistent="shift_forward").tz_convert("UTC").tz_localize(None)
    times = step_times(schema, np.datetime64(start), steps)
    assert (np.diff(times) > np.timedelta64(0)).all()
    np.testing.assert_array_equal(steps_between(schema.frequency, np.datetime64(start), times, time_zone=zone), steps)
    if zone in (None, "UTC"):
        np.testing.assert_array_equal(times, naive.to_numpy())


@given(st.sampled_from(["D", "MS", "W-MON", "B", "h", "15min"]), st.sampled_from(ZONES), st.integers(0, 2000))
def test_zoned_clocks_step_as_pandas_does(alias, zone, day):
    index = pd.date_range(pd.Timestamp("2015-01-01 12:00") + pd.Timedelta(days=day), periods=50, freq=alias, tz=zone)
    start = np.datetime64(index[0].tz_convert("UTC").tz_localize(None))
    times = step_times(schema_of(alias, zone), start, np.arange(50))
    np.testing.assert_array_equal(times, index.tz_convert("UTC").tz_localize(None).to_numpy())


def test_days_keep_their_local_hour_and_hours_their_length():
    start = np.datetime64("2024-03-30T00:00")  # 01:00 in Berlin, the day before clocks go forward
    days = step_times(schema_of("D", "Europe/Berlin"), start, np.arange(3))
    assert days.astype("M8[h]").astype(str).tolist() == ["2024-03-30T00", "2024-03-31T00", "2024-03-31T23"]
    hours = step_times(schema_of("24h", "Europe/Berlin"), start, np.arange(3))
    assert hours.astype("M8[h]").astype(str).tolist() == ["2024-03-30T00", "2024-03-31T00", "2024-04-01T00"]


def test_a_local_midnight_that_does_not_exist_is_on_the_clock():
    midnights = pd.date_range("2015-10-10", periods=20, freq="D").tz_localize(
        "America/Sao_Paulo", nonexistent="shift_forward"
    )
    panel = quiet_panel(frame_of(midnights))
    assert panel.schema.frequency.alias == "D"
    assert panel.lengths.tolist() == [20]


def test_times_off_the_clock_are_refused():
    with pytest.raises(DataError, match="not on the clock 'h'") as caught:
        steps_between(make_frequency("h"), np.datetime64("2024-01-01"), np.array(["2024-01-01T00:30"], dtype="M8[m]"))
    assert caught.value.rows == ("2024-01-01 00:30:00",)


def test_three_centuries_fit():
    years = quiet_panel(frame_of(pd.date_range("1700", "2008", freq="YS")))
    assert (years.schema.frequency.alias, years.lengths.tolist()) == ("YS-JAN", [309])
    days = pd.date_range("1700", "2008", freq="D").delete(1000)
    panel = quiet_panel(frame_of(days))
    assert (panel.schema.frequency.alias, panel.lengths.tolist()) == ("D", [len(days) + 1])
    assert future_times(panel, 1)[0, 0] == np.datetime64("2008-01-02")


def test_integer_steps():
    schema = schema_of("5")
    assert step_times(schema, np.array([[10], [11]]), np.arange(3)).tolist() == [[10, 15, 20], [11, 16, 21]]
    assert steps_between(schema.frequency, np.array([10]), np.array([25])).tolist() == [3]


@pytest.mark.parametrize(
    ("start", "zone", "freq", "patch", "lead"),
    [
        ("2024-01-01 05:00", None, "h", 12, 5),
        ("2024-01-01 05:00", None, "h", 24, 5),
        ("2024-01-01 05:00", None, "h", 48, 5),
        ("2024-01-01 05:00", None, "h", 7, 0),
        ("2024-01-01 05:07", None, "15min", 96, 20),
        ("2024-01-01 05:00", "Asia/Tokyo", "h", 24, 5),
        ("2024-03-31 05:00", "Europe/Berlin", "h", 24, 5),
        ("2024-01-01", None, "D", 7, 0),
        ("2024-01-01 05:00", None, "7h", 8, 0),
    ],
)
def test_patches_begin_at_local_midnight_where_they_fit_the_day(start, zone, freq, patch, lead):
    panel = quiet_panel(frame_of(pd.date_range(start, periods=4, freq=freq, tz=zone)), freq=freq)
    assert lead_steps(panel, patch).tolist() == [lead]


def test_integer_clocks_have_no_day():
    assert lead_steps(quiet_panel(frame_of(np.arange(5, 9))), 4).tolist() == [0]


@pytest.mark.parametrize(
    ("alias", "columns"),
    [
        ("s", 12), ("15min", 10), ("h", 8), ("D", 6), ("B", 6), ("W-SUN", 4), ("SMS", 4), ("MS", 2), ("QE-DEC", 2),
        ("YS-JAN", 0), ("6MS", 2), ("7D", 4), ("ms", 12),
    ],
)  # fmt: skip
def test_calendar_features_are_points_on_circles(alias, columns):
    times = pd.date_range("2020-02-28", periods=50, freq=alias).to_numpy()
    features = calendar_features(times, make_frequency(alias), None)
    assert features.shape == (50, columns)
    assert features.dtype == np.float32
    pairs = features.reshape(50, -1, 2)
    np.testing.assert_allclose((pairs**2).sum(axis=-1), 1, atol=1e-6)
    assert calendar_features(times[:0], make_frequency(alias), None).shape == (0, columns)


def test_no_two_hours_or_weekdays_are_the_same_point():
    hours = calendar_features(np.arange("2024-01-01", "2024-01-08", dtype="M8[h]"), make_frequency("h"), None)
    assert len(np.unique(hours[:, :2].round(4), axis=0)) == 24
    assert len(np.unique(hours[:, 2:4].round(4), axis=0)) == 7
    np.testing.assert_allclose(hours[6, :2], [1, 0], atol=1e-6)  # 06:00 is a quarter of the day


def test_calendar_features_are_those_of_local_time():
    utc = np.arange("2024-06-01", "2024-06-03", dtype="M8[h]")
    there = calendar_features(utc, make_frequency("h"), "Asia/Tokyo")
    np.testing.assert_array_equal(there, calendar_features(utc + np.timedelta64(9, "h"), make_frequency("h"), None))


def test_integer_clocks_have_no_calendar():
    assert calendar_features(np.arange(5), make_frequency("1"), None).shape == (5, 0)
    assert calendar_features(np.arange(5), IRREGULAR, None).shape == (5, 0)
