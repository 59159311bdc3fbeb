"""What ``Stream.pin`` and ``Stream.forget`` do: find the span, edit the memory of its item, measure what is left.

C channels · P steps in a patch
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from hamts.data.clock import as_numbers, locate
from hamts.data.panel import Panel
from hamts.errors import DataError
from hamts.reader import StreamMemory
from hamts.remembered import flatten_tensors, read_panel
from hamts.stream_forecast import remembered_items
from hamts.stream_history import _rows
from hamts.stream_pins import Pin, erase_span, mark_span
from hamts.stream_state import StreamItems
from hamts.stream_step import Stepper

if TYPE_CHECKING:
    from hamts.stream import Stream

__all__ = ["forget_span", "pin_span"]


def span_steps(stepper: Stepper, items: StreamItems, slot: int, span: tuple[Any, Any]) -> tuple[int, int]:
    """First and last step of a span of times on an item's clock. Raises DataError E-OPTION."""
    try:
        first, last = (_time_number(stepper, moment) for moment in span)
    except (TypeError, ValueError) as error:
        raise DataError("E-OPTION", f"A span is two times, from and to. Got {span!r}.", fix="('...', '...')") from error
    start = items.table["starts"][slot : slot + 1]
    steps, on_clock = locate(stepper.clock, start.repeat(2), np.array([first, last]), stepper.zone)
    # a time between two steps belongs to the span from the next one on
    begin, end = int(steps[0]) + (not on_clock[0]), int(steps[1])
    if end < max(begin, 0):
        raise DataError("E-OPTION", f"The span {span!r} holds no step of item {items.ids[slot]!r}.", fix="A later end.")
    return max(begin, 0), end


def _time_number(stepper: Stepper, moment: Any) -> int:
    if stepper.integer:
        return int(moment)
    stamp = pd.Timestamp(moment)
    if stepper.zone is not None and stamp.tz is None:
        stamp = stamp.tz_localize(stepper.zone)
    if stamp.tz is not None:
        stamp = stamp.tz_convert("UTC").tz_localize(None)
    return int(as_numbers(np.array([stamp.to_datetime64()]))[0])


def patches_of(stepper: Stepper, items: StreamItems, slot: int, steps: tuple[int, int]) -> tuple[int, int]:
    P, lead = stepper.network.config.patch_steps, int(items.table["lead"][slot])
    return (lead + steps[0]) // P, (lead + steps[1]) // P


def pin_span(items: StreamItems, stepper: Stepper, slot: int, span: tuple[Any, Any], label: str) -> Pin:
    """Raises DataError E-OPTION where the model does not keep tagged steps."""
    if "tags" not in stepper.network.config.router_names:
        raise DataError(
            "E-OPTION",
            f"Pinned steps are kept like tagged ones, and router={stepper.network.config.router!r} keeps none.",
            fix="Fit with a router that ends in '+tags'.",
        )
    steps = span_steps(stepper, items, slot, span)
    first, last = patches_of(stepper, items, slot, steps)
    edited = mark_span(items.memory.select(np.array([slot])), first, last)
    items.memory.put(np.array([slot]), edited.memory)
    length = int(items.table["lengths"][slot])
    return Pin("pin", items.ids[slot], first, last, label, length, edited.entries, edited.window)


def forget_span(
    stream: Stream, slot: int, span: tuple[Any, Any], label: str, history: Any
) -> tuple[Pin, dict[str, Any]]:
    """Erase a span; with its history, read the item anew without it. Also what is left of it, measured."""
    items, stepper = stream._items, stream._stepper
    place = np.array([slot])
    steps = span_steps(stepper, items, slot, span)
    first, last = patches_of(stepper, items, slot, steps)
    before = _copy(items.memory.select(place))
    forecast_before = _forecast(stream, slot)
    rows = None if history is None else _without_span(stream, slot, steps, history)
    edited = erase_span(before, first, last)
    cleared = _clear_rows(items, stepper, slot, steps)
    items.memory.put(place, edited.memory if rows is None else rows[1])
    if rows is not None:
        for name, column in rows[0].items():
            if name in items.table.columns:
                items.table[name][slot] = column[0]
    # what was forecast of the open patch knew the span
    items.table["ahead_patch"][slot], items.table["ahead_quantiles"][slot] = -1, np.nan
    moved = np.nanmean(np.abs(_forecast(stream, slot) - forecast_before))  # in the user's units
    scale = stream._network.unit[stream._network.spec.targets].mean().item()
    left: dict[str, Any] = {
        "entries_removed": edited.entries,
        "window_tokens_removed": edited.window,
        "open_rows_removed": cleared,
        "forecast_moved": float(moved),
        "forecast_moved_units": float(moved / scale),
        "state_still_holds_it": rows is None,
        "state_difference": None if rows is None else _state_difference(before, rows[1]),
        "note": (
            "The recurrent state and the running statistics have read this span and were not changed; what they hold"
            " of it cannot be told without its rows. Pass history= to rebuild them without it."
            if rows is None
            else "The item was read anew without the span. state_difference is what the state had held of it."
        ),
    }
    length = int(items.table["lengths"][slot])
    return Pin("forget", items.ids[slot], first, last, label, length, edited.entries, edited.window), left


