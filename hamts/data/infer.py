"""Find the frequency of a frame by majority vote, or check the one that was given.

Works on rows sorted by item and time: ``times`` int64 [rows], ``offsets`` int64 [I + 1]. One gap or one short item
does not change the answer; ``pandas.infer_freq`` gives up on either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hamts.data.clock import as_numbers, as_times, effective_clock, is_anchored, locate, show_times, to_local
from hamts.data.frequency import NS_PER_DAY, clock_of, elapsed_alias, make_frequency
from hamts.data.panel import Frequency
from hamts.errors import DataError

__all__ = ["SortedTimes", "check_frequency", "find_frequency"]

WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
# below this share of steps that are exactly one long, a clock is not taken for granted
MAJORITY = 0.5
FEW_STEPS = 3


@dataclass(frozen=True)
class SortedTimes:
    """Times of all rows, item by item, with what is needed to name them in a message."""

    values: np.ndarray  # int64 [rows]
    offsets: np.ndarray  # int64 [I + 1]
    ids: np.ndarray  # [I]
    integer: bool
    zone: str | None
    column: str

    def starts(self) -> np.ndarray:
        """Time of the first row of the item of each row, [rows]."""
        return np.repeat(self.values[self.offsets[:-1]], np.diff(self.offsets))

    def items(self) -> np.ndarray:
        """Item of each difference, [rows - I]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.maximum(np.diff(self.offsets) - 1, 0))

    def within(self, numbers: np.ndarray) -> np.ndarray:
        """Differences of ``numbers`` [rows] from row to row inside items, [rows - I]."""
        steps = np.diff(numbers)
        if len(self.offsets) == 2:
            return steps
        inside = np.ones(len(steps), dtype=bool)
        inside[self.offsets[1:-1] - 1] = False
        return steps[inside]

    def show(self, rows: np.ndarray) -> list[str]:
        """The first five of these rows, as item and time."""
        items = np.searchsorted(self.offsets, rows[:5], side="right") - 1
        stamps = show_times(self.values[rows[:5]], integer=self.integer, zone=self.zone)
        return [f"{self.ids[item]!r} at {stamp}" for item, stamp in zip(items, stamps, strict=True)]


def find_frequency(times: SortedTimes) -> Frequency:
    """Frequency that most differences have and every row lies on.

    Raises DataError: E-FREQ (none found, with the histogram of differences), E-FREQ-MIX (items with clocks of their
        own).
    """
    gaps = times.within(times.values)
    if not len(gaps):
        raise DataError(
            "E-FREQ",
            "The frequency cannot be found: every item has one row.",
            column=times.column,
            fix="Pass freq='h', or whichever applies.",
        )
    mode = _mode(gaps)
    sparse: dict[str, float] = {}
    for alias in _candidates(times, mode):
        frequency = make_frequency(alias)
        share = _share_of_single_steps(times, frequency)
        if share >= MAJORITY:
            _refuse_coarse_items(times, frequency)
            return frequency
        if share > 0:
            sparse[alias] = share
    raise _no_frequency(times, gaps, sparse)


def _mode(numbers: np.ndarray) -> int:
    """Most common number, the smaller of two that are equally common."""
    if numbers[0] == numbers[-1] and (numbers == numbers[0]).all():
        return int(numbers[0])
    found, counts = np.unique(numbers, return_counts=True)
    return int(found[counts.argmax()])


