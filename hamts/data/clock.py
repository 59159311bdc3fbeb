"""Arithmetic on clocks: from a start and a number of steps to a time, and back. Vectorised, no loop over items.

Inside, times are int64: nanoseconds of UTC for calendars, plain numbers for integer clocks. Fixed steps shorter than a
day add elapsed time; days, weeks, months and longer count in the local calendar of the stream's zone, and keep its
time of day.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from hamts.data.frequency import NS_PER_DAY, Clock, clock_of
from hamts.data.panel import Frequency, Panel, Schema
from hamts.errors import DataError

__all__ = ["future_times", "lead_steps", "step_times", "steps_between"]


def to_local(times: np.ndarray, zone: str | None) -> np.ndarray:
    """UTC nanoseconds -> wall-clock nanoseconds in ``zone``; unchanged without one. Any shape."""
    if is_utc(zone):
        return times
    # items share their stamps: each is converted once
    codes, stamps = pd.factorize(times.ravel())
    index = pd.DatetimeIndex(stamps.view("M8[ns]")).tz_localize("UTC").tz_convert(zone)
    return index.tz_localize(None).as_unit("ns").asi8[codes].reshape(times.shape)


def to_utc(times: np.ndarray, zone: str | None) -> np.ndarray:
    """Wall-clock nanoseconds -> UTC nanoseconds: the first of two readings, and forward out of a gap."""
    if is_utc(zone):
        return times
    codes, stamps = pd.factorize(times.ravel())
    first_reading = np.ones(len(stamps), dtype=bool)
    index = pd.DatetimeIndex(stamps.view("M8[ns]"))
    index = index.tz_localize(zone, ambiguous=first_reading, nonexistent="shift_forward").tz_convert("UTC")
    return index.tz_localize(None).as_unit("ns").asi8[codes].reshape(times.shape)


def is_utc(zone: str | None) -> bool:
    """Whether wall clock and UTC are the same thing (no zone, or UTC itself)."""
    return zone in (None, "UTC", "Etc/UTC", "GMT", "UTC+00:00")


def as_numbers(times: Any) -> np.ndarray:
    """datetime64 of any unit or integers -> int64 (nanoseconds, or the integers)."""
    times = np.asarray(times)
    if times.dtype.kind == "M":
        return times.astype("M8[ns]").view("i8")
    return times.astype(np.int64)


def as_times(numbers: np.ndarray, *, integer: bool) -> np.ndarray:
    """int64 -> datetime64[ns], or unchanged for integer clocks."""
    return numbers if integer else np.ascontiguousarray(numbers).view("M8[ns]")


def show_times(numbers: np.ndarray, *, integer: bool, zone: str | None = None) -> list[str]:
    """int64 times as a user would write them, in local time where there is a zone."""
    if integer:
        return [str(number) for number in np.asarray(numbers).tolist()]
    index = pd.DatetimeIndex(as_times(np.asarray(numbers), integer=False))
    if zone is not None:
        index = index.tz_localize("UTC").tz_convert(zone)
    return [str(stamp) for stamp in index]


def effective_clock(frequency: Frequency, zone: str | None) -> Clock:
    """Clock of a frequency; days without a zone are elapsed time, which is cheaper."""
    clock = clock_of(frequency.alias)
    if clock.family == "day" and is_utc(zone):
        return Clock("elapsed", clock.step * NS_PER_DAY)
    return clock


def advance(clock: Clock, starts: np.ndarray, steps: np.ndarray, zone: str | None) -> np.ndarray:
    """Time ``steps`` after ``starts``, both int64 and broadcast against each other."""
    if clock.family in ("integer", "elapsed"):
        return starts + steps * clock.step
    local = to_local(starts, zone)
    time_of_day = local % NS_PER_DAY
    days = _days_of(clock, _ordinals(clock, local) + steps * clock.step)
    return to_utc(days * NS_PER_DAY + time_of_day, zone)


def locate(clock: Clock, starts: np.ndarray, times: np.ndarray, zone: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Number of whole steps from ``starts`` to ``times`` (rounded down), and whether each time lies on the clock."""
    if clock.family in ("integer", "elapsed"):
        return _locate_elapsed(clock.step, starts, times)
    local_starts, local = to_local(starts, zone), to_local(times, zone)
    steps = (_ordinals(clock, local) - _ordinals(clock, local_starts)) // clock.step
    reached = advance(clock, starts, steps, zone)
    steps = steps - (reached > times)
    steps = steps + (advance(clock, starts, steps + 1, zone) <= times)
    return steps, advance(clock, starts, steps, zone) == times


