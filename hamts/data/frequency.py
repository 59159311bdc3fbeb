"""Frequencies: one spelling, one season, one clock for each.

``normalize_alias`` turns every spelling (legacy ``H``, polars ``1mo``, an offset, a timedelta, an integer) into the
modern pandas one; ``make_frequency`` adds season and day; ``clock_of`` says how the clock counts (see ``clock.py``).
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import pandas as pd
from pandas.tseries import offsets
from pandas.tseries.frequencies import to_offset

from hamts.data.panel import Frequency
from hamts.errors import DataError

__all__ = ["Clock", "clock_of", "legacy_alias", "make_frequency", "normalize_alias", "period_alias", "season_of"]

NS_PER_SECOND = 1_000_000_000
NS_PER_DAY = 86_400 * NS_PER_SECOND

MODERN = {
    "H": "h", "T": "min", "S": "s", "L": "ms", "U": "us", "N": "ns", "BH": "bh", "CBH": "cbh",
    "M": "ME", "Q": "QE", "Y": "YE", "A": "YE", "AS": "YS", "BM": "BME", "BQ": "BQE", "BY": "BYE", "BA": "BYE",
    "BAS": "BYS", "SM": "SME", "CBM": "CBME", "d": "D", "b": "B", "w": "W",
    "mo": "MS", "q": "QS", "y": "YS",
}  # fmt: skip
LEGACY = {
    "h": "H", "min": "T", "s": "S", "ms": "L", "us": "U", "ns": "N", "ME": "M", "QE": "Q", "YE": "A", "YS": "AS",
    "BME": "BM", "BQE": "BQ", "BYE": "BA", "BYS": "BAS", "SME": "SM",
}  # fmt: skip
PERIOD = {
    "MS": "M",
    "ME": "M",
    "BMS": "M",
    "BME": "M",
    "QS": "Q",
    "QE": "Q",
    "YS": "Y",
    "YE": "Y",
    "BYS": "Y",
    "BYE": "Y",
}
SPELLINGS = "'s', 'min', '15min', 'h', 'D', 'B', 'W-SUN', 'MS' or 'ME', 'QS' or 'QE', 'YS' or 'YE'"

# one season in units of the frequency; gluonts' own table says 1 for days and weeks
SEASONS = {
    "s": 3600, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 52, "SME": 24, "ME": 12, "BME": 12, "QE": 4, "BQE": 4,
}  # fmt: skip

Family = Literal["integer", "elapsed", "day", "business", "semimonth", "month"]


@dataclass(frozen=True)
class Clock:
    """How a regular clock counts.

    Attributes:
        family: ``integer`` and ``elapsed`` add a number; the others count calendar units in local time.
        step: units in one step: whole numbers, nanoseconds, days, business days, half months or months.
        position: for months, the day they are stamped with: ``start``, ``end``, ``business start``, ``business end``.
        every: months between anchors (1, 3 or 12); for days 7 where a weekday is the anchor.
        anchor: month number (0 = January) modulo ``every``, or weekday (0 = Monday); -1 where any will do.
    """

    family: Family
    step: int
    position: str = ""
    every: int = 1
    anchor: int = -1


def normalize_alias(freq: Any) -> str:
    """Spell a frequency the modern pandas way: ``H`` -> ``h``, ``M`` -> ``ME``, ``1mo`` -> ``MS``, a timedelta too.

    Whole numbers give their own text (an integer clock). Raises DataError E-FREQ on anything else, and where it is not
    positive.
    """
    if isinstance(freq, bool) or freq is None:
        raise _bad_alias(freq)
    if hasattr(freq, "__index__"):
        return _positive(int(freq), str(int(freq)), freq)
    if isinstance(freq, datetime.timedelta):
        return _timedelta_alias(pd.Timedelta(freq))
    text = freq.freqstr if hasattr(freq, "freqstr") else freq
    if not isinstance(text, str):
        raise _bad_alias(freq)
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+", text):
        return _positive(int(text), str(int(text)), freq)
    return _offset_alias(text, freq)


def _offset_alias(text: str, freq: Any) -> str:
    found = re.fullmatch(r"(-?\d*)\s*([A-Za-z]+)(-[A-Za-z0-9]+)?", text)
    if found:
        number, base, anchor = found[1], found[2], found[3] or ""
        if base == "m":
            raise DataError("E-FREQ", f"freq={freq!r} could be minutes or months.", fix="Write 'min', or 'MS' / 'ME'.")
        text = f"{number}{MODERN.get(base, base)}{anchor.upper()}"
    try:
        offset = to_offset(text)
    except ValueError as error:
        raise _bad_alias(freq) from error
    return _positive(offset.n, _spell(offset), freq)


def _spell(offset: pd.DateOffset) -> str:
    text = str(offset.freqstr)
    return text.removesuffix("-15") if text.split("-")[0].endswith(("SMS", "SME")) else text


def _positive(number: int, text: str, freq: Any) -> str:
    if number < 1:
        raise DataError(
            "E-FREQ", f"A frequency must step forward by at least one. Got {freq!r}.", fix="Pass a positive freq."
        )
    return text


def _bad_alias(freq: Any) -> DataError:
    return DataError(
        "E-FREQ",
        f"freq must be a pandas frequency, a timedelta, or a whole number for integer clocks. Got {freq!r}.",
        fix=f"Use one of {SPELLINGS}, with a number in front if needed.",
    )


def _timedelta_alias(step: pd.Timedelta) -> str:
    step_ns = int(step.as_unit("ns").value)
    _positive(step_ns, "", step)
    return elapsed_alias(step_ns)


def elapsed_alias(step_ns: int) -> str:
    """Alias of a step of so many nanoseconds, in the largest unit that divides it."""
    units = [("D", NS_PER_DAY), ("h", 3600 * NS_PER_SECOND), ("min", 60 * NS_PER_SECOND), ("s", NS_PER_SECOND)]
    for alias, size in [*units, ("ms", 1_000_000), ("us", 1000), ("ns", 1)]:
        if step_ns % size == 0:
            number = step_ns // size
            return alias if number == 1 else f"{number}{alias}"
    raise AssertionError("every whole number is divisible by one")


def _swap(alias: str, table: dict[str, str]) -> str:
    found = re.fullmatch(r"(\d*)([A-Za-z]+)(-[A-Z]+)?", alias)
    if not found:
        return alias
    return f"{found[1]}{table.get(found[2], found[2])}{found[3] or ''}"


def legacy_alias(alias: str) -> str:
    """Spelling that pandas before 2.2 takes (``h`` -> ``H``, ``ME`` -> ``M``, ``YE-DEC`` -> ``A-DEC``)."""
    return _swap(alias, LEGACY)


def period_alias(alias: str) -> str:
    """Spelling that ``pd.Period`` takes (``ME`` and ``MS`` -> ``M``); month starts and ends are one period."""
    return _swap(alias, PERIOD)


@lru_cache(maxsize=256)
def make_frequency(alias: str) -> Frequency:
    """Frequency of a modern alias, or of an integer clock ("5"); irregular clocks are ``IRREGULAR``.

    Seasons: one hour for seconds, one day for minutes and hours, a week for days, five for business days, a year for
    weeks, months and quarters; 1 where the step does not divide the season.
    """
    if re.fullmatch(r"\d+", alias):
        return Frequency("integer", alias, season_steps=1)
    clock = clock_of(alias)
    per_day = 0
    if clock.family == "elapsed" and NS_PER_DAY % clock.step == 0:
        per_day = NS_PER_DAY // clock.step
    elif clock.family == "day" and clock.step == 1:
        per_day = 1
    return Frequency("calendar", alias, season_steps=season_of(alias), steps_per_day=per_day)


IRREGULAR = Frequency("irregular", "", season_steps=1)


def season_of(alias: str) -> int:
    """Steps in one season of a calendar alias; 1 where none is known or the step does not divide it."""
    from gluonts.time_feature import get_seasonality, norm_freq_str

    offset = to_offset(alias)
    number, base = offset.n, norm_freq_str(offset.rule_code)
    if base == "h" and number % 24 == 0:
        number, base = number // 24, "D"
    if base == "D" and number % 7 == 0:
        number, base = number // 7, "W"
    # asked only where it divides: gluonts logs a warning otherwise
    if SEASONS.get(base, 1) % number:
        return 1
    return int(get_seasonality(f"{number}{base}", SEASONS))


@lru_cache(maxsize=256)
def clock_of(alias: str) -> Clock:
    """How the clock of a modern alias counts.

    Raises DataError E-FREQ for offsets without a regular count (custom days, business hours).
    """
    if re.fullmatch(r"\d+", alias):
        return Clock("integer", int(alias))
    offset = to_offset(alias)
    number, name = offset.n, offset.rule_code.split("-")[0]
    if isinstance(offset, offsets.Day):
        return Clock("day", number)
    if isinstance(offset, offsets.Week):
        anchor = -1 if offset.weekday is None else offset.weekday
        return Clock("day", 7 * number, every=7, anchor=anchor)
    if isinstance(offset, offsets.Tick):
        return Clock("elapsed", int(pd.Timedelta(offset).as_unit("ns").value))
    if name == "B":
        return Clock("business", number)
    if name in ("SMS", "SME") and offset.day_of_month == 15:
        return Clock("semimonth", number, position="start" if name == "SMS" else "end")
    return _month_clock(offset, name, alias)


def _month_clock(offset: Any, name: str, alias: str) -> Clock:
    families = {"M": 1, "Q": 3, "Y": 12}
    stem = name.removeprefix("B")
    if len(stem) != 2 or stem[0] not in families or stem[1] not in "SE":
        raise DataError("E-FREQ", f"freq={alias!r} has no regular count of steps.", fix=f"Use one of {SPELLINGS}.")
    every = families[stem[0]]
    month = {1: 1, 3: getattr(offset, "startingMonth", 1), 12: getattr(offset, "month", 1)}[every]
    position = ("business " if name.startswith("B") else "") + ("start" if stem[1] == "S" else "end")
    anchor = -1 if every == 1 else (month - 1) % every
    return Clock("month", every * offset.n, position=position, every=every, anchor=anchor)
