"""What a stream says of itself, as tables: what is kept, what was written, how rows were taken, what surprised.

I items · L layers · W window patches · M entries
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hamts.data.library import plain_frame
from hamts.errors import DataError
from hamts.remembered import memory_parts
from hamts.stream_pins import Pin
from hamts.stream_rows import row_times
from hamts.stream_state import COUNTERS, StreamItems
from hamts.stream_step import Stepper

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster

__all__ = ["memory_table", "routes_table", "stats_table", "surprise_table", "usage_table"]

# what one key of the table below is: item, channel, patch
Kept = dict[tuple[int, int, int], dict[str, Any]]


def id_column(model: HAMForecaster) -> str:
    return model.schema.dialect.id_column or "item"


def surprise_table(model: HAMForecaster, last: tuple[Any, Any, Any] | None) -> Any:
    """Rows taken by the last update, in the order of the frame.

    Columns: id, time, score (1 = on the edge of the 80 % interval), p_value (rank among the item's last scores; small
    is surprising), target (the farthest out). NaN and None where nothing was forecast or observed.
    """
    dialect, targets = model.schema.dialect, model.schema.targets
    if last is None:
        nothing: list[Any] = []
        names = (id_column(model), dialect.time_column, "score", "p_value", "target")
        return plain_frame(dialect, dict.fromkeys(names, nothing))
    incoming, arrived, scored = last
    order = np.argsort(arrived.source, kind="stable")
    rows = arrived.source[order]
    return plain_frame(
        dialect,
        {
            id_column(model): [incoming.ids[row] for row in rows],
            dialect.time_column: row_times(model.schema, np.ascontiguousarray(incoming.times[rows])),
            "score": scored.scores[order],
            "p_value": scored.p_values[order],
            "target": [targets[t] if t >= 0 else None for t in scored.targets[order]],
        },
    )


def routes_table(model: HAMForecaster, stepper: Stepper, items: StreamItems, pins: list[Pin]) -> Any:
    """Every step that is kept exactly now; what was evicted left no trace.

    =============== ===============================================================================================
    unique_id       the item
    channel         name of the column
    ds_start ds_end first and last step of the patch
    reason          ``tag`` (an event, an action, a pin) or ``score``
    label           of the pins that hold it
    score           highest of the layers
    status          ``kept`` in at least one layer; ``pending``: among the last W patches, not yet decided
    age             steps from ``ds_end`` to the last row
    layers          that hold it
    =============== ===============================================================================================
    """
    found: Kept = {}
    memory = items.memory.lend(np.arange(len(items)))
    for number, layer in enumerate(memory.layers):
        pad = layer.scratchpad
        for item, entry in pad.alive.nonzero().tolist():
            key = (item, int(pad.channel[item, entry]), round(float(pad.position[item, entry])))
            cell = found.setdefault(key, {"layers": [], "score": -np.inf, "tagged": False, "status": "kept"})
            cell["layers"].append(str(number))
            cell["score"] = max(cell["score"], float(pad.score[item, entry]))
            cell["tagged"] |= bool(pad.must_keep[item, entry])
    window = memory.layers[0].pending
    for item, place, channel in window.present.nonzero().tolist():
        key = (item, channel, round(float(window.position[item, place])))
        tagged = bool(window.must_keep[item, place, channel])
        scores = window.scores[item, place, channel]
        best = float(scores.max()) if scores.numel() else np.nan
        found.setdefault(key, {"layers": [], "score": best, "tagged": tagged, "status": "pending"})
    return _route_rows(model, stepper, items, pins, found)


def _route_rows(model: HAMForecaster, stepper: Stepper, items: StreamItems, pins: list[Pin], found: Kept) -> Any:
    P, schema, table = model.config.patch_steps, model.schema, items.table
    keys = sorted(found)
    item = np.array([key[0] for key in keys], dtype=np.int64)
    patch = np.array([key[2] for key in keys], dtype=np.int64)
    first = np.maximum(patch * P - table["lead"][item], 0)
    last = patch * P - table["lead"][item] + P - 1
    starts = table["starts"][item]
    held = [",".join(dict.fromkeys(p.label for p in pins if _holds(p, items.ids[key[0]], key[2]))) for key in keys]
    cells = [found[key] for key in keys]
    return plain_frame(
        schema.dialect,
        {
            id_column(model): [items.ids[key[0]] for key in keys],
            "channel": [schema.channels[key[1]].name for key in keys],
            "ds_start": row_times(schema, stepper.step_times(starts, first)),
            "ds_end": row_times(schema, stepper.step_times(starts, last)),
            "reason": ["tag" if cell["tagged"] else "score" for cell in cells],
            "label": held,
            "score": np.array([cell["score"] for cell in cells], dtype=np.float64),
            "status": [cell["status"] for cell in cells],
            "age": table["lengths"][item] - 1 - last,
            "layers": [",".join(cell["layers"]) for cell in cells],
        },
    )


def _holds(pin: Pin, item: Any, patch: int) -> bool:
    return pin.action == "pin" and pin.item == item and pin.first_patch <= patch <= pin.last_patch


def usage_table(model: HAMForecaster, items: StreamItems) -> Any:
    """Of every item since the stream began: tokens observed, share of them written, share still alive, bytes.

    Tokens are counted over layers. ``live_share`` is against the tokens of this stream: entries from a history that
    was read before it count as alive, but not as observed, so it can exceed ``usage_share``.
    """
    table, layers = items.table, model.config.layers
    memory = items.memory.lend(np.arange(len(items)))
    alive = sum(layer.scratchpad.alive.sum(1).cpu().numpy() for layer in memory.layers)
    heard = table["heard"] * layers
    return plain_frame(
        model.schema.dialect,
        {
            id_column(model): list(items.ids),
            "observed_tokens": table["heard"].copy(),
            "usage_share": table["kept"].sum(1) / np.maximum(heard, 1),
            "live_share": alive / np.maximum(heard, 1),
            "entries": alive,
            "scratchpad_bytes": memory_parts(memory)["scratchpad"],
        },
    )


def memory_table(model: HAMForecaster, items: StreamItems) -> Any:
    """Bytes that are kept of each item, by part; ``total`` is their sum."""
    parts = memory_parts(items.memory.lend(np.arange(len(items))))
    rows = ("tail_values", "tail_offset", "recent_steps", "recent_hashes", "action_before")
    learned = ("ahead_quantiles", "ahead_mean", "ahead_scale", "shift", "scores")
    for part, names in (("rows", rows), ("calibration", learned)):
        size = sum(items.table[name][:1].nbytes for name in names if name in items.table.columns)
        parts[part] = np.full(len(items), size)
    parts["total"] = np.sum(list(parts.values()), axis=0)
    return plain_frame(model.schema.dialect, {id_column(model): list(items.ids), **parts})


def stats_table(model: HAMForecaster, items: StreamItems, by: str | None) -> Any:
    """Rows by what became of them since the stream began: a dict of sums, or a frame with a row for each item."""
    counts = items.table["counts"]  # [I, counters]
    if by is None:
        return {name: int(total) for name, total in zip(COUNTERS, counts.sum(0), strict=True)}
    if by != "item":
        raise DataError("E-OPTION", f"by must be None or 'item'. Got {by!r}.", fix="by='item'")
    columns = {name: counts[:, place].copy() for place, name in enumerate(COUNTERS)}
    return plain_frame(model.schema.dialect, {id_column(model): list(items.ids), **columns})
