"""Rows taken in: complete patches through the network, the rest into the unfinished patch; computed first, stored last.

Whatever can fail happens before anything is stored, so that an error leaves the stream as it was.

n rows · B items · C channels · G targets · P steps in a patch · Q quantiles · L layers
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from hamts.config import StreamConfig
from hamts.data.panel import Schema
from hamts.reader import StreamMemory
from hamts.stream_calibration import p_values, push_scores, row_scores, track_shift
from hamts.stream_pins import Pin, pin_window
from hamts.stream_rows import Arrived
from hamts.stream_state import COUNTERS, StreamItems
from hamts.stream_step import PatchRows, Stepper

__all__ = ["Advance", "Scored", "blocks", "last_actions_of", "open_tail"]

# rows of the table that reading a patch changes
CHANGED = (
    "tail_values",
    "action_before",
    "ahead_patch",
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


# forecast of the patch that is open, made when its first row comes
AHEAD = ("ahead_quantiles", "ahead_mean", "ahead_scale")


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
    memory: StreamMemory | None  # None where it did not change
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
        self.items.memory.entries.tidy()
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
            self._light(arrived, scored, light, grid[light] % P, touched[total == 0])
        for group in blocks(np.flatnonzero(total > 0), total, self.config.items_side_by_side):
            mine = np.flatnonzero(np.isin(owner, group)) if len(group) < len(touched) else np.arange(n)
            local = np.searchsorted(group, owner[mine])
            work = _Block(self, touched[group], first[group])
            for number in range(int(total[group[0]]) + 1):
                now = at_round[mine] == number
                work.take(arrived, scored, mine[now], local[now], grid[mine[now]] % P)
                if number < total[group[0]]:
                    self._tidy(work)
                    work.complete()
            self.staged.append(work.stage())
        return scored

    def _tidy(self, work: _Block) -> None:
        """Room for what a patch keeps. What the items held, and what was computed for them, stays till it is stored."""
        entries = self.items.memory.entries
        if entries.short():
            entries.tidy([work.memory, *(staged.memory for staged in self.staged if staged.memory is not None)])

    def _light(
        self, arrived: Arrived, scored: Scored, rows: np.ndarray, place: np.ndarray, touched: np.ndarray
    ) -> None:
        """Score rows of patches that stay unfinished; patches of which these are the first rows are forecast now."""
        if not self.config.surprise:
            return
        table, slots = self.items.table, arrived.slots[rows]
        found = {name: table[name][slots] for name in ("ahead_mean", "ahead_scale", "scores")}
        found["ahead_quantiles"] = table["ahead_quantiles"][slots, :, place]  # [n', G, Q]
        patch = (table["lead"][touched] + table["lengths"][touched]) // self.stepper.network.config.patch_steps
        missing = touched[table["ahead_patch"][touched] != patch]
        side = self.config.items_side_by_side
        for low in range(0, len(missing), side):
            part = missing[low : low + side]
            block = _Block(self, part, patch[np.searchsorted(touched, part)], ("ahead_patch", *AHEAD))
            block.look_ahead(np.arange(len(part)))
            self.staged.append(block.stage(memory=False))
            mine = np.flatnonzero(np.isin(slots, part))
            local = np.searchsorted(part, slots[mine])
            for name in ("ahead_mean", "ahead_scale"):
                found[name][mine] = block.columns[name][local]
            found["ahead_quantiles"][mine] = block.columns["ahead_quantiles"][local, :, place[mine]]
        self._score(scored, rows, arrived.values[rows], found)

    def _score(self, scored: Scored, rows: np.ndarray, values: np.ndarray, ahead: dict[str, np.ndarray]) -> None:
        """Score some rows against the forecasts of their patch, given for each of them."""
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
            if staged.memory is not None:
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

    def __init__(
        self, advance: Advance, slots: np.ndarray, first: np.ndarray, names: tuple[str, ...] = CHANGED
    ) -> None:
        self.advance, self.slots, self.patch = advance, slots, first.copy()
        table = advance.items.table
        self.columns = {name: table[name][slots] for name in names}
        if "tail_offset" in table.columns and "tail_values" in names:
            self.columns["tail_offset"] = table["tail_offset"][slots]
        self.fixed = {name: table[name][slots] for name in ("starts", "lead", "static")}
        self.memory = advance.items.memory.lend(slots)
        self.ids = [advance.items.ids[slot] for slot in slots]

    def take(self, arrived: Arrived, scored: Scored, rows: np.ndarray, local: np.ndarray, place: np.ndarray) -> None:
        """Put rows into the patch that is open now, and score them: all [n'], ``local`` in the block."""
        if not len(rows):
            return
        if self.advance.config.surprise:
            self.look_ahead(np.unique(local[self.columns["ahead_patch"][local] != self.patch[local]]))
            found = {name: self.columns[name][local] for name in ("ahead_mean", "ahead_scale", "scores")}
            found["ahead_quantiles"] = self.columns["ahead_quantiles"][local, :, place]  # [n', G, Q]
            self.advance._score(scored, rows, arrived.values[rows], found)
        self.columns["tail_values"][local, place] = arrived.values[rows]
        if arrived.offset is not None and "tail_offset" in self.columns:
            self.columns["tail_offset"][local, place] = arrived.offset[rows]

    def look_ahead(self, local: np.ndarray) -> None:
        """Forecast the open patch of some items of the block, as if nothing of it were known."""
        if not len(local):
            return
        whole = len(local) == len(self.slots)
        memory = self.memory if whole else self.memory.select(torch.from_numpy(local))
        C, P = len(self.advance.schema.channels), self.advance.stepper.network.config.patch_steps
        rows = PatchRows(
            values=np.full((len(local), P, C), np.nan),
            offset=None,
            action_before=np.full((len(local), C), np.nan),
            patch=self.patch[local],
            **{name: column[local] for name, column in self.fixed.items()},
        )
        ahead = self.advance.stepper.ahead(rows, memory)
        for name, values in zip(AHEAD, (ahead.quantiles, ahead.mean, ahead.scale), strict=True):
            self.columns[name][local] = values
        self.columns["ahead_patch"][local] = self.patch[local]

    def complete(self) -> None:
        """Read the patch, and settle what was forecast of it."""
        columns, fixed = self.columns, self.fixed
        P = self.advance.stepper.network.config.patch_steps
        over = np.full(len(self.slots), P)
        values = open_tail(columns["tail_values"], self.patch, fixed["lead"], over, self.advance.schema)
        rows = PatchRows(
            values=values,
            offset=columns.get("tail_offset"),
            action_before=columns["action_before"],
            patch=self.patch,
            **fixed,
        )
        stepped = self.advance.stepper.step(rows, self.memory, self.ids)
        self.memory = pin_window(stepped.memory, self.advance.pins, self.ids, self.patch)
        if self.advance.config.surprise:
            self._settle(values)
        columns["kept"] = columns["kept"] + stepped.kept
        columns["heard"] = columns["heard"] + stepped.heard
        columns["action_before"] = last_actions_of(values, rows.action_before, self.advance.schema)
        for name, nothing in (("tail_values", np.nan), ("tail_offset", 0.0), ("ahead_quantiles", np.nan)):
            if name in columns:
                columns[name] = np.full_like(columns[name], nothing)
        self.patch = self.patch + 1

    def stage(self, *, memory: bool = True) -> Staged:
        return Staged(self.slots, self.memory if memory else None, self.columns)

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
