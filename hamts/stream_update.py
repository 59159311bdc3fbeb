"""Rows taken in: complete patches through the network, the rest into the unfinished patch; computed first, stored last.

Whatever can fail happens before anything is stored, so that an error leaves the stream as it was.

n rows · B items · C channels · G targets · P steps in a patch · Q quantiles · L layers
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hamts.config import StreamConfig
from hamts.data.panel import Schema
from hamts.reader import StreamMemory
from hamts.stream_calibration import p_values, push_scores, row_scores, track_shift
from hamts.stream_pins import Pin, pin_window
from hamts.stream_rows import Arrived
from hamts.stream_state import COUNTERS, StreamItems
from hamts.stream_step import PatchRows, Stepper

__all__ = ["Advance", "Scored", "blocks", "last_actions_of", "open_tail", "store_ahead"]

# rows of the table that reading a patch changes
CHANGED = (
    "tail_values",
    "action_before",
    "ahead_quantiles",
    "ahead_mean",
    "ahead_scale",
    "shift",
    "shift_steps",
    "scores",
    "score_count",
    "kept",
    "heard",
)


@dataclass
class Scored:
    """Surprise of the rows that were taken, in their order."""

    scores: np.ndarray  # [n]
    p_values: np.ndarray  # [n]
    targets: np.ndarray  # [n] int64, -1 where there is no score
    drifted: np.ndarray  # [n] bool


@dataclass
class Staged:
    """Items whose patches were completed, not yet stored."""

    slots: np.ndarray  # [B]
    memory: StreamMemory
    columns: dict[str, np.ndarray]


@dataclass
class Advance:
    """One update under way."""

    items: StreamItems
    stepper: Stepper
    schema: Schema
    config: StreamConfig
    pins: list[Pin]
    staged: list[Staged] = field(default_factory=list)

    def compute(self, arrived: Arrived) -> Scored:
        """Run all complete patches; nothing is stored. Raises DataError E-NUMERIC."""
        table, P = self.items.table, self.stepper.network.config.patch_steps
        n = len(arrived.slots)
        scored = Scored(np.full(n, np.nan), np.full(n, np.nan), np.full(n, -1), np.zeros(n, dtype=bool))
        touched = arrived.touched
        lead = table["lead"][touched]
        first = (lead + table["lengths"][touched]) // P  # [B] the unfinished patch
        total = (lead + arrived.lengths) // P - first  # [B] patches that these rows complete
        owner = np.searchsorted(touched, arrived.slots)  # [n]
        grid = lead[owner] + arrived.steps  # [n] steps since the grid's origin
        at_round = grid // P - first[owner]  # [n]
        light = np.flatnonzero(total[owner] == 0)
        if len(light):
            slots = arrived.slots[light]
            found = {name: table[name][slots] for name in ("ahead_mean", "ahead_scale", "scores")}
            steps = grid[light] % P
            found["ahead_quantiles"] = table["ahead_quantiles"][slots, :, steps]  # [n', G, Q]
            self._score(scored, light, arrived.values[light], found)
        for group in blocks(np.flatnonzero(total > 0), total, self.config.items_side_by_side):
            mine = np.flatnonzero(np.isin(owner, group)) if len(group) < len(touched) else np.arange(n)
            local = np.searchsorted(group, owner[mine])
            work = _Block(self, touched[group], first[group])
            for number in range(int(total[group[0]]) + 1):
                now = at_round[mine] == number
                work.take(arrived, scored, mine[now], local[now], grid[mine[now]] % P)
                if number < total[group[0]]:
                    work.complete()
            self.staged.append(work.stage())
        return scored

    def _score(self, scored: Scored, rows: np.ndarray, values: np.ndarray, ahead: dict[str, np.ndarray]) -> None:
        """Score some rows against the forecasts of their patch, given for each of them."""
        if not self.config.surprise or not len(rows):
            return
        network = self.stepper.network
        actual = values[:, network.spec.targets]  # [n', G]
        scores, targets = row_scores(ahead["ahead_quantiles"], ahead["ahead_scale"], actual, network.config.quantiles)
        scored.scores[rows], scored.targets[rows] = scores, targets
        scored.p_values[rows] = p_values(scores, ahead["scores"])
        apart = np.abs(actual - ahead["ahead_mean"]) / ahead["ahead_scale"]  # [n', G]
        scored.drifted[rows] = (apart > self.config.drift_scales).any(1)

    def store(self, arrived: Arrived, scored: Scored) -> dict[str, int]:
        """Store everything; nothing here can fail. Returns what was counted in all."""
        table, P = self.items.table, self.stepper.network.config.patch_steps
        for staged in self.staged:
            self.items.memory.put(staged.slots, staged.memory)
            for name, column in staged.columns.items():
                table[name][staged.slots] = column
        slots, steps = arrived.slots, arrived.steps
        before = table["lengths"][arrived.touched]
        lead = table["lead"][arrived.touched]
        complete = (lead + arrived.lengths) // P - (lead + before) // P  # [B]
        table["lengths"][arrived.touched] = arrived.lengths
        grid = table["lead"][slots] + steps  # [n]
        is_open = grid // P == (table["lead"][slots] + table["lengths"][slots]) // P  # [n]
        table["tail_values"][slots[is_open], grid[is_open] % P] = arrived.values[is_open]
        if arrived.offset is not None and "tail_offset" in table.columns:
            table["tail_offset"][slots[is_open], grid[is_open] % P] = arrived.offset[is_open]
        known = ~np.isnan(arrived.values[:, self.stepper.network.spec.targets])  # [n, G]
        np.logical_or.at(table["seen"], slots, known)
        room = table["recent_steps"].shape[1]
        fresh = steps >= table["lengths"][slots] - room
        table["recent_steps"][slots[fresh], steps[fresh] % room] = steps[fresh]
        table["recent_hashes"][slots[fresh], steps[fresh] % room] = arrived.hashes[fresh]
        return self._count(arrived, scored, complete)

    def _count(self, arrived: Arrived, scored: Scored, complete: np.ndarray) -> dict[str, int]:
        counts = self.items.table["counts"]  # [I, counters]
        place = {name: number for number, name in enumerate(COUNTERS)}
        np.add.at(counts[:, place["rows"]], arrived.slots, 1)
        for name, (_, slots) in arrived.kinds.items():
            np.add.at(counts[:, place[name]], slots, 1)
        counts[arrived.touched, place["gap_steps"]] += arrived.gaps
        counts[arrived.touched, place["patches"]] += complete
        np.add.at(counts[:, place["drifted"]], arrived.slots[scored.drifted], 1)
        totals = {name: len(positions) for name, (positions, _) in arrived.kinds.items()}
        return {
            **dict.fromkeys(COUNTERS, 0),
            **totals,
            "rows": len(arrived.slots),
            "gap_steps": int(arrived.gaps.sum()),
            "patches": int(complete.sum()),
            "drifted": int(scored.drifted.sum()),
        }


class _Block:
    """Items that complete the same number of patches, on copies of their rows and a view of their memory."""

    def __init__(self, advance: Advance, slots: np.ndarray, first: np.ndarray) -> None:
        self.advance, self.slots, self.patch = advance, slots, first.copy()
        table = advance.items.table
        self.columns = {name: table[name][slots] for name in CHANGED}
        if "tail_offset" in table.columns:
            self.columns["tail_offset"] = table["tail_offset"][slots]
        self.fixed = {name: table[name][slots] for name in ("starts", "lead", "static")}
        self.memory = advance.items.memory.select(slots)
        self.ids = [advance.items.ids[slot] for slot in slots]

    def take(self, arrived: Arrived, scored: Scored, rows: np.ndarray, local: np.ndarray, place: np.ndarray) -> None:
        """Put rows into the patch that is open now, and score them: all [n'], ``local`` in the block."""
        if not len(rows):
            return
        found = {name: self.columns[name][local] for name in ("ahead_mean", "ahead_scale", "scores")}
        found["ahead_quantiles"] = self.columns["ahead_quantiles"][local, :, place]  # [n', G, Q]
        self.advance._score(scored, rows, arrived.values[rows], found)
        self.columns["tail_values"][local, place] = arrived.values[rows]
        if arrived.offset is not None and "tail_offset" in self.columns:
            self.columns["tail_offset"][local, place] = arrived.offset[rows]

    def complete(self) -> None:
        """Read the patch, settle what was forecast of it, and forecast the next."""
        stepper, columns = self.advance.stepper, self.columns
        rows = self._rows(fill=True)
        stepped = stepper.step(rows, self.memory, self.ids)
        self.memory = pin_window(stepped.memory, self.advance.pins, self.ids, self.patch)
        if self.advance.config.surprise:
            self._settle(rows.values)
        columns["kept"] = columns["kept"] + stepped.kept
        columns["heard"] = columns["heard"] + stepped.heard
        columns["action_before"] = last_actions_of(rows.values, rows.action_before, self.advance.schema)
        columns["tail_values"] = np.full_like(columns["tail_values"], np.nan)
        if "tail_offset" in columns:
            columns["tail_offset"] = np.zeros_like(columns["tail_offset"])
        self.patch = self.patch + 1
        if self.advance.config.surprise:
            ahead = stepper.ahead(self._rows(fill=False), self.memory)
            columns["ahead_quantiles"], columns["ahead_mean"] = ahead.quantiles, ahead.mean
            columns["ahead_scale"] = ahead.scale

    def stage(self) -> Staged:
        return Staged(self.slots, self.memory, self.columns)

    def _rows(self, *, fill: bool) -> PatchRows:
        columns, P = self.columns, self.advance.stepper.network.config.patch_steps
        values = columns["tail_values"]
        if fill:
            begun = np.full(len(self.slots), P)
            values = open_tail(values, self.patch, self.fixed["lead"], begun, self.advance.schema)
        return PatchRows(
            values=values,
            offset=columns.get("tail_offset"),
            action_before=columns["action_before"],
            patch=self.patch,
            **self.fixed,
        )

    def _settle(self, values: np.ndarray) -> None:
        """Scores of the whole patch into the ring, and what its quantiles missed into the shifts."""
        network, columns = self.advance.stepper.network, self.columns
        levels, targets = network.config.quantiles, network.spec.targets
        B, P, _ = values.shape
        actual = values[:, :, targets]  # [B, P, G]
        flat = columns["ahead_quantiles"].transpose(0, 2, 1, 3).reshape(B * P, len(targets), -1)  # [B P, G, Q]
        scale = np.repeat(columns["ahead_scale"], P, axis=0)  # [B P, G]
        scores, _ = row_scores(flat, scale, actual.reshape(B * P, -1), levels)
        columns["scores"], columns["score_count"] = push_scores(
            columns["scores"], columns["score_count"], scores.reshape(B, P)
        )
        columns["shift"], steps = track_shift(
            columns["shift"], columns["ahead_quantiles"], columns["ahead_scale"], actual.transpose(0, 2, 1),
            levels=levels, rate=self.advance.config.calibration_rate,
        )  # fmt: skip
        columns["shift_steps"] = columns["shift_steps"] + steps


def blocks(rows: np.ndarray, total: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Rows with the same number of patches to read, at most ``side`` at once, rising."""
    for count in np.unique(total[rows]):
        same = rows[total[rows] == count]
        for low in range(0, len(same), side):
            yield same[low : low + side]


def open_tail(values: np.ndarray, patch: np.ndarray, lead: np.ndarray, begun: np.ndarray, schema: Schema) -> np.ndarray:
    """Rows of a patch as a panel would hold them: no event of the log is 0, also where no row came, [B, P, C].

    Args:
        begun: [B] steps of the patch that are over.
    """
    logged = [place for place, channel in enumerate(schema.channels) if channel.from_log]
    if not logged:
        return values
    B, P, _ = values.shape
    step = np.arange(P)
    over = (step < begun[:, None]) & (patch[:, None] * P + step >= lead[:, None])  # [B, P]
    filled = values.copy()
    for channel in logged:
        column = filled[:, :, channel]
        filled[:, :, channel] = np.where(over & np.isnan(column), 0.0, column)
    return filled


def last_actions_of(values: np.ndarray, before: np.ndarray, schema: Schema) -> np.ndarray:
    """Last observed value of every action channel after a patch, [B, P, C], [B, C] -> [B, C]."""
    after = before.copy()
    for channel in schema.indices("action"):
        for step in range(values.shape[1]):
            column = values[:, step, channel]
            after[:, channel] = np.where(np.isnan(column), after[:, channel], column)
    return after


def store_ahead(items: StreamItems, stepper: Stepper, slots: np.ndarray, side: int) -> None:
    """Forecast the unfinished patch of some items, as if nothing of it were known."""
    table, P = items.table, stepper.network.config.patch_steps
    for low in range(0, len(slots), side):
        part = slots[low : low + side]
        tail = table["tail_values"][part]
        rows = PatchRows(
            values=np.full_like(tail, np.nan),
            offset=None,
            action_before=table["action_before"][part],
            patch=(table["lead"][part] + table["lengths"][part]) // P,
            starts=table["starts"][part],
            lead=table["lead"][part],
            static=table["static"][part],
        )
        ahead = stepper.ahead(rows, items.memory.select(part))
        table["ahead_quantiles"][part], table["ahead_mean"][part] = ahead.quantiles, ahead.mean
        table["ahead_scale"][part] = ahead.scale
