"""What ``Stream.update`` answers.

n rows of the frame
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np

from hamts.config import ModelConfig, StreamConfig
from hamts.errors import DataWarning

__all__ = ["UpdateReport", "notes_of"]


@dataclass(frozen=True)
class UpdateReport:
    """What became of the rows of one update.

    Attributes:
        rows: taken, of which ``reopened`` came late and ``applied`` corrected others.
        replayed, late, corrected, quarantined: rows that changed nothing.
        gap_steps: steps that no row came for, read as missing.
        patches: patches that these rows completed.
        drifted: rows far from the level of their stream.
        refused: positions in the frame of rows that changed nothing, by why.
        notes: each ``W-CODE: text``.
    """

    rows: int = 0
    replayed: int = 0
    late: int = 0
    reopened: int = 0
    corrected: int = 0
    applied: int = 0
    quarantined: int = 0
    gap_steps: int = 0
    patches: int = 0
    drifted: int = 0
    refused: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def notes_of(totals: dict[str, int], longest_gap: int, config: StreamConfig, model: ModelConfig) -> tuple[str, ...]:
    """What an owner of these rows would want to know; each is warned of as well."""
    notes = []
    if totals["quarantined"]:
        limit = config.max_jump_steps
        notes.append(f"W-JUMP: {totals['quarantined']} rows lie more than {limit} steps ahead and were left out.")
    if totals["drifted"]:
        notes.append(
            f"W-DRIFT: {totals['drifted']} rows lie more than {config.drift_scales:g} scales from the level"
            " of their stream. Has a unit changed?"
        )
    if longest_gap > max(model.half_life_steps):
        notes.append(f"W-STALE: no row came for {longest_gap} steps; what is known of level and scale is old.")
    for note in notes:
        warnings.warn(DataWarning(note), stacklevel=3)
    return tuple(notes)
