"""Moments in the history of a panel: where its items may be cut, when that was, and the panel as it was then.

I items · S steps of all items together · G targets · X cutoffs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.clock import as_numbers, effective_clock, locate, step_times
from hamts.data.panel import Dialect, Panel
from hamts.errors import DataError

__all__ = ["cutoff_steps", "first_observed", "times_of", "truncate"]


def cutoff_steps(panel: Panel, cutoffs: Sequence[Any]) -> list[np.ndarray]:
    """Steps of each item up to each of these times, the time itself included: [I] rising int64 arrays.

    Times before an item's first row are left out for it.
    """
    integer = panel.starts.dtype.kind != "M"
    moments = np.unique([_moment(each, panel.schema.dialect, integer=integer) for each in cutoffs])  # [X]
    if panel.times is not None:
        stamps = as_numbers(panel.times)  # [S]
        parts = [stamps[a:b] for a, b in zip(panel.offsets, panel.offsets[1:], strict=False)]
        counts = [np.searchsorted(part, moments, side="right") for part in parts]
    else:
        zone = panel.schema.dialect.time_zone
        clock = effective_clock(panel.schema.frequency, zone)
        starts = np.broadcast_to(as_numbers(panel.starts)[:, None], (panel.n_items, len(moments)))  # [I, X]
        steps, _ = locate(clock, starts.ravel(), np.tile(moments, panel.n_items), zone)
        counts = list(steps.reshape(panel.n_items, -1) + 1)
    return [np.unique(count[count > 0]) for count in counts]


def _moment(time: Any, dialect: Dialect, *, integer: bool) -> int:
    try:
        stamp = int(time) if integer else pd.Timestamp(time)
    except (TypeError, ValueError, OverflowError):
        stamp = pd.NaT
    if stamp is pd.NaT:
        kind, fix = ("a whole number", "7, say.") if integer else ("a date", "2024-01-31 or 2024-01-31T13:00, say.")
        raise DataError("E-DATE", f"A moment in the history must be {kind}. Got {time!r}.", fix=fix)
    if isinstance(stamp, int):
        return stamp
    zone = dialect.time_zone
    if zone is not None:
        stamp = stamp.tz_localize(zone) if stamp.tz is None else stamp
    elif stamp.tz is not None:
        raise DataError("E-TZ-DRIFT", f"Times have no zone, the cutoff {time!r} has one.", fix="Pass it without.")
    return int(stamp.as_unit("ns").value)


def times_of(panel: Panel, items: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Time of some steps of some items, all in the history; both int64 and broadcast against each other."""
    if panel.times is None:
        return step_times(panel, np.asarray(panel.starts)[items], steps)
    return panel.times[panel.offsets[items] + steps]


def first_observed(panel: Panel) -> np.ndarray:
    """First step of each item at which each target was observed, the item's length if it never was: [I, G]."""
    targets = panel.schema.indices("target")
    step = np.arange(len(panel.values)) - np.repeat(panel.offsets[:-1], panel.lengths)  # [S]
    never = np.repeat(panel.lengths, panel.lengths)  # [S]
    seen = ~np.isnan(panel.values[:, targets])  # [S, G]
    first = np.where(seen, step[:, None], never[:, None])  # [S, G]
    return np.minimum.reduceat(first, panel.offsets[:-1], axis=0)


def truncate(panel: Panel, ends: np.ndarray) -> Panel:
    """The panel as it was: the first ``ends`` steps of each item [I]; items with none are left out."""
    items = np.flatnonzero(ends > 0)
    rows = np.concatenate([np.arange(panel.offsets[i], panel.offsets[i] + ends[i]) for i in items])
    return replace(
        panel,
        values=panel.values[rows],
        offsets=np.concatenate([[0], np.cumsum(ends[items])]).astype(np.int64),
        item_ids=panel.item_ids[items],
        starts=panel.starts[items],
        times=None if panel.times is None else panel.times[rows],
        event_offset=None if panel.event_offset is None else panel.event_offset[rows],
        static_values=None if panel.static_values is None else panel.static_values[items],
    )
