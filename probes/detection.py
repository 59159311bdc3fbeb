"""Are labelled windows found by what is routed? Range-aware recall against chance, and affiliation distances.

No point adjustment: a window that is touched once counts as found, not as found in all of its rows, and what it would
be worth by chance stands beside it. Distances are those of Huet et al. (KDD 2022) without their probability: rows from
each labelled row to the nearest kept one, and from each kept row to the nearest labelled one, over what as many patches
drawn by lot give: rows are kept patch by patch, and so is chance.

T rows · K kept rows · W windows · D draws
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from probes.frames import ProbeFromFrame
from probes.real import _rows_of, _series

__all__ = ["Detection", "detection", "detection_test"]

DRAWS = 500


@dataclass(frozen=True)
class Detection:
    """What kept rows say about labelled windows.

    Attributes:
        rows, patches, kept: of the series; patches that are kept.
        recall, chance: share of windows with a kept row, and with one of as many patches drawn by lot.
        reach: mean distance of labelled rows from the nearest kept one, over that of patches drawn by lot; below 1 kept
            rows lie nearer to the windows than chance would have it.
        precision_distance: mean distance of kept rows from the nearest labelled one, over that of patches drawn by lot.
    """

    windows: int
    rows: int
    patches: int
    kept: int
    recall: float
    chance: float
    reach: float
    precision_distance: float

    @property
    def corrected(self) -> float:
        """Recall above chance."""
        return (self.recall - self.chance) / (1.0 - self.chance) if self.chance < 1 else float("nan")


def detection(
    kept: np.ndarray, windows: Sequence[np.ndarray], *, patch: np.ndarray | None = None, seed: int = 0
) -> Detection:
    """Score kept rows, [T] bool, against windows, each the rows of it.

    Args:
        patch: of each row, in order; None: every row is one.

    Raises:
        ValueError: nothing is kept, or there is no window.
    """
    places = np.flatnonzero(kept)
    if len(places) == 0 or not windows:
        raise ValueError(f"Kept rows and windows are needed. Got {len(places)} rows and {len(windows)} windows.")
    rng, T = np.random.default_rng(seed), len(kept)
    patch = np.arange(T) if patch is None else patch
    every, held = np.unique(patch), np.unique(patch[places])
    labelled = np.unique(np.concatenate([np.asarray(window) for window in windows]))
    drawn = [
        np.flatnonzero(np.isin(patch, rng.choice(every, size=len(held), replace=False))) for _ in range(DRAWS)
    ]  # fmt: skip

    def found(rows: np.ndarray) -> float:
        return float(np.mean([np.isin(window, rows).any() for window in windows]))

    def over_chance(own: float, chances: list[float]) -> float:
        usual = float(np.mean(chances))
        return own / usual if usual > 0 else float("nan")

    return Detection(
        windows=len(windows), rows=T, patches=len(every), kept=len(held), recall=found(places),
        chance=float(np.mean([found(rows) for rows in drawn])),
        reach=over_chance(_distance(labelled, places), [_distance(labelled, rows) for rows in drawn]),
        precision_distance=over_chance(_distance(places, labelled), [_distance(rows, labelled) for rows in drawn]),
    )  # fmt: skip


def _distance(rows: np.ndarray, others: np.ndarray) -> float:
    """Mean distance of rows from the nearest of some others, which are in order."""
    after = np.searchsorted(others, rows).clip(0, len(others) - 1)
    before = (after - 1).clip(0)
    return float(np.minimum(np.abs(others[after] - rows), np.abs(others[before] - rows)).mean())


def detection_test(probe: ProbeFromFrame, forecaster: object, *, most: int | None = None) -> list[dict[str, object]]:
    """Of each series with labelled windows, what a forecaster that tells its kept rows holds of it after all rows."""
    found: list[dict[str, object]] = []
    names = list(dict.fromkeys(probe.critical["unique_id"]))
    for name in names[:most]:
        series = _series(probe, name)
        mine = probe.critical[probe.critical["unique_id"] == name]
        kept, patch = forecaster.kept_rows(series)  # type: ignore[attr-defined]
        if not len(series) or not kept.any():
            continue
        scored = detection(kept, [_rows_of(series, window) for _, window in mine.iterrows()], patch=patch)
        found.append({"unique_id": str(name), **asdict(scored), "corrected": scored.corrected})
    return found