def _copy(memory: StreamMemory) -> StreamMemory:
    return memory.select(torch.arange(1))


def _forecast(stream: Stream, slot: int) -> np.ndarray:
    """Medians of the unfinished patch and the next steps with nothing known ahead, [G, F]."""
    from hamts.remembered import forecast_remembered

    remembered = remembered_items(stream.model, stream._items, np.array([slot]), stream.share)
    future = np.full((1, stream.model.h, len(stream.schema.channels)), np.nan)
    answer = forecast_remembered(
        stream._network, remembered, stream.schema, future=future, share=stream.share, time_unit=1.0
    )
    return answer[0, ..., stream._network.head.middle]


def _clear_rows(items: StreamItems, stepper: Stepper, slot: int, steps: tuple[int, int]) -> int:
    """Rows of the unfinished patch that lie in the span become missing; how many there were."""
    P, table = stepper.network.config.patch_steps, items.table
    lead, length = int(table["lead"][slot]), int(table["lengths"][slot])
    base = (lead + length) // P * P - lead  # first step of the open patch
    low, high = max(steps[0] - base, 0), min(steps[1] - base, length - base - 1)
    if high < low:
        return 0
    rows = slice(low, high + 1)
    there = int((~np.isnan(table["tail_values"][slot, rows])).any(1).sum())
    table["tail_values"][slot, rows] = np.nan
    return there


def _without_span(
    stream: Stream, slot: int, steps: tuple[int, int], history: Any
) -> tuple[dict[str, np.ndarray], StreamMemory]:
    """The item read anew with the span missing. Raises DataError E-OPTION where the history is not that of the item."""
    model, items = stream.model, stream._items
    panel: Panel = model._panel_of(history, None, None)
    item = items.ids[slot]
    found = [row for row, each in enumerate(panel.item_ids.tolist()) if each == item]
    table = items.table
    fits = (
        len(found) == 1
        and panel.n_items == 1
        and int(as_numbers(panel.starts)[0]) == int(table["starts"][slot])
        and int(panel.lengths[0]) == int(table["lengths"][slot])
    )
    if not fits:
        raise DataError(
            "E-OPTION",
            f"history must hold all rows of item {item!r} and of no other, from its first to its last.",
            series=panel.item_ids[:5].tolist(),
            fix="history=df[df['unique_id'] == item]",
        )
    values = panel.values.copy()
    values[steps[0] : steps[1] + 1] = np.nan
    static = table["static"][slot : slot + 1] if len(stream.schema.static) else None
    panel = replace(panel, values=values, static_values=static)
    policy = stream._network.policy(torch.tensor([stream.share]))
    remembered, _ = read_panel(stream._network, panel, policy, share=stream.share, time_unit=1.0)
    return _rows(remembered, panel.schema), remembered.memory


def _state_difference(before: StreamMemory, after: StreamMemory) -> dict[str, float]:
    """Relative distance of each recurrent state, and of the normaliser: |before - after| / |after|."""
    old, new = flatten_tensors(before), flatten_tensors(after)
    names = [name for name in old if name.endswith(".state") or name == "scale.sums"]
    return {
        name: float((old[name] - new[name]).norm() / new[name].norm().clamp_min(torch.finfo(new[name].dtype).tiny))
        for name in names
    }
