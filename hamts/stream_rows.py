"""The door of a stream: rows of any frame, told apart into new, replayed, corrected, late and too far ahead.

Nothing is changed here. A frame is judged as a whole before any of it is taken.

n rows of the frame · C channels · R recent rows
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hamts.config import StreamConfig
from hamts.data.clock import as_times, effective_clock, locate, show_times
from hamts.data.panel import Schema
from hamts.errors import DataError
from hamts.stream_frames import Incoming
from hamts.stream_state import StreamItems

__all__ = ["Arrived", "judge_rows", "row_times", "value_hashes"]

MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Arrived:
    """Rows to be taken, by item and step; what became of the others.

    Attributes:
        slots, steps, hashes: [n'] int64.
        values: [n', C] float64.
        offset: [n', C] float32 where inside its step an event lies; None without a log.
        source: [n'] position in the frame.
        touched: [B] slots that get rows, rising.
        lengths: [B] steps of each after these rows.
        gaps: [B] steps of each that no row came for.
        kinds: positions in the frame and slots of rows that were not simply new, by counter.
    """

    slots: np.ndarray
    steps: np.ndarray
    hashes: np.ndarray
    values: np.ndarray
    offset: np.ndarray | None
    source: np.ndarray
    touched: np.ndarray
    lengths: np.ndarray
    gaps: np.ndarray
    kinds: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def value_hashes(values: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    """A number for the values of each row, [n] int64: equal for equal rows, whatever their NaN or sign of zero."""
    plain = np.where(np.isnan(values), np.nan, values) + 0.0  # [n, C]
    words = np.ascontiguousarray(plain).view(np.uint64)  # [n, C]
    if offset is not None:
        words = np.concatenate([words, np.ascontiguousarray(offset.astype(np.float64) + 0.0).view(np.uint64)], axis=1)
    total = np.zeros(len(words), dtype=np.uint64)  # [n]
    for column in words.T:
        total = (total ^ column) * MIX
        total = total ^ (total >> np.uint64(29))
    return total.view(np.int64)


def judge_rows(
    incoming: Incoming, items: StreamItems, schema: Schema, patch_steps: int, config: StreamConfig
) -> Arrived:
    """Sort rows by item and step and say what each is.

    Raises DataError: E-ITEM (an item without history), E-FREQ (off its clock), E-LATE, E-CONFLICT, E-JUMP (by policy).
    """
    slots = incoming.slots
    if len(slots) and int(slots.min()) < 0:
        raise _unknown_item(incoming, schema)
    steps = _steps(incoming, items, schema)
    hashes = value_hashes(incoming.values, incoming.offset)
    source = np.arange(len(slots))
    if len(slots) > 1:
        order = np.lexsort((steps, slots))
        slots, steps, hashes, source = slots[order], steps[order], hashes[order], order
    length = items.table["lengths"][slots]  # [n] before these rows
    kinds = _old_rows(slots, steps, hashes, length, items, patch_steps)
    _twice_in_frame(kinds, slots, steps, hashes)
    _jumps(kinds, slots, steps, length, config)
    _apply_policies(kinds, config)
    _refuse(kinds, incoming, slots, steps, source, items, schema)
    return _arrived(kinds, incoming, slots, steps, hashes, source, items)


NEW, REPLAYED, LATE, REOPENED, CORRECTED, APPLIED, QUARANTINED = range(7)
NAMES = ("rows", "replayed", "late", "reopened", "corrected", "applied", "quarantined")
# what is taken of a row
TAKEN = (NEW, REOPENED, APPLIED)


def _steps(incoming: Incoming, items: StreamItems, schema: Schema) -> np.ndarray:
    """Step of every row on the clock of its item, [n]; negative before its first row."""
    zone = schema.dialect.time_zone
    clock = effective_clock(schema.frequency, zone)
    steps, on_clock = locate(clock, items.table["starts"][incoming.slots], incoming.times, zone)
    if not on_clock.all():
        off = np.flatnonzero(~on_clock)[:5]
        shown = show_times(incoming.times[off], integer=clock.family == "integer", zone=zone)
        raise DataError(
            "E-FREQ",
            f"{int((~on_clock).sum())} rows are not on the clock {schema.frequency.alias!r} of their item.",
            column=schema.dialect.time_column,
            series=[items.ids[slot] for slot in incoming.slots[off]],
            rows=[f"row {at}: {text}" for at, text in zip(off, shown, strict=True)],
            fix="Round the times to the clock of fit before passing them.",
        )
    return steps


def _unknown_item(incoming: Incoming, schema: Schema) -> DataError:
    unknown = incoming.slots < 0
    names = list(dict.fromkeys(incoming.ids[at] for at in np.flatnonzero(unknown)))
    return DataError(
        "E-ITEM",
        f"{len(names)} items of these rows were never seen: a stream goes on from a history.",
        column=schema.dialect.id_column,
        series=names[:5],
        rows=[f"row {at}" for at in np.flatnonzero(unknown)[:5]],
        fix="Call stream.add(df) with what is known of them first, or leave their rows out.",
    )


def _old_rows(
    slots: np.ndarray, steps: np.ndarray, hashes: np.ndarray, length: np.ndarray, items: StreamItems, P: int
) -> np.ndarray:
    """What each row is against what was taken before: [n]."""
    kinds = np.full(len(slots), NEW)  # [n]
    old = np.flatnonzero(steps < length)
    if not len(old):
        return kinds
    slot, step = slots[old], steps[old]
    recent_steps, recent_hashes = items.table["recent_steps"], items.table["recent_hashes"]
    cell = step % recent_steps.shape[1]
    known = (recent_steps[slot, cell] == step) & (step >= 0)
    same = known & (recent_hashes[slot, cell] == hashes[old])
    lead = items.table["lead"][slot]
    is_open = (lead + step) // P == (lead + length[old]) // P
    kinds[old] = np.where(
        same, REPLAYED, np.where(known, np.where(is_open, APPLIED, CORRECTED), np.where(is_open, REOPENED, LATE))
    )
    return kinds


def _twice_in_frame(kinds: np.ndarray, slots: np.ndarray, steps: np.ndarray, hashes: np.ndarray) -> None:
    """Of rows of one item and time in the same frame the first counts; the others replay or correct it."""
    again = np.zeros(len(slots), dtype=bool)
    again[1:] = (slots[1:] == slots[:-1]) & (steps[1:] == steps[:-1])
    for at in np.flatnonzero(again & np.isin(kinds, (NEW, REOPENED))):
        kinds[at] = REPLAYED if hashes[at] == hashes[at - 1] else CORRECTED


def _jumps(kinds: np.ndarray, slots: np.ndarray, steps: np.ndarray, length: np.ndarray, config: StreamConfig) -> None:
    """A row too far after the one before it, and all later ones of its item."""
    if config.jump == "accept" or not (steps - length > config.max_jump_steps - 1).any():
        return
    new = np.flatnonzero(kinds == NEW)
    first = np.ones(len(new), dtype=bool)
    first[1:] = slots[new[1:]] != slots[new[:-1]]
    before = np.where(first, length[new] - 1, np.concatenate([[0], steps[new[:-1]]]))  # [new]
    far = steps[new] - before > config.max_jump_steps
    # rows are sorted, so whatever follows a jump lies beyond it as well
    since = np.cumsum(far)
    sizes = np.diff(np.append(np.flatnonzero(first), len(new)))
    begun: np.ndarray = np.repeat(since[first] - far[first], sizes)
    kinds[new[since > begun]] = QUARANTINED


def _apply_policies(kinds: np.ndarray, config: StreamConfig) -> None:
    if config.late != "reopen":
        kinds[kinds == REOPENED] = LATE
    if config.correction != "apply":
        kinds[kinds == APPLIED] = CORRECTED
    kinds_refused = {LATE: config.late, CORRECTED: config.correction, QUARANTINED: config.jump}
    for kind, policy in kinds_refused.items():
        if policy == "error":
            kinds[kinds == kind] = -kind


def _refuse(
    kinds: np.ndarray,
    incoming: Incoming,
    slots: np.ndarray,
    steps: np.ndarray,
    source: np.ndarray,
    items: StreamItems,
    schema: Schema,
) -> None:
    """Raise for the first kind of row that the policies call an error."""
    if not (kinds < 0).any():
        return
    texts = {
        LATE: ("E-LATE", "came after a later row of their item", "late='drop' or 'reopen'"),
        CORRECTED: (
            "E-CONFLICT",
            "say something else than rows that were taken before; what the state has read cannot be unlearned",
            "correction='ignore', or 'apply' while the patch is unfinished",
        ),
        QUARANTINED: ("E-JUMP", "lie too far ahead of their item", "jump='quarantine', or 'accept' if they are right"),
    }
    for kind, (code, what, policy) in texts.items():
        at = source[kinds == -kind]
        if len(at):
            integer = schema.frequency.kind == "integer"
            shown = show_times(incoming.times[at[:5]], integer=integer, zone=schema.dialect.time_zone)
            raise DataError(
                code,
                f"{len(at)} rows {what}.",
                column=schema.dialect.time_column,
                series=list(dict.fromkeys(items.ids[slot] for slot in incoming.slots[at]))[:5],
                rows=[f"row {place}: {text}" for place, text in zip(at, shown, strict=False)],
                fix=f"Leave them out, or open the stream with {policy}. Nothing of this frame was taken.",
            )


def _arrived(
    kinds: np.ndarray,
    incoming: Incoming,
    slots: np.ndarray,
    steps: np.ndarray,
    hashes: np.ndarray,
    source: np.ndarray,
    items: StreamItems,
) -> Arrived:
    by_name = {}
    if kinds.any():
        by_name = {NAMES[kind]: (source[kinds == kind], slots[kinds == kind]) for kind in range(1, 7)}
        taken = np.isin(kinds, TAKEN)
        new = (kinds == NEW)[taken]
        slots, steps, hashes, source = slots[taken], steps[taken], hashes[taken], source[taken]
    else:
        new = np.ones(len(slots), dtype=bool)
    touched, last = np.unique(slots, return_index=True)
    ends = np.append(last[1:], len(slots)) - 1  # [B] last row of each
    before = items.table["lengths"][touched]
    lengths = np.maximum(before, steps[ends] + 1) if len(touched) else before
    fresh = np.add.reduceat(new, last) if len(touched) else before  # [B] steps that a new row came for
    return Arrived(
        slots=slots,
        steps=steps,
        hashes=hashes,
        values=incoming.values[source],
        offset=None if incoming.offset is None else incoming.offset[source],
        source=source,
        touched=touched,
        lengths=lengths,
        gaps=lengths - before - fresh,
        kinds=by_name,
    )


def row_times(schema: Schema, numbers: np.ndarray) -> np.ndarray:
    """int64 -> times of the kind that the clock has."""
    return as_times(numbers, integer=schema.frequency.kind == "integer")
