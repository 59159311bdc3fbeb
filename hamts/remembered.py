"""What is kept of each item once its history was read: its memory, its unfinished patch and its place on the clock.

Enough to forecast without the history, whose rows are not here.

I items · C channels · G targets · P steps in a patch · E static columns · F future steps · Q quantiles · N patches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from hamts.data.calendar import calendar_features
from hamts.data.clock import as_numbers, future_times, step_times
from hamts.data.cutoffs import first_observed
from hamts.data.panel import Panel, Schema
from hamts.data.patches import PatchStore, build_store, future_tags, last_actions
from hamts.errors import DataError
from hamts.nn.mixers_neighbours import NeighbourMemory
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import Rollout, forecast_from, roll

__all__ = [
    "Remembered",
    "flatten_tensors",
    "forecast_remembered",
    "horizon_store",
    "memory_parts",
    "read_panel",
    "unflatten_tensors",
]

ITEMS_SIDE_BY_SIDE, TOKENS_SIDE_BY_SIDE, MOST_TOKENS = 128, 2**15, 2**18


@dataclass(frozen=True)
class Remembered:
    """Items after their last row; everything needed to forecast them, and to read on."""

    item_ids: np.ndarray  # [I]
    starts: np.ndarray  # [I] time of the first row
    lengths: np.ndarray  # [I] int64, steps read
    lead: np.ndarray  # [I] int64, steps between the origin of the patch grid and the first row
    memory: StreamMemory  # of I items, after the last complete patch
    tail_values: np.ndarray  # [I, P, C] float64: rows of the unfinished patch; NaN where there are none
    tail_tags: np.ndarray  # [I, P, C] bool
    tail_offset: np.ndarray | None  # [I, P, C] float32, with an event log only
    last_action: np.ndarray  # [I, C] float64: last observed value of action channels, NaN elsewhere
    seen: np.ndarray  # [I, G] bool: whether the target was ever observed
    static_values: np.ndarray | None  # [I, E] float64
    last_times: np.ndarray | None  # [I, 2] times of two rows, the later one the last; irregular clocks only
    last_position: np.ndarray | None  # [I] float64, of the last row; irregular clocks only
    share: float  # budget share under which the history was read
    usage_share: float  # written / observed tokens

    def clock(self, schema: Schema) -> Panel:
        """A panel that knows ids and times of the items but none of their values."""
        counts = self.lengths if self.last_times is None else np.full(len(self.lengths), 2)
        return Panel(
            values=np.empty((0, len(schema.channels))),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            item_ids=self.item_ids,
            starts=self.starts,
            schema=schema,
            times=None if self.last_times is None else self.last_times.ravel(),
            static_values=self.static_values,
        )


def read_panel(
    network: HAMNetwork,
    panel: Panel,
    policies: Policy | Sequence[Policy],
    *,
    share: float,
    time_unit: float,
    cutoffs: Sequence[np.ndarray] | None = None,
    steps: int = 1,
) -> tuple[Remembered, Rollout]:
    """Read every item to its end; forecast at some cutoffs on the way.

    Args:
        share: budget share that the policies ask for, kept as a fact.
        cutoffs: observed steps of each item, [I] arrays; the rows after them must be in the panel.
    """
    P = network.config.patch_steps
    store = build_store(panel, patch_steps=P, extra_steps=1, time_unit=time_unit)
    nothing = [np.zeros(0, dtype=np.int64)] * panel.n_items
    result = roll(network, store, cutoffs=nothing if cutoffs is None else cutoffs, steps=steps, policies=policies)
    assert result.memory is not None
    lead, lengths = store.lead.numpy(), panel.lengths
    row = store.first_row.numpy() + (lead + lengths) // P  # [I] of the unfinished patch; there is room for one
    remembered = Remembered(
        item_ids=panel.item_ids,
        starts=panel.starts,
        lengths=lengths,
        lead=lead,
        memory=result.memory,
        tail_values=store.values[row].numpy(),
        tail_tags=store.tags[row].numpy(),
        tail_offset=None if store.event_offset is None else store.event_offset[row].numpy(),
        last_action=last_actions(panel),
        seen=first_observed(panel) < lengths[:, None],
        static_values=panel.static_values,
        last_times=_last_times(panel),
        last_position=None if panel.times is None else store.position[row - 1].numpy(),
        share=share,
        usage_share=result.usage_share,
    )
    return remembered, result


def _last_times(panel: Panel) -> np.ndarray | None:
    """Two times per item of an irregular clock, as far apart as the item's rows typically are: [I, 2]."""
    if panel.times is None:
        return None
    last = panel.times[panel.offsets[1:] - 1]  # [I]
    gap = future_times(panel, 1)[:, 0] - last  # [I]
    return np.stack([last - gap, last], axis=1)