def _candidates(times: SortedTimes, mode: int) -> Iterator[str]:
    """Aliases worth trying for this most common difference, best first."""
    if times.integer:
        yield str(mode)
        return
    # a local day has 23 to 25 hours
    if mode < NS_PER_DAY - 3600 * 10**9:
        yield elapsed_alias(mode)
        return
    local = to_local(times.values, times.zone)
    days = np.unique(local // NS_PER_DAY)
    span = round(mode / NS_PER_DAY)
    yield from _month_candidates(times, local, days, span)
    if span % 7 == 0:
        weekday = int(days[0] + 3) % 7
        yield f"{'' if span == 7 else span // 7}W-{WEEKDAYS[weekday]}"
    if span == 1 and len(days) > 1 and ((days + 3) % 7 < 5).all() and days[-1] - days[0] > len(days) - 1:
        yield "B"
    yield elapsed_alias(max(span, 1) * NS_PER_DAY)
    if mode % NS_PER_DAY:
        yield elapsed_alias(mode)


def _month_candidates(times: SortedTimes, local: np.ndarray, days: np.ndarray, span: int) -> Iterator[str]:
    if span < 13:
        return
    dates = days.astype("M8[D]")
    months = dates.astype("M8[M]")
    if span < 17:
        yield from ("SMS", "SME")
        return
    number = _mode(times.within(local.astype("M8[ns]").astype("M8[M]").astype(np.int64)))
    if number < 1:
        return
    first, last = months.astype("M8[D]"), (months + 1).astype("M8[D]") - 1
    stamps = {
        "S": first,
        "E": last,
        "BS": np.busday_offset(first, 0, roll="forward"),
        "BE": np.busday_offset(last, 0, roll="backward"),
    }
    month = int(months[0].astype(np.int64)) % 12
    for position, stamp in stamps.items():
        if (dates == stamp).all():
            yield _month_alias(number, position, month)


def _month_alias(number: int, position: str, month: int) -> str:
    """Alias of a step of so many months that is stamped in this month (0 = January)."""
    business, edge = ("B", position[1]) if len(position) == 2 else ("", position)
    if number % 12 == 0:
        return f"{'' if number == 12 else number // 12}{business}Y{edge}-{MONTHS[month]}"
    if number % 3 == 0:
        # pandas names quarters that begin by their first month, quarters that end by the last one of the year
        anchor = MONTHS[month % 3] if edge == "S" else MONTHS[9 + month % 3]
        return f"{'' if number == 3 else number // 3}{business}Q{edge}-{anchor}"
    return f"{'' if number == 1 else number}{business}M{edge}"


def _steps(times: SortedTimes, frequency: Frequency) -> tuple[np.ndarray, np.ndarray]:
    """Step of every row after the start of its item, and whether the row lies on the clock, both [rows]."""
    clock = effective_clock(frequency, times.zone)
    starts = times.starts()
    steps, on_clock = locate(clock, starts, times.values, times.zone)
    return steps, on_clock & is_anchored(clock_of(frequency.alias), starts, times.zone)


def _share_of_single_steps(times: SortedTimes, frequency: Frequency) -> float:
    """Share of differences that are exactly one step; 0 where a row is off the clock."""
    steps, on_clock = _steps(times, frequency)
    return float((times.within(steps) == 1).mean()) if on_clock.all() else 0.0


def _refuse_coarse_items(times: SortedTimes, frequency: Frequency) -> None:
    """Items whose every step is longer than one have a clock of their own, unless they are short."""
    steps = times.within(_steps(times, frequency)[0])
    if (steps == 1).all():
        return
    items = times.items()
    shortest = np.full(len(times.offsets) - 1, np.iinfo(np.int64).max)
    np.minimum.at(shortest, items, steps)
    coarse = np.flatnonzero((shortest > 1) & (np.bincount(items, minlength=len(shortest)) >= FEW_STEPS))
    if len(coarse):
        raise _mixed(times, {frequency.alias: np.setdiff1d(np.arange(len(shortest)), coarse), "longer": coarse})


def _mixed(times: SortedTimes, groups: dict[str, np.ndarray]) -> DataError:
    texts = []
    for name, items in groups.items():
        examples = ", ".join(repr(i) for i in times.ids[items[:3]].tolist())
        texts.append(f"{name}: {len(items)} items such as {examples}")
    last = list(groups.values())[-1]
    return DataError(
        "E-FREQ-MIX",
        f"All items must share one frequency. Got {'; '.join(texts)}.",
        column=times.column,
        series=times.ids[last[:5]].tolist(),
        fix="Fit one model per group, or resample to one frequency; freq=... treats longer steps as gaps.",
    )


def _no_frequency(times: SortedTimes, gaps: np.ndarray, sparse: dict[str, float]) -> DataError:
    own = _item_modes(times)
    groups = {name: items for name, items in own.items() if len(items)}
    if 1 < len(groups) <= 5:
        return _mixed(times, groups)
    if not sparse and np.gcd.reduce(gaps) == gaps.min():
        step = int(gaps.min())
        sparse = {str(step) if times.integer else elapsed_alias(step): float((gaps == step).mean())}
    if sparse:
        alias, share = max(sparse.items(), key=lambda pair: pair[1])
        return DataError(
            "E-FREQ",
            f"All rows lie on {alias!r}, but only {share:.0%} of the differences are one step of it. "
            f"Differences found: {histogram(times, gaps)}.",
            column=times.column,
            fix=f"Pass freq={alias!r} to take the rest as gaps, or irregular='native' for rows as they are.",
        )
    return DataError(
        "E-FREQ",
        f"Rows are irregular: no frequency holds for all of them. Differences found: {histogram(times, gaps)}.",
        column=times.column,
        fix=f"Pass freq=..., resample, or irregular='native' for rows as they are.{clock_change_hint(times)}",
    )


def _item_modes(times: SortedTimes) -> dict[str, np.ndarray]:
    """Items by the frequency they have when looked at alone; empty where one has none or there are many items."""
    count = len(times.offsets) - 1
    if count == 1 or count > 10_000:
        return {}
    groups: dict[str, list[int]] = {}
    for item in range(count):
        rows = slice(times.offsets[item], times.offsets[item + 1])
        if rows.stop - rows.start <= FEW_STEPS:
            continue
        alone = SortedTimes(
            times.values[rows],
            np.array([0, rows.stop - rows.start]),
            times.ids[[item]],
            times.integer,
            times.zone,
            times.column,
        )
        tried = _candidates(alone, _mode(np.diff(alone.values)))
        frequency = next((a for a in tried if _share_of_single_steps(alone, make_frequency(a)) >= MAJORITY), None)
        if frequency is None:
            return {}
        groups.setdefault(frequency, []).append(item)
    return {name: np.asarray(items) for name, items in sorted(groups.items(), key=lambda pair: -len(pair[1]))}


def histogram(times: SortedTimes, gaps: np.ndarray) -> str:
    """The five most common differences: ``0 days 01:00:00 x 120, 0 days 03:00:00 x 2``."""
    found, counts = np.unique(gaps, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:5]
    texts = [f"{found[i] if times.integer else pd.Timedelta(int(found[i]), 'ns')} x {counts[i]}" for i in order]
    rest = len(found) - len(order)
    return ", ".join(texts) + (f", and {rest} others" if rest else "")


def clock_change_hint(times: SortedTimes) -> str:
    """A sentence where odd differences are whole hours on the Sundays on which clocks change, else nothing."""
    gaps = times.within(times.values)
    if times.integer or times.zone is not None or not len(gaps):
        return ""
    mode = _mode(gaps)
    before = np.delete(np.arange(len(times.values)), times.offsets[1:] - 1)
    odd = np.flatnonzero(gaps != mode)
    if not len(odd) or not is_clock_change(times.values[before[odd]]).all():
        return ""
    return " They lie on clock-change Sundays: local times without a zone? Then tz_localize them."


def is_clock_change(values: np.ndarray) -> np.ndarray:
    """Whether naive stamps [n] lie in the early hours of a Sunday in March, April, September, October or November."""
    index = pd.DatetimeIndex(as_times(values, integer=False))
    return (index.day_of_week == 6) & (index.hour <= 4) & index.month.isin([3, 4, 9, 10, 11])


def check_frequency(times: SortedTimes, frequency: Frequency) -> np.ndarray:
    """Step of every row after the start of its item, int64 [rows].

    Raises DataError E-FREQ where rows are off this clock, or all steps are longer than one, with what the data looks
        like.
    """
    if (frequency.kind == "integer") != times.integer:
        wanted, got = ("whole numbers", "dates") if times.integer is False else ("dates", "whole numbers")
        raise DataError(
            "E-FREQ",
            f"freq={frequency.alias!r} needs a clock of {wanted}, but {times.column!r} holds {got}.",
            column=times.column,
            fix="Pass an integer freq for an integer clock, a pandas alias for dates.",
        )
    steps, on_clock = _steps(times, frequency)
    gaps = times.within(steps)
    off = np.flatnonzero(~on_clock)
    if len(off):
        what = f"{len(off)} of {len(steps)} rows are not on the clock freq={frequency.alias!r}"
    elif len(gaps) >= FEW_STEPS and gaps.min() > 1:
        what = f"freq={frequency.alias!r} is too fine: the shortest step between rows is {gaps.min()} of it"
    else:
        return steps
    found = _suggest(times)
    raise DataError(
        "E-FREQ",
        f"{what}. Differences found: {histogram(times, times.within(as_numbers(times.values)))}.",
        column=times.column,
        rows=times.show(off),
        fix=f"The rows look like freq={found!r}."
        if found
        else "Resample, or irregular='native' to take rows as they are.",
    )


def _suggest(times: SortedTimes) -> str | None:
    try:
        return find_frequency(times).alias
    except DataError:
        return None
