"""What the rows of a fit or a prediction must be, before they are set on a clock."""

from __future__ import annotations

import numpy as np

from hamts.data.columns import Notes, column_kind
from hamts.data.infer import is_clock_change
from hamts.data.panel import Channel
from hamts.data.rows import Rows, drop_items, merge_duplicates, repeated, sort_rows
from hamts.data.source import Source
from hamts.errors import DataError

__all__ = ["clean_rows"]


def clean_rows(source: Source, values: np.ndarray, channels: tuple[Channel, ...], *, fitting: bool) -> Rows:
    """Sorted rows, each item and time once; when fitting, every item has two rows and a value."""
    rows = sort_rows(source.ids.codes, source.times.values, values)
    again = repeated(rows)
    if again.any():
        rows = _without_duplicates(source, rows, again, channels)
    if not fitting:
        return rows
    short = rows.lengths < 2
    rows = _without_items(source, rows, short, "E-SHORT", "An item needs at least two rows")
    targets = [i for i, c in enumerate(channels) if c.role == "target"]
    observed = ~np.isnan(rows.values[:, targets])
    empty = np.asarray(~np.logical_or.reduceat(observed, rows.offsets[:-1], axis=0))  # [I, targets]
    silent = np.asarray(empty.all(axis=1))
    rows = _without_items(source, rows, silent, "E-ALLNAN", "An item needs at least one value in a target")
    for position in np.flatnonzero(empty[~silent].any(axis=0)):
        count = int(empty[~silent, position].sum())
        source.notes.add(
            "W-ALLNAN", f"target {channels[targets[position]].name!r} has no value at all in {count} items."
        )
    _note_constants(rows, channels, source.notes)
    return rows


def _without_duplicates(source: Source, rows: Rows, again: np.ndarray, channels: tuple[Channel, ...]) -> Rows:
    count = int(again.sum())
    if source.options.duplicates != "error":
        numeric = np.array([c.kind != "categorical" for c in channels])
        source.notes.add("W-DUP", f"{count} rows repeat an item and time; kept: {source.options.duplicates}.")
        return merge_duplicates(rows, again, how=source.options.duplicates, numeric=numeric)
    found = np.flatnonzero(again)
    hint = ""
    if not source.times.integer and source.times.zone is None and is_clock_change(rows.times[found]).all():
        hint = " They lie on a clock-change Sunday: tz_localize local times with ambiguous='infer'."
    if source.layout.id_column is None:
        texts = [c for c in source.frame.columns if column_kind(source.frame[c]) == "categorical"]
        hint += f" Does {texts[0]!r} name the items? Then pass id_col={texts[0]!r}." if texts else ""
    pairs = np.unique(np.concatenate([found - 1, found]))
    raise DataError(
        "E-DUP",
        f"Each item has one row per time. {count} rows repeat one.",
        column=source.layout.time_column,
        series=source.name_items(np.unique(source.ids.codes[rows.positions(found)])),
        rows=source.describe(rows.positions(pairs), *[c.name for c in channels if c.role == "target"][:3]),
        fix=f"Drop them, or pass duplicates='mean' or 'last'.{hint}",
    )


def _without_items(source: Source, rows: Rows, bad: np.ndarray, code: str, rule: str) -> Rows:
    if not bad.any():
        return rows
    names = source.ids.values[rows.items[bad]]
    if source.options.on_bad == "error":
        raise DataError(
            code,
            f"{rule}. {len(names)} of {len(bad)} have not.",
            column=", ".join(source.layout.targets or ()) or None,
            series=source.name_items(rows.items[bad]),
            rows=source.describe(rows.positions(rows.offsets[:-1][bad])),
            fix="Leave these items out, or pass on_bad='skip'.",
        )
    source.notes.add("W-SKIP", f"{len(names)} items are left out ({code}): {names[:5].tolist()}.")
    if bad.all():
        raise DataError("E-EMPTY", f"No item is left: {rule[0].lower()}{rule[1:]}.", fix="Pass longer items.")
    return drop_items(rows, ~bad)


def _note_constants(rows: Rows, channels: tuple[Channel, ...], notes: Notes) -> None:
    for index, channel in enumerate(channels):
        values = rows.values[:, index]
        head = values[: rows.offsets[1]]
        if channel.role != "past" or not (head == head[0]).all():
            continue
        starts = rows.offsets[:-1]
        if (np.maximum.reduceat(values, starts) == np.minimum.reduceat(values, starts)).all():
            text = f"column {channel.name!r} never changes within an item; it stays a past covariate."
            notes.add("W-CONSTANT", f"{text} As a column of static_df it costs less.")
