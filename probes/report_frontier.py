"""Does a line beat the state of as many bytes over the whole frontier? Areas of single training seeds, compared.

S training seeds · P points of a frontier · D resamples
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from probes.report_panels import folded, html_table
from probes.stats import FEW_SEEDS, PRACTICAL_MARGIN
from probes.summary import on_axis, seeds_of, value

__all__ = ["area_differences", "area_panel"]

RIVAL = "recurrent_wide"
GRID = 200
RESAMPLES = 2_000

Frontier = dict[int, list[tuple[float, float]]]


def frontiers_of(documents: Sequence[dict[str, Any]]) -> dict[str, dict[str, Frontier]]:
    """Bytes and clipped skill of each training seed: rung -> line -> seed -> points, by bytes."""
    found: dict[str, dict[str, Frontier]] = {}
    for (tier, rung, line, _), group in seeds_of(documents).items():
        if tier != "T1" or on_axis(line):
            continue
        for content in group:
            seed = int(content["data_manifest"]["train_seed"])
            point = (float(content["budget"]["bytes_total"]), float(np.clip(value(content, "skill"), -1.0, 1.0)))
            found.setdefault(rung, {}).setdefault(line, {}).setdefault(seed, []).append(point)
    return found


def area(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> float:
    """Mean difference of skill over log bytes, where both have been measured; NaN where that is nowhere."""
    a, b = (np.array(sorted(points)) for points in (first, second))  # [P, 2]
    low, high = max(a[0, 0], b[0, 0]), min(a[-1, 0], b[-1, 0])
    if not high > low:
        return float("nan")
    grid = np.linspace(np.log2(low), np.log2(high), GRID)
    apart = np.interp(grid, np.log2(a[:, 0]), a[:, 1]) - np.interp(grid, np.log2(b[:, 0]), b[:, 1])
    return float(np.trapezoid(apart, grid) / (grid[-1] - grid[0]))


def area_differences(documents: Sequence[dict[str, Any]], *, rival: str = RIVAL) -> pd.DataFrame:
    """Of every line with two sizes or more, the difference of its area from the rival's, seed by seed.

    A line beats the rival if the whole interval over seeds lies above the practical margin.
    """
    rows = []
    for rung, lines in frontiers_of(documents).items():
        other = lines.get(rival, {})
        for line, frontier in lines.items():
            shared = [s for s in sorted(frontier) if s in other and len(frontier[s]) > 1 and len(other[s]) > 1]
            found = np.array([area(frontier[s], other[s]) for s in shared])
            if line == rival or not len(found) or not np.isfinite(found).all():
                continue
            drawn = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
            low, high = np.quantile(found[drawn].mean(1), [0.025, 0.975])
            rows.append({"rung": rung, "line": line, "difference of area": float(found.mean()), "low": float(low),
                         "high": float(high), "seeds": len(found),
                         "verdict": _verdict(low, high, len(found))})  # fmt: skip
    return pd.DataFrame(rows)


def _verdict(low: float, high: float, seeds: int) -> str:
    if seeds < FEW_SEEDS:
        return "too few seeds"
    if low > PRACTICAL_MARGIN:
        return "beats it"
    return "is beaten" if high < -PRACTICAL_MARGIN else "open"


def area_panel(documents: Sequence[dict[str, Any]]) -> str:
    """The table, folded; nothing without a state of equal bytes at two sizes."""
    frame = area_differences(documents)
    if frame.empty:
        return ""
    return folded("area under the frontier against a state of as many bytes, with intervals", html_table(frame))