def forecast_remembered(
    network: HAMNetwork,
    remembered: Remembered,
    schema: Schema,
    *,
    future: np.ndarray,
    share: float,
    time_unit: float,
) -> np.ndarray:
    """Quantiles of the steps after each item's last row, [I, G, F, Q] float64; NaN for targets never observed.

    Args:
        future: known-ahead values of those steps, [I, F, C]; NaN where nothing is known.

    Raises DataError E-HORIZON-MEM where one item alone would not fit into memory.
    """
    items_in_all, F, C = future.shape
    tokens = C * (F // network.config.patch_steps + 2)
    if tokens > MOST_TOKENS:
        raise DataError(
            "E-HORIZON-MEM",
            f"{F} steps of {C} channels are {tokens:,} tokens of an item, more than {MOST_TOKENS:,} at once.",
            fix="Ask for fewer steps.",
        )
    store = horizon_store(network, remembered, schema, future, time_unit)
    side = int(np.clip(TOKENS_SIDE_BY_SIDE // tokens, 1, ITEMS_SIDE_BY_SIDE))
    parts = []
    for low in range(0, items_in_all, side):
        items = torch.arange(low, min(low + side, items_in_all))  # [B]
        policy = network.policy(torch.full((len(items),), share))
        # a pass of one patch would write what it keeps into the pool that these items share with others
        memory = remembered.memory.select(items).side_by_side()
        quantiles, _ = forecast_from(network, store, items, store.lengths[items], memory, F, policy, reveal_events=True)
        parts.append(quantiles.cpu().numpy())
    answer = np.concatenate(parts)  # [I, G, F, Q]
    answer[~remembered.seen] = np.nan
    return answer


def horizon_store(
    network: HAMNetwork, remembered: Remembered, schema: Schema, future: np.ndarray, time_unit: float
) -> PatchStore:
    """The unfinished patch and the steps ahead of every item, N patches each."""
    items, F, C = future.shape
    P = network.config.patch_steps
    first, begun = np.divmod(remembered.lead + remembered.lengths, P)  # 2 x [I]
    N = -(-(int(begun.max()) + F) // P)
    values = np.full((items, N * P, C), np.nan)  # [I, N P, C]
    tags = np.zeros(values.shape, dtype=bool)  # [I, N P, C]
    values[:, :P], tags[:, :P] = remembered.tail_values, remembered.tail_tags
    item, ahead = np.arange(items)[:, None], begun[:, None] + np.arange(F)  # [I, 1], [I, F]
    values[item, ahead] = future
    tags[item, ahead] = future_tags(remembered.last_action, future, schema)
    offset = None
    if remembered.tail_offset is not None:
        offset = np.zeros(values.shape, dtype=np.float32)  # [I, N P, C]
        offset[:, :P] = remembered.tail_offset
    position, elapsed, calendar = _clock_ahead(remembered, schema, first, N, P, time_unit)
    kinds = np.array([column.kind == "categorical" for column in schema.static], dtype=bool)  # [E]
    static = remembered.static_values if remembered.static_values is not None else np.zeros((items, 0))  # [I, E]
    tensor = torch.from_numpy
    return PatchStore(
        values=tensor(values.reshape(items * N, P, C)),
        tags=tensor(tags.reshape(items * N, P, C)),
        event_offset=None if offset is None else tensor(offset.reshape(items * N, P, C)),
        calendar=tensor(calendar),
        position=tensor(position.ravel()),
        elapsed=tensor(elapsed.ravel().astype(np.float32)),
        first_row=torch.arange(items) * N,
        row_count=torch.full((items,), N),
        first_patch=tensor(first.astype(np.int64)),
        lead=tensor(remembered.lead.astype(np.int64)),
        lengths=tensor(remembered.lengths.astype(np.int64)),
        static_values=tensor(np.nan_to_num(static[:, ~kinds]).astype(np.float32)),
        static_codes=tensor(np.nan_to_num(static[:, kinds]).astype(np.int64)),
        roles=tuple(channel.role for channel in schema.channels),
    )


def _clock_ahead(
    remembered: Remembered, schema: Schema, first: np.ndarray, N: int, P: int, time_unit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position and elapsed time in patches, [I, N] each, and calendar features, [I N, F], of the patches ahead."""
    zone = schema.dialect.time_zone
    index = first[:, None] + np.arange(N)  # [I, N]
    if remembered.last_times is None or remembered.last_position is None:
        times = step_times(schema, remembered.starts[:, None], index * P - remembered.lead[:, None])
        position, elapsed = index.astype(np.float64), np.ones(index.shape)
    else:
        times = future_times(remembered.clock(schema), N)
        last = as_numbers(remembered.last_times[:, 1:])  # [I, 1]
        stamps = np.concatenate([last, as_numbers(times)], axis=1)  # [I, 1 + N]
        position = remembered.last_position[:, None] + (stamps[:, 1:] - last) / time_unit
        elapsed = np.maximum(np.diff(stamps, axis=1) / time_unit, 1e-6)
    return position, elapsed, calendar_features(times.ravel(), schema.frequency, zone)


# --- bytes


def memory_parts(memory: StreamMemory) -> dict[str, np.ndarray]:
    """Bytes of the live tensors of each item's memory, by part, [I] each."""
    items = len(memory.scale.sums)
    parts = {name: np.zeros(items, dtype=np.int64) for name in ("scratchpad", "state", "window")}  # [I] each
    for layer in memory.layers:
        _add_layer_bytes(layer, parts)
    return {**parts, "normaliser": np.full(items, _bytes_per_item(memory.scale))}


def _add_layer_bytes(layer: Any, parts: dict[str, np.ndarray]) -> None:
    """Add what one layer holds; rows beyond an item's own entries only pad it to its neighbours."""
    for name in (f.name for f in fields(layer)):
        value = getattr(layer, name)
        if hasattr(value, "alive"):
            if getattr(layer, "pool", None) is None:
                row = sum(t.shape[2:].numel() * t.element_size() for t in flatten_tensors(value).values())
            else:
                row = sum(part[0].nbytes for part in layer.pool.parts.values())
            parts["scratchpad"] += value.alive.sum(1).cpu().numpy() * row
        elif isinstance(layer, NeighbourMemory):
            if name == "layer":
                _add_layer_bytes(value, parts)
            else:
                parts["scratchpad"] += _bytes_per_item(value)
        else:
            parts["window" if name in ("pending", "recent") else "state"] += _bytes_per_item(value)


def _bytes_per_item(container: Any) -> int:
    tensors = flatten_tensors(container).values()
    return sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in tensors)


# --- trees of tensors as flat names, for storage


def flatten_tensors(container: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dataclasses and lists under its dotted path, ``layers.0.state``."""
    if isinstance(container, torch.Tensor):
        return {prefix: container}
    if isinstance(container, list | tuple):
        parts: list[tuple[str, Any]] = [(str(i), part) for i, part in enumerate(container)]
    elif is_dataclass(container):
        parts = [(f.name, getattr(container, f.name)) for f in fields(container)]
    else:
        return {}
    flat: dict[str, torch.Tensor] = {}
    for name, part in parts:
        flat |= flatten_tensors(part, f"{prefix}.{name}" if prefix else name)
    return flat


def unflatten_tensors(template: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """A container like ``template`` with these tensors. Raises KeyError where one is missing."""
    if template is None:
        return None
    if isinstance(template, torch.Tensor):
        return tensors[prefix]
    if isinstance(template, list | tuple):
        return type(template)(
            unflatten_tensors(part, tensors, f"{prefix}.{i}" if prefix else str(i)) for i, part in enumerate(template)
        )
    changed = {
        f.name: unflatten_tensors(getattr(template, f.name), tensors, f"{prefix}.{f.name}" if prefix else f.name)
        for f in fields(template)
    }
    return replace(template, **changed)
