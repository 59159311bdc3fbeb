"""The time column of any frame -> int64: nanoseconds of UTC, or plain integers."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from hamts.data.columns import EXACT_INTEGER, Notes, dtype_name
from hamts.errors import DataError

__all__ = ["Times", "read_times"]

NS_PER_UNIT = {"D": 86_400 * 10**9, "s": 10**9, "ms": 10**6, "us": 1000, "ns": 1}
# 1980 to 2100 in seconds; the same in ms, us and ns
EPOCH_SECONDS = (3.15e8, 4.1e9)
MAX_INTEGER = 2**61


@dataclass(frozen=True)
class Times:
    """Time of every row.

    Attributes:
        values: int64 [rows], nanoseconds of UTC, or the integers of an integer clock.
        unit: resolution of the column (``ns``, ``us``, ``ms``, ``s``, ``D`` for dates), or its dtype for integer
            clocks.
        zone: name of the time zone, None for naive stamps and integers.
    """

    values: np.ndarray
    unit: str
    zone: str | None = None
    integer: bool = False


def read_times(column: nw.Series[Any], notes: Notes, *, name: str = "df") -> Times:
    """Read datetimes, dates, periods, ISO texts, or whole numbers.

    Raises DataError: E-NAT (missing times), E-TZ (mixed zones), E-DATE (unreadable, ambiguous or out of 1678-2262).
    """
    _refuse_missing(column, name)
    dtype = column.dtype
    if isinstance(dtype, nw.Datetime | nw.Date):
        times = _from_datetimes(column)
    elif dtype.is_integer():
        times = _from_integers(column, notes)
    elif dtype.is_float():
        times = _from_floats(column, notes)
    else:
        times = _from_objects(column, notes, name)
    if not times.integer:
        _note_epoch(times, column.name, notes)
    return times


def _refuse_missing(column: nw.Series[Any], name: str) -> None:
    missing = column.is_null()
    if column.dtype.is_float():
        missing = missing | column.is_nan()
    if missing.any():
        rows = np.flatnonzero(missing.to_numpy())
        raise DataError(
            "E-NAT",
            f"Every row of {name} needs a time. {len(rows)} rows have none.",
            column=column.name,
            rows=[f"row {i}" for i in rows[:5]],
            fix=f"{name}.dropna(subset=[{column.name!r}]), or fill them in.",
        )


def _from_datetimes(column: nw.Series[Any]) -> Times:
    native = column.to_native()
    if isinstance(native, pd.Series):
        index = pd.DatetimeIndex(native)
        zone = str(index.tz) if index.tz is not None else None
        if index.tz is not None:
            index = index.tz_convert("UTC").tz_localize(None)
        # pandas may have changed the unit of an arrow column on the way
        values, unit = index.to_numpy(), getattr(column.dtype, "time_unit", "D")
    else:
        zone = getattr(column.dtype, "time_zone", None)
        values, unit = native.to_numpy(), getattr(column.dtype, "time_unit", "D")
    return Times(_nanoseconds(values, column.name), unit, zone)


def _nanoseconds(values: np.ndarray, column: str) -> np.ndarray:
    """datetime64 of any unit -> int64 nanoseconds; E-DATE out of bounds."""
    unit = np.datetime_data(values.dtype)[0]
    factor = NS_PER_UNIT[unit]
    numbers = values.view("i8")
    if factor == 1:
        return numbers
    limit = np.iinfo(np.int64).max // factor
    outside = np.flatnonzero((numbers > limit) | (numbers < -limit))
    if len(outside):
        raise _date_error(
            column,
            "Times must lie between the years 1678 and 2262",
            [(i, values[i]) for i in outside[:5]],
            len(outside),
        )
    return numbers * factor


def _date_error(column: str, what: str, rows: list[tuple[int, Any]], count: int, fix: str = "") -> DataError:
    return DataError(
        "E-DATE",
        f"{what}. {count} rows do not.",
        column=column,
        rows=[f"row {i}: {value}" for i, value in rows],
        fix=fix or "Correct or drop these rows, or use an integer clock.",
    )


def _from_integers(column: nw.Series[Any], notes: Notes) -> Times:
    values = np.ascontiguousarray(column.to_numpy())
    # differences of any two must fit int64
    broken = np.flatnonzero((values > MAX_INTEGER) | (values < -MAX_INTEGER))
    if len(broken):
        found = [(i, values[i]) for i in broken[:5]]
        raise _date_error(column.name, "An integer clock must lie within 2**61 of 0", found, len(broken))
    values = values.astype(np.int64, copy=False)
    _note_epoch_integers(values, column.name, notes)
    return Times(values, dtype_name(column), integer=True)


def _from_floats(column: nw.Series[Any], notes: Notes) -> Times:
    values = np.asarray(column.to_numpy(), dtype=np.float64)
    broken = np.flatnonzero((values != np.floor(values)) | (np.abs(values) > EXACT_INTEGER))
    if len(broken):
        raise _date_error(
            column.name,
            "A clock of numbers must hold whole ones, exactly",
            [(i, values[i]) for i in broken[:5]],
            len(broken),
            fix="Use datetimes, or multiply to whole numbers.",
        )
    _note_epoch_integers(values.astype(np.int64), column.name, notes)
    return Times(values.astype(np.int64), dtype_name(column), integer=True)


def _note_epoch_integers(values: np.ndarray, column: str, notes: Notes) -> None:
    low, high = float(values.min()), float(values.max())
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)):
        if low >= EPOCH_SECONDS[0] * factor and high <= EPOCH_SECONDS[1] * factor:
            text = f"the integers in {column!r} look like Unix time; they are read as an integer clock. "
            notes.add("W-EPOCH", f"{text}For dates: pd.to_datetime(df[{column!r}], unit={unit!r}).")


def _note_epoch(times: Times, column: str, notes: Notes) -> None:
    low, high = (int(times.values.min()), int(times.values.max()))
    year_2200 = 7_258_118_400 * 10**9
    if (low >= 0 and high < 31 * NS_PER_UNIT["D"]) or low > year_2200:
        first = str(np.int64(low).view("M8[ns]"))[:19]
        text = f"all times in {column!r} lie in January 1970 or after 2200 (first: {first}); "
        notes.add("W-EPOCH", f"{text}were Unix seconds or milliseconds read with the wrong unit?")


def _from_objects(column: nw.Series[Any], notes: Notes, name: str) -> Times:
    native = column.to_native()
    if isinstance(native, pd.Series) and isinstance(native.dtype, pd.PeriodDtype):
        stamps = pd.DatetimeIndex(native.dt.to_timestamp())
        return Times(_nanoseconds(stamps.to_numpy(), column.name), stamps.unit)
    if isinstance(column.dtype, nw.Categorical | nw.Enum):
        column = column.cast(nw.String)
    values = pd.Series(np.asarray(column.to_numpy(), dtype=object), dtype=object)
    inferred = pd.api.types.infer_dtype(values, skipna=False)
    if inferred == "string":
        return _from_texts(values, column.name, name)
    if inferred == "integer" and values.abs().max() <= MAX_INTEGER:
        return _from_integers(nw.from_native(values.astype(np.int64).rename(column.name), series_only=True), notes)
    if inferred in ("datetime", "datetime64", "date"):
        return _from_stamps(values, column.name, name, is_date=inferred == "date")
    sample = [repr(v) for v in values.head(3)]
    raise DataError(
        "E-DATE",
        f"Times must be datetimes, ISO texts or whole numbers. Got {dtype_name(column)} such as {sample}.",
        column=column.name,
        fix=f"{name}[{column.name!r}] = pd.to_datetime({name}[{column.name!r}])",
    )


def _from_stamps(values: pd.Series, column: str, name: str, *, is_date: bool) -> Times:
    """Python datetimes, dates and pandas stamps in an object column."""
    zones = [None if is_date or v.tzinfo is None else str(v.tzinfo) for v in values]
    if len(set(zones)) > 1:
        raise _mixed_zones(column, name, zones)
    outside = [(row, v) for row, v in enumerate(values) if not 1678 <= v.year <= 2261]
    if outside:
        raise _date_error(column, "Times must lie between the years 1678 and 2262", outside, len(outside))
    index = pd.DatetimeIndex(values if is_date else list(values))
    if index.tz is not None:
        index = index.tz_convert("UTC").tz_localize(None)
    return Times(_nanoseconds(index.to_numpy(), column), "D" if is_date else index.unit, zones[0])


def _mixed_zones(column: str, name: str, zones: list[str | None]) -> DataError:
    first: dict[str | None, int] = {}
    for row, zone in enumerate(zones):
        first.setdefault(zone, row)
    return DataError(
        "E-TZ",
        f"All times must share one time zone. Got {sorted(str(z) for z in first)}.",
        column=column,
        rows=[f"row {row}: {zone or 'no zone'}" for zone, row in first.items()],
        fix=f"{name}[{column!r}] = pd.to_datetime({name}[{column!r}], utc=True).dt.tz_convert(zone), with your zone.",
    )


def _from_texts(values: pd.Series, column: str, name: str) -> Times:
    codes, texts = pd.factorize(values)
    zones = [_text_zone(text) for text in texts]
    if len(set(zones)) > 1:
        raise _mixed_zones(column, name, [zones[code] for code in codes])
    stamps = pd.to_datetime(pd.Series(texts, dtype=object), format="ISO8601", errors="coerce", utc=True)
    broken = stamps.isna().to_numpy()
    if broken.any():
        raise _unreadable(values, np.flatnonzero(broken[codes]), column, name)
    index = pd.DatetimeIndex(stamps).tz_localize(None)
    return Times(_nanoseconds(index.to_numpy(), column)[codes], index.unit, zones[0])


def _text_zone(text: str) -> str | None:
    found = re.search(r"\d(Z|[+-]\d{2}(?::?\d{2})?)$", text.strip())
    if not found or (found[1] != "Z" and ":" not in text[:-6]):
        return None
    if found[1] == "Z" or set(found[1]) <= set("+-0:"):
        return "UTC"
    sign, digits = found[1][0], found[1][1:].replace(":", "").ljust(4, "0")
    return f"UTC{sign}{digits[:2]}:{digits[2:]}"


def _unreadable(values: pd.Series, broken: np.ndarray, column: str, name: str) -> DataError:
    first = str(values.iloc[broken[0]])
    fix = f"{name}[{column!r}] = pd.to_datetime({name}[{column!r}], format=...)"
    what = "Texts in the time column must be ISO dates such as 2024-01-31 or 2024-01-31T13:00"
    found = re.match(r"\s*(\d{1,2})[./-](\d{1,2})[./-](\d{4})", first)
    if found and int(found[1]) <= 12 and int(found[2]) <= 12:
        day, month, year = int(found[1]), int(found[2]), int(found[3])
        readings = [datetime.date(year, month, day), datetime.date(year, day, month)]
        what += f". {first!r} could be {readings[0]} (day first) or {readings[1]} (month first)"
        fix = f"pd.to_datetime({name}[{column!r}], dayfirst=True), or dayfirst=False"
    return _date_error(column, what, [(i, values.iloc[i]) for i in broken[:5]], len(broken), fix)
