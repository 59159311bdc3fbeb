"""Rows of a frame, sorted by item and time, and set on the grid of their clock. numpy only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hamts.errors import DataError

__all__ = ["Rows", "drop_items", "merge_duplicates", "on_grid", "sort_rows"]

# a grid this much larger than its rows is a wrong clock, not a stream with gaps
MAX_GRID_RATIO = 100
MAX_GRID_ROWS = 10_000_000


@dataclass(frozen=True)
class Rows:
    """Rows sorted by item (in order of first appearance) and time.

    Attributes:
        times: int64 [rows].
        offsets: int64 [I + 1].
        values: float64 [rows, C].
        source: position of each row in the caller's frame, int64 [rows], or None where it is the same.
        items: which of the frame's items these are, int64 [I].
    """

    times: np.ndarray
    offsets: np.ndarray
    values: np.ndarray
    source: np.ndarray | None
    items: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def codes(self) -> np.ndarray:
        """Item of each row, int64 [rows]."""
        return np.repeat(np.arange(len(self.items)), self.lengths)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where these rows are in the caller's frame."""
        return rows if self.source is None else self.source[rows]


def sort_rows(codes: np.ndarray, times: np.ndarray, values: np.ndarray) -> Rows:
    """Sort by item and time, only where needed; rows of the same item and time keep the order of the frame."""
    counts = np.bincount(codes)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    items = np.arange(len(counts))
    same_item = codes[1:] == codes[:-1]
    if ((codes[1:] > codes[:-1]) | (same_item & (times[1:] >= times[:-1]))).all():
        return Rows(times, offsets, values, None, items)
    order = np.lexsort((times, codes))
    return Rows(times[order], offsets, values[order], order, items)


def repeated(rows: Rows) -> np.ndarray:
    """Whether each row has the item and time of the row before it, [rows] bool."""
    again = np.zeros(len(rows.times), dtype=bool)
    again[1:] = rows.times[1:] == rows.times[:-1]
    again[rows.offsets[1:-1]] = False
    return again


def merge_duplicates(rows: Rows, again: np.ndarray, *, how: str, numeric: np.ndarray) -> Rows:
    """One row per item and time: the last one, or the mean of what is there in the ``numeric`` channels [C] bool."""
    first = np.flatnonzero(~again)
    last = np.append(first[1:], len(again)) - 1
    values = rows.values[last]
    if how == "mean":
        observed = ~np.isnan(rows.values)
        sums = np.add.reduceat(np.where(observed, rows.values, 0.0), first, axis=0)
        counts = np.add.reduceat(observed, first, axis=0, dtype=np.int64)
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        values = np.where(numeric, mean, values)
    offsets = np.searchsorted(first, rows.offsets)
    return replace(rows, times=rows.times[last], offsets=offsets, values=values, source=rows.positions(last))


def drop_items(rows: Rows, keep: np.ndarray) -> Rows:
    """Only the items where ``keep`` [I] is true."""
    kept = np.flatnonzero(np.repeat(keep, rows.lengths))
    offsets = np.concatenate([[0], np.cumsum(rows.lengths[keep])]).astype(np.int64)
    return Rows(rows.times[kept], offsets, rows.values[kept], rows.positions(kept), rows.items[keep])


def on_grid(rows: Rows, steps: np.ndarray, *, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values with a row of NaN for every missing step, [S, C], and their offsets [I + 1].

    Args:
        steps: step of each row after the first of its item, int64 [rows].

    Raises DataError E-GAP where the grid would be more than a hundred times the rows: one wrong date does that.
    """
    lengths = steps[rows.offsets[1:] - 1] + 1
    total = int(lengths.sum())
    if total == len(steps):
        return rows.values, rows.offsets
    if total > MAX_GRID_ROWS and total > MAX_GRID_RATIO * len(steps):
        worst = int((lengths - rows.lengths).argmax())
        raise DataError(
            "E-GAP",
            f"{len(steps)} rows would need {total} steps to have a regular clock.",
            series=ids[rows.items[worst]],
            fix="Look for a wrong date in this item, pass a coarser freq, or irregular='native' for rows as they are.",
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = np.full((total, rows.values.shape[1]), np.nan)
    values[np.repeat(offsets[:-1], rows.lengths) + steps] = rows.values
    return values, offsets