def _locate_elapsed(step: int, starts: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not times.size or int(times.max()) - int(starts.min()) < np.iinfo(np.int64).max:
        steps, rest = np.divmod(times - starts, step)
        return steps, rest == 0
    # more than 292 years of nanoseconds do not fit: divide first
    steps, rest = np.divmod(times, step)
    first, rest_of_first = np.divmod(starts, step)
    return steps - first - (rest < rest_of_first), rest == rest_of_first


def _ordinals(clock: Clock, local: np.ndarray) -> np.ndarray:
    """Count of calendar units since 1970; exact on the clock's own stamps, within one of the truth elsewhere."""
    days = local // NS_PER_DAY
    if clock.family == "day":
        return days
    dates = days.astype("M8[D]")
    if clock.family == "business":
        return np.busday_count("1970-01-01", dates).astype(np.int64)
    months = dates.astype("M8[M]")
    if clock.family == "month":
        return months.astype(np.int64)
    day_of_month = (dates - months.astype("M8[D]")).astype(np.int64) + 1
    is_second = day_of_month >= 15 if clock.position == "start" else _is_month_end(dates)
    return 2 * months.astype(np.int64) + is_second


def _is_month_end(dates: np.ndarray) -> np.ndarray:
    return (dates + 1).astype("M8[M]") != dates.astype("M8[M]")


def _days_of(clock: Clock, ordinals: np.ndarray) -> np.ndarray:
    """Inverse of ``_ordinals``: days since 1970 of each stamp."""
    if clock.family == "day":
        return ordinals
    if clock.family == "business":
        dates = np.busday_offset("1970-01-01", ordinals, roll="forward")
    elif clock.family == "semimonth":
        dates = _half_month(clock, ordinals)
    else:
        dates = _month_stamp(clock, ordinals.astype("M8[M]"))
    return dates.astype(np.int64)


def _half_month(clock: Clock, ordinals: np.ndarray) -> np.ndarray:
    months = (ordinals // 2).astype("M8[M]")
    first, second = months.astype("M8[D]"), months.astype("M8[D]") + 14
    if clock.position == "end":
        first, second = second, (months + 1).astype("M8[D]") - 1
    return np.where(ordinals % 2 == 0, first, second)


def _month_stamp(clock: Clock, months: np.ndarray) -> np.ndarray:
    if clock.position.endswith("start"):
        dates = months.astype("M8[D]")
        return np.busday_offset(dates, 0, roll="forward") if clock.position.startswith("business") else dates
    dates = (months + 1).astype("M8[D]") - 1
    return np.busday_offset(dates, 0, roll="backward") if clock.position.startswith("business") else dates


def is_anchored(clock: Clock, starts: np.ndarray, zone: str | None) -> np.ndarray:
    """Whether each start is a stamp of this very clock (right weekday, right month), [I] bool."""
    if clock.anchor < 0:
        return np.ones(starts.shape, dtype=bool)
    local = to_local(starts, zone)
    if clock.family == "day":
        return (local // NS_PER_DAY + 3) % 7 == clock.anchor
    return local.astype("M8[ns]").astype("M8[M]").astype(np.int64) % clock.every == clock.anchor


def step_times(of: Panel | Schema, starts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Time of each step, past or future.

    Args:
        of: whose frequency and zone count.
        starts: time of step 0, datetime64 (UTC where zoned) or int64, any shape.
        steps: whole numbers, broadcast against ``starts``; negative ones go back.

    Returns: datetime64[ns] or int64 in the broadcast shape. Raises DataError E-FREQ on an irregular clock.
    """
    schema = of.schema if isinstance(of, Panel) else of
    _refuse_irregular(schema.frequency)
    zone = schema.dialect.time_zone
    clock = effective_clock(schema.frequency, zone)
    starts, steps = np.broadcast_arrays(as_numbers(starts), np.asarray(steps, dtype=np.int64))
    return as_times(advance(clock, starts, steps, zone), integer=clock.family == "integer")


def steps_between(
    frequency: Frequency, starts: np.ndarray, times: np.ndarray, *, time_zone: str | None = None
) -> np.ndarray:
    """Whole steps from ``starts`` to ``times``, int64 in their broadcast shape: the inverse of ``step_times``.

    Raises DataError E-FREQ where a time is not on the clock of its start, or the clock is irregular.
    """
    _refuse_irregular(frequency)
    starts, times = np.broadcast_arrays(as_numbers(starts), as_numbers(times))
    clock = effective_clock(frequency, time_zone)
    steps, on_clock = locate(clock, starts, times, time_zone)
    if not on_clock.all():
        off = times[~on_clock][:5]
        raise DataError(
            "E-FREQ",
            f"{int((~on_clock).sum())} times are not on the clock {frequency.alias!r} of their item.",
            rows=show_times(off, integer=clock.family == "integer", zone=time_zone),
            fix="Pass times that lie a whole number of steps after the item's first row.",
        )
    return steps


def _refuse_irregular(frequency: Frequency) -> None:
    if frequency.kind == "irregular":
        raise DataError(
            "E-FREQ", "An irregular clock has no steps to count.", fix="Use Panel.times, or pass the times."
        )


def future_times(panel: Panel, h: int) -> np.ndarray:
    """Times of the ``h`` steps after the end of each item, [I, h].

    An irregular clock has no true answer; there each item goes on by the median of its own gaps (1 where it has one
    row).
    """
    ahead = np.arange(h, dtype=np.int64)
    if panel.times is None:
        return step_times(panel, panel.starts[:, None], panel.lengths[:, None] + ahead)
    integer = panel.times.dtype.kind != "M"
    times = as_numbers(panel.times)
    gaps = [
        np.median(np.diff(times[a:b])) if b - a > 1 else 1
        for a, b in zip(panel.offsets, panel.offsets[1:], strict=False)
    ]
    gap = np.maximum(1, np.asarray(gaps)).astype(np.int64)
    return as_times(times[panel.offsets[1:] - 1][:, None] + gap[:, None] * (ahead + 1), integer=integer)


def lead_steps(panel: Panel, patch_steps: int) -> np.ndarray:
    """Steps between the origin of each item's patch grid and its first row, int64 [I].

    The origin is the local midnight at or before the first row, where days hold a whole number of steps and patches
    fit days (or days fit patches); else the first row itself. Wall-clock time counts, so that patches begin at
    midnight outside of DST changes.
    """
    frequency, zone = panel.schema.frequency, panel.schema.dialect.time_zone
    per_day = frequency.steps_per_day
    if per_day <= 1 or (per_day % patch_steps and patch_steps % per_day):
        return np.zeros(panel.n_items, dtype=np.int64)
    local = to_local(as_numbers(panel.starts), zone)
    return (local % NS_PER_DAY) // (NS_PER_DAY // per_day)
