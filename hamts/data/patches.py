"""From a Panel to chunks of patches: one tensor whose rows are patches, and consecutive rows of it.

B items in a batch · I items · R rows (patches) of all items · C channels · N patches · P steps in a patch
F calendar features
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hamts.data.calendar import calendar_features
from hamts.data.clock import as_numbers, future_times, lead_steps, step_times
from hamts.data.constants import constant
from hamts.data.panel import KNOWN_AHEAD, Panel, Schema

__all__ = [
    "Chunk",
    "PatchStore",
    "build_store",
    "find_tags",
    "future_tags",
    "horizon_patches",
    "irregular_unit",
    "last_actions",
]


@dataclass(frozen=True)
class Chunk:
    """Consecutive patches of a batch of items, raw; 0 where nothing was observed."""

    values: torch.Tensor  # [B, C, N, P] float64; 0 where not observed
    observed: torch.Tensor  # [B, C, N, P] bool
    tags: torch.Tensor  # [B, C, N, P] bool
    event_offset: torch.Tensor  # [B, C, N, P] float32
    calendar: torch.Tensor  # [B, N, F] float32
    present: torch.Tensor  # [B, N] bool
    complete: torch.Tensor  # [B, C, N] bool: the patch is over for this channel, it may be routed
    position: torch.Tensor  # [B, N] float64, in patches since the stream's origin
    elapsed: torch.Tensor  # [B, N] float32, in patches
    static_values: torch.Tensor  # [B, E] float32
    static_codes: torch.Tensor  # [B, E'] int64
    truth: torch.Tensor  # [B, C, N, P] float64; NaN where there is none. Only for losses and scores
    horizon: torch.Tensor | None = None  # [B, N, P] bool: steps to be forecast; None in the observed past


@dataclass(frozen=True)
class PatchStore:
    """All items' patches, aligned to each item's grid origin.

    Row r of item i is patch ``first_patch[i] + r - first_row[i]``.
    """

    values: torch.Tensor  # [R, P, C] float64, NaN missing
    tags: torch.Tensor  # [R, P, C] bool
    event_offset: torch.Tensor | None  # [R, P, C] float32
    calendar: torch.Tensor  # [R, F] float32
    position: torch.Tensor  # [R] float64
    elapsed: torch.Tensor  # [R] float32
    first_row: torch.Tensor  # [I] int64
    row_count: torch.Tensor  # [I] int64, rows with room for the horizon included
    first_patch: torch.Tensor  # [I] int64, index of the first stored patch on the item's grid
    lead: torch.Tensor  # [I] int64, steps between the grid origin and the item's first row
    lengths: torch.Tensor  # [I] int64, observed steps since the item's first row
    static_values: torch.Tensor  # [I, E] float32
    static_codes: torch.Tensor  # [I, E'] int64
    roles: tuple[str, ...]

    @property
    def patch_steps(self) -> int:
        return self.values.shape[1]

    @property
    def n_items(self) -> int:
        return len(self.first_row)

    def grid_steps(self, items: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Steps of an item, counted from its grid origin: [B] -> [B]."""
        return steps + self.lead[items]

    def window(self, items: torch.Tensor, first: torch.Tensor, patches: int) -> Chunk:
        """Consecutive complete patches of the past.

        Args:
            items: [B] int64.
            first: patch index of the first one on each item's grid, [B] int64; may be negative: those are absent.
            patches: N.
        """
        rows, inside = self._rows(items, first, patches)
        values = self.values[rows].permute(0, 3, 1, 2)  # [B, C, N, P]
        values = torch.where(inside[:, None, :, None], values, torch.nan)  # [B, C, N, P]
        observed = ~torch.isnan(values)  # [B, C, N, P]
        complete = inside[:, None].expand(-1, values.shape[1], -1)  # [B, C, N]
        return self._chunk(items, rows, inside, values, observed, complete)

    def horizon(
        self,
        items: torch.Tensor,
        cutoffs: torch.Tensor,
        steps: int,
        reveal: torch.Tensor | None = None,
        patches: int | None = None,
    ) -> Chunk:
        """The unfinished patch at each cutoff, and the patches to forecast.

        Targets and past channels are observed before the cutoff only; future and action channels up to the horizon's
        end; event channels before the cutoff, and beyond it where ``reveal`` says so.

        Args:
            items: [B] int64.
            cutoffs: observed steps of each item, [B] int64: the forecast begins with step ``cutoffs`` (0-based).
            steps: F, steps to forecast.
            reveal: whether events of the horizon are known, [B] bool.
            patches: N, where the caller knows it and the device need not be asked.
        """
        P = self.patch_steps
        origin = self.grid_steps(items, cutoffs)  # [B]
        first, begun = origin // P, origin % P  # [B], [B]
        patches = horizon_patches(begun, steps, P) if patches is None else patches
        rows, inside = self._rows(items, first, patches)
        values = self.values[rows].permute(0, 3, 1, 2)  # [B, C, N, P]
        values = torch.where(inside[:, None, :, None], values, torch.nan)  # [B, C, N, P]
        step = torch.arange(patches * P, device=items.device).view(patches, P)  # [N, P]
        step = step - begun[:, None, None]  # [B, N, P] counted from the cutoff
        past, ahead = step < 0, (step >= 0) & (step < steps)  # 2 x [B, N, P]
        known_roles = constant([role in KNOWN_AHEAD for role in self.roles], torch.bool, items.device)
        event_roles = constant([role == "event" for role in self.roles], torch.bool, items.device)[:, None, None]
        open_ahead = known_roles[:, None, None].expand(len(items), -1, -1, -1)  # [B, C, 1, 1]
        if reveal is not None:
            open_ahead = open_ahead | (event_roles & reveal[:, None, None, None])  # [B, C, 1, 1]
        seen = past[:, None] | (ahead[:, None] & open_ahead)  # [B, C, N, P]
        observed = seen & ~torch.isnan(values)  # [B, C, N, P]
        complete = (seen | ~ahead[:, None]).all(-1) & open_ahead[..., 0]  # [B, C, N]
        present = torch.ones_like(inside)  # [B, N]
        chunk = self._chunk(items, rows, present, values, observed, complete)
        return replace(chunk, horizon=ahead)

    def _rows(self, items: torch.Tensor, first: torch.Tensor, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers, clamped into each item, [B, N], and which were inside, [B, N]."""
        local = (first - self.first_patch[items])[:, None] + torch.arange(patches, device=items.device)  # [B, N]
        count = self.row_count[items][:, None]  # [B, 1]
        inside = (local >= 0) & (local < count)  # [B, N]
        return self.first_row[items][:, None] + local.clamp_min(0).minimum(count - 1), inside

    def _chunk(
        self,
        items: torch.Tensor,
        rows: torch.Tensor,
        present: torch.Tensor,
        values: torch.Tensor,
        observed: torch.Tensor,
        complete: torch.Tensor,
    ) -> Chunk:
        offset = torch.zeros(values.shape, dtype=torch.float32, device=values.device)  # [B, C, N, P]
        if self.event_offset is not None:
            offset = torch.where(observed, self.event_offset[rows].permute(0, 3, 1, 2), 0.0)  # [B, C, N, P]
        return Chunk(
            values=torch.where(observed, values, 0.0),
            observed=observed,
            tags=self.tags[rows].permute(0, 3, 1, 2) & observed,
            event_offset=offset,
            calendar=self.calendar[rows],
            present=present,
            complete=complete,
            position=self.position[rows],
            elapsed=self.elapsed[rows],
            static_values=self.static_values[items],
            static_codes=self.static_codes[items],
            truth=values,
        )


def horizon_patches(begun: torch.Tensor, steps: int, patch_steps: int) -> int:
    """Patches that hold the steps begun of an unfinished patch, [B], and so many more."""
    return (int(begun.max()) + steps + patch_steps - 1) // patch_steps


def find_tags(values: np.ndarray, offsets: np.ndarray, schema: Schema) -> np.ndarray:
    """Steps where an event happens or an action changes, [S, C] bool.

    An event column tags its steps other than zero; an action column tags the steps at which its value differs from
    the last observed one of the same item.
    """
    tags = np.zeros(values.shape, dtype=bool)  # [S, C]
    for channel in schema.indices("event"):
        column = values[:, channel]  # [S]
        tags[:, channel] = ~np.isnan(column) & (column != 0)
    starts = np.zeros(len(values), dtype=bool)  # [S]
    starts[offsets[:-1][offsets[:-1] < len(values)]] = True
    item = np.cumsum(starts)  # [S]
    for channel in schema.indices("action"):
        column = values[:, channel]  # [S]
        seen = np.flatnonzero(~np.isnan(column))
        changed = (np.diff(column[seen]) != 0) & (np.diff(item[seen]) == 0)
        tags[seen[1:][changed], channel] = True
    return tags


def build_store(
    panel: Panel,
    *,
    patch_steps: int,
    extra_steps: int,
    future: np.ndarray | None = None,
    time_unit: float | None = None,
) -> PatchStore:
    """Lay a panel on its patch grid, with room for a horizon after each item.

    Args:
        extra_steps: steps after each item's last row for which calendar and known-ahead values are needed.
        future: known-ahead values of those steps, [I, extra_steps, C], NaN elsewhere.
        time_unit: on an irregular clock, the time that counts as one patch; None: ``irregular_unit`` of this panel.
    """
    P, C = patch_steps, panel.values.shape[1]
    lead = lead_steps(panel, patch_steps=P)  # [I]
    lengths = panel.lengths  # [I]
    rows = (lead + lengths + extra_steps + P - 1) // P  # [I]
    first_row = np.concatenate([[0], np.cumsum(rows)[:-1]])  # [I]
    # destination of every source step in the padded layout
    shift = first_row * P + lead - panel.offsets[:-1]  # [I]
    place = np.arange(len(panel.values)) + np.repeat(shift, lengths)  # [S]
    total = int(rows.sum())
    values = np.full((total * P, C), np.nan)  # [R P, C]
    values[place] = panel.values
    tags = np.zeros((total * P, C), dtype=bool)  # [R P, C]
    tags[place] = find_tags(panel.values, panel.offsets, panel.schema)
    offset = None
    if panel.event_offset is not None:
        offset = np.zeros((total * P, C), dtype=np.float32)  # [R P, C]
        offset[place] = np.nan_to_num(panel.event_offset)
    ends = first_row * P + lead + lengths  # [I]
    if future is not None:
        ahead = (ends[:, None] + np.arange(future.shape[1])).ravel()  # [I F]
        values[ahead] = future.reshape(-1, C)
        tags[ahead] = future_tags(last_actions(panel), future, panel.schema).reshape(-1, C)
    position, elapsed, calendar = _clock(panel, rows, lead, P, time_unit)
    codes, numeric = _static(panel)
    return PatchStore(
        values=torch.from_numpy(values.reshape(total, P, C)),
        tags=torch.from_numpy(tags.reshape(total, P, C)),
        event_offset=None if offset is None else torch.from_numpy(offset.reshape(total, P, C)),
        calendar=torch.from_numpy(calendar),
        position=torch.from_numpy(position),
        elapsed=torch.from_numpy(elapsed.astype(np.float32)),
        first_row=torch.from_numpy(first_row.astype(np.int64)),
        row_count=torch.from_numpy(rows.astype(np.int64)),
        first_patch=torch.zeros(panel.n_items, dtype=torch.int64),
        lead=torch.from_numpy(lead.astype(np.int64)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        static_values=torch.from_numpy(numeric),
        static_codes=torch.from_numpy(codes),
        roles=tuple(c.role for c in panel.schema.channels),
    )


def last_actions(panel: Panel) -> np.ndarray:
    """Last observed value of every action channel, NaN in all others: [I, C]."""
    last = np.full((panel.n_items, panel.values.shape[1]), np.nan)  # [I, C]
    for channel in panel.schema.indices("action"):
        column = panel.values[:, channel]  # [S]
        known = np.where(np.isnan(column), -1, np.arange(len(column)))  # [S]
        newest = np.maximum.reduceat(known, panel.offsets[:-1])  # [I]
        last[:, channel] = np.where(newest >= 0, column[newest], np.nan)
    return last


def future_tags(last: np.ndarray, future: np.ndarray, schema: Schema) -> np.ndarray:
    """Tags of planned steps, the first one judged against the last observed action.

    last [I, C] of ``last_actions``, future [I, F, C] -> [I, F, C] bool.
    """
    items, F, C = future.shape
    joined = np.concatenate([last[:, None], future], axis=1)  # [I, 1 + F, C]
    tags = find_tags(joined.reshape(-1, C), np.arange(items + 1) * (F + 1), schema)  # [I (1 + F), C]
    return tags.reshape(items, F + 1, C)[:, 1:]


def _clock(
    panel: Panel, rows: np.ndarray, lead: np.ndarray, P: int, time_unit: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position and elapsed time in patches, and calendar features, of every row: [R], [R], [R, F]."""
    item = np.repeat(np.arange(panel.n_items), rows)  # [R]
    index = np.arange(len(item)) - np.repeat(np.cumsum(rows) - rows, rows)  # [R] patch of its item
    zone = panel.schema.dialect.time_zone
    if panel.times is None:
        times = step_times(panel.schema, np.asarray(panel.starts)[item], index * P - lead[item])
        return index.astype(np.float64), np.ones(len(index)), calendar_features(times, panel.schema.frequency, zone)
    if P != 1:
        raise ValueError(f"patch_steps must be 1 on an irregular clock. Got {P}.")
    times = _irregular_times(panel, item, index)  # [R]
    unit = irregular_unit(panel) if time_unit is None else time_unit
    stamps = as_numbers(times)  # [R]
    position = (stamps - stamps[index == 0][item]) / unit  # [R]
    elapsed = np.where(index == 0, 1.0, np.diff(stamps, prepend=0) / unit)  # [R]
    return position, np.maximum(elapsed, 1e-6), calendar_features(times, panel.schema.frequency, zone)


def _irregular_times(panel: Panel, item: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Time of every row, each item continued evenly beyond its last: [R]."""
    assert panel.times is not None
    ahead = index - panel.lengths[item]  # [R]
    times = np.empty(len(item), dtype=panel.times.dtype)  # [R]
    times[ahead < 0] = panel.times
    if (ahead >= 0).any():
        times[ahead >= 0] = future_times(panel, int(ahead.max()) + 1)[item[ahead >= 0], ahead[ahead >= 0]]
    return times


def irregular_unit(panel: Panel) -> float:
    """Median time between two rows of an item of an irregular clock: what counts as one step. 1 without one."""
    assert panel.times is not None
    gaps = np.diff(as_numbers(panel.times))  # [S - 1]
    inside = np.ones(len(gaps), dtype=bool)
    inside[panel.offsets[1:-1] - 1] = False
    gaps = gaps[inside & (gaps > 0)]
    return float(np.median(gaps)) if len(gaps) else 1.0


def _static(panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Codes [I, E'] and standardised numbers [I, E] of the static columns."""
    kinds = [c.kind for c in panel.schema.static]
    table = panel.static_values if panel.static_values is not None else np.zeros((panel.n_items, 0))
    codes = table[:, [i for i, k in enumerate(kinds) if k == "categorical"]]
    numeric = table[:, [i for i, k in enumerate(kinds) if k != "categorical"]]
    return np.nan_to_num(codes).astype(np.int64), np.nan_to_num(numeric).astype(np.float32)
