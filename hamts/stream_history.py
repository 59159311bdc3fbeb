"""Where a stream begins: a history read in one pass, or what a saved model remembers of its items.

I items · C channels · P steps in a patch · R recent rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hamts.data.clock import as_numbers
from hamts.data.panel import Panel, Schema
from hamts.errors import DataError
from hamts.reader import StreamMemory
from hamts.refusals import refuse_unseen
from hamts.remembered import Remembered, read_panel
from hamts.stream_rows import value_hashes
from hamts.stream_state import Column

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster
    from hamts.reader import HAMNetwork

__all__ = ["check_streamable", "history_rows", "saved_rows"]

Begun = tuple[list[Any], dict[str, np.ndarray], StreamMemory]


def check_streamable(model: HAMForecaster) -> None:
    """Raises DataError E-STREAM on an irregular clock, whose rows have no step to be told apart by, and for rivals."""
    if model.config.mixer != "ham":
        raise DataError("E-STREAM", f"A stream needs mixer='ham'. Got {model.config.mixer!r}.", fix="Fit with 'ham'.")
    if model.schema.frequency.kind == "irregular":
        raise DataError(
            "E-STREAM",
            "A stream needs a regular clock. This model was fitted with irregular='native'.",
            fix="Fit with a frequency, missing steps are fine; or pass the whole history to predict.",
        )


def saved_rows(model: HAMForecaster) -> Begun:
    """Items of the fit, from what it remembers. Which rows it read is not known, so older ones count as late."""
    remembered = model._fitted.remembered
    return _begun(remembered, model.schema), _rows(remembered, model.schema), remembered.memory


def history_rows(
    model: HAMForecaster,
    network: HAMNetwork,
    df: Any,
    share: float,
    static_df: Any,
    events: Any,
    columns: dict[str, Column],
) -> Begun:
    """Items of a frame, read to their ends. Raises what reading a frame raises."""
    panel = model._panel_of(df, static_df, events)
    refuse_unseen(panel)
    policy = network.policy(torch.tensor([share]))
    remembered, _ = read_panel(network, panel, policy, share=share, time_unit=model._fitted.plan.time_unit)
    rows = _rows(remembered, panel.schema)
    rows["recent_steps"], rows["recent_hashes"] = _recent(panel, columns["recent_steps"][1][0])
    return _begun(remembered, panel.schema), rows, remembered.memory


def _begun(remembered: Remembered, schema: Schema) -> list[Any]:
    return list(remembered.item_ids.tolist())


def _rows(remembered: Remembered, schema: Schema) -> dict[str, np.ndarray]:
    rows: dict[str, np.ndarray] = {
        "starts": as_numbers(remembered.starts),
        "lead": remembered.lead,
        "lengths": remembered.lengths,
        "tail_values": remembered.tail_values,
        "action_before": _actions_before(remembered, schema),
        "seen": remembered.seen,
    }
    if remembered.static_values is not None:
        rows["static"] = remembered.static_values
    if remembered.tail_offset is not None:
        rows["tail_offset"] = remembered.tail_offset
    return rows


def _actions_before(remembered: Remembered, schema: Schema) -> np.ndarray:
    """Actions before the unfinished patch, [I, C], or others that tag its steps alike."""
    before = remembered.last_action.copy()
    for channel in schema.indices("action"):
        tail = remembered.tail_values[:, :, channel]  # [I, P]
        for item in np.flatnonzero((~np.isnan(tail)).any(1)):
            first = np.flatnonzero(~np.isnan(tail[item]))[0]
            changed = bool(remembered.tail_tags[item, first, channel])
            before[item, channel] = tail[item, first] + changed
    return before


def _recent(panel: Panel, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and hashes of each item's last rows, 2 x [I, R]; steps without a row are told by their missing values."""
    steps = np.full((panel.n_items, room), -1, dtype=np.int64)
    hashes = np.zeros((panel.n_items, room), dtype=np.int64)
    plain = [place for place, channel in enumerate(panel.schema.channels) if not channel.from_log]
    for item in range(panel.n_items):
        length = int(panel.lengths[item])
        low = max(0, length - room)
        rows = slice(panel.offsets[item] + low, panel.offsets[item] + length)
        offset = None if panel.event_offset is None else panel.event_offset[rows]
        there = np.flatnonzero(~np.isnan(panel.values[rows][:, plain]).all(1))
        found = value_hashes(panel.values[rows], offset)
        steps[item, (low + there) % room] = low + there
        hashes[item, (low + there) % room] = found[there]
    return steps, hashes
