"""Errors of the frontier's cells over seeds, with intervals, and differences paired by seed and block of windows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.frontier_grid import MODELS, SEEDS
from benchmarks.frontier_sets import SETS

__all__ = ["ROUTERS", "SAME_SIZE", "cores_of", "difference", "drawn", "lines_of", "markdown", "parts_of", "verdict"]

DRAWS, MARGIN = 2000, 0.02
# memories are of the same size up to this share
SAME_SIZE = 0.1
ROUTERS = [label for label, model in MODELS.items() if model.controls]


def cores_of(cells: list[dict[str, Any]]) -> list[str]:
    """The core sets that are judged together with those of some cells."""
    families = {SETS[cell["set"]].family for cell in cells if cell["set"] in SETS} or {"recent"}
    return [name for name, spec in SETS.items() if spec.core and spec.family in families]


def parts_of(cells: list[dict[str, Any]]) -> tuple[str, ...]:
    """Parts of the windows of some cells: all events, those of each age, and all rows."""
    ages = dict.fromkeys(age for name in cores_of(cells) for age, _ in SETS[name].ages)
    return ("events", *ages, "all")


def lines_of(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per set, model, memory, share and part, over seeds; intervals over seeds, then blocks of windows."""
    found: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for cell in cells:
        for point in cell["points"]:
            for part, scores in point["parts"].items():
                key = (cell["set"], cell["model"], point["memory"], point["share"], part)
                found.setdefault(key, []).append((point, scores))
    rows = []
    for (name, model, memory, share, part), seeds in found.items():
        low, high = drawn([scores for _, scores in seeds])
        costs = ("usage_share", "bytes", "scratchpad_attention", "ms_per_step")
        means = {cost: _mean([point[cost] for point, _ in seeds]) for cost in costs}
        rows.append(
            {"set": name, "model": model, "memory": memory, "share": share, "part": part, "seeds": len(seeds)}
            | {"WQL": _mean([scores["WQL"] for _, scores in seeds]), "low": low, "high": high}
            | {"MASE": _mean([scores["MASE"] for _, scores in seeds]), **means}
        )
    return pd.DataFrame(rows)


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def drawn(
    seeds: list[dict[str, Any]], against: list[dict[str, Any]] | None = None, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the score, or of its ratio to another's less 1, paired by both: seeds are drawn, then blocks."""
    rng = np.random.default_rng(0)
    loss, size = (np.array([one[name] for one in seeds]) for name in ("quantile", "size"))  # 2 x [seeds, blocks]
    place = rng.integers(len(loss), size=(DRAWS, len(loss), 1))
    block = rng.integers(loss.shape[1], size=(DRAWS, 1, loss.shape[1]))
    values = loss[place, block].sum((1, 2)) / np.maximum(size[place, block].sum((1, 2)), 1e-12)
    if against is not None:
        other = np.array([one["quantile"] for one in against])[place, block].sum((1, 2))
        values = loss[place, block].sum((1, 2)) / np.maximum(other, 1e-12) - 1
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(
    cells: list[dict[str, Any]], name: str, one: tuple[str, str], two: tuple[str, str], share: float | None, part: str
) -> dict[str, Any] | None:
    """Relative difference of two (model, memory) at a share, of the seeds that both have; None: there are none."""
    sides: list[dict[int, dict[str, Any]]] = []
    for model, memory in (one, two):
        sides.append(
            {
                cell["seed"]: {**point["parts"][part], "bytes": point["bytes"]}
                for cell in cells
                if (cell["set"], cell["model"]) == (name, model)
                for point in cell["points"]
                if (point["memory"], point["share"]) == (memory, share) and part in point["parts"]
            }
        )
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        return None
    left, right = ([side[seed] for seed in seeds] for side in sides)
    low, high = drawn(left, right)
    total = [sum(map(sum, (scores["quantile"] for scores in side))) for side in (left, right)]
    apart = total[0] / max(total[1], 1e-12) - 1
    sizes = [sum(side[seed]["bytes"] for seed in seeds) for side in sides]
    ratio = sizes[0] / sizes[1]
    return {
        "set": name, "one": "/".join(one), "two": "/".join(two), "share": share, "part": part, "seeds": len(seeds),
        "difference": apart, "low": low, "high": high, "bytes_ratio": ratio,
        "verdict": verdict(apart, low, high, seeds=len(seeds), bytes_ratio=ratio),
    }  # fmt: skip


def verdict(difference: float, low: float, high: float, *, seeds: int, bytes_ratio: float = 1.0) -> str:
    """In the words of the registration; nothing is called of few seeds, nor of memories of other sizes."""
    if seeds < len(SEEDS):
        return f"{seeds} of {len(SEEDS)} seeds: nothing is called"
    if abs(bytes_ratio - 1) > SAME_SIZE:
        return "other bytes: nothing is called"
    if difference < -MARGIN and high < 0:
        return "better"
    if low > -MARGIN:
        return "no better"
    return "undecided"


def markdown(frame: pd.DataFrame) -> str:
    rows = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in frame.itertuples(index=False)]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
