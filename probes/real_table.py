"""Labelled sets over several fits: one table, with intervals that resample fits and events together.

F fits · G events, or blocks of time · D resamples
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["crossed_interval", "real_frame", "real_table", "told"]

RESAMPLES = 2_000
SHORT = {"nab/realKnownCause/nyc_taxi": "nyc_taxi"}
METRICS = {
    "event_window_mase": "MASE in windows", "non_event_mase": "MASE beside them",
    "twcrps_95": "twCRPS beyond the 95 % quantile", "coverage_80": "coverage of 80 % inside windows",
    "coverage_95": "coverage of 95 % inside windows",
}  # fmt: skip


def crossed_interval(tables: Sequence[np.ndarray], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % interval over fits that met the same events: both are drawn anew, events for all fits alike.

    Args:
        tables: of each fit, sum and count of every event, [G, 2].
    """
    whole = np.stack(tables)  # [F, G, 2]
    F, G = whole.shape[:2]
    value = float(whole[..., 0].sum() / max(whole[..., 1].sum(), 1))
    rng = np.random.default_rng(seed)
    events, fits = rng.integers(G, size=(RESAMPLES, G)), rng.integers(F, size=(RESAMPLES, F))
    drawn = whole[fits[:, :, None], events[:, None, :]].sum((1, 2))  # [D, 2]
    means = drawn[:, 0] / np.maximum(drawn[:, 1], 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return value, float(low), float(high)


def real_frame(documents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What was measured, a row each, by set and preset, a column each."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for content in documents:
        groups.setdefault((content["set"], content["preset"]), []).append(content)
    columns: dict[str, dict[str, str]] = {}
    for (name, preset), fits in sorted(groups.items(), key=lambda item: (item[0][1] != "tiny", item[0])):
        tested = max((test["events"] for content in fits for test in content["tests"] if "events" in test), default=0)
        scored = max(content["events"] for content in fits)
        events = f"{tested} events" if tested == scored else f"{tested} events, {scored} scored"
        head = f"{SHORT.get(name, name)}, {preset} ({events}, {len(fits)} fits)"
        columns[head] = {**_tests(fits), **_detection(fits), **_scores(fits)}
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    return pd.DataFrame({"": rows, **{head: [column.get(row, "") for row in rows] for head, column in columns.items()}})


def real_table(documents: Sequence[dict[str, Any]]) -> str:
    """The same as Markdown."""
    frame = real_frame(documents)
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + " --- |" * len(frame.columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in frame.to_numpy().tolist())])


def _told(found: tuple[float, float, float], digits: int = 3) -> str:
    value, low, high = (f"{part:.{digits}f}" for part in found)
    return f"{value} [{low}, {high}]"


def _tests(fits: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Edit and drop tests, and the lead test at each age, with the scratchpad and without."""
    found = {}
    for name in ("edit", "drop"):
        parts = [test for content in fits for test in content["tests"] if test["test"] == name]
        if len(parts) == len(fits):
            found[name] = _told(crossed_interval([_by_event(pd.DataFrame(test["rows"])) for test in parts]))
    for empty in (False, True):
        for place, age in enumerate(("first", "second", "third")):
            tables = [_at_age(content, place, empty=empty) for content in fits]
            if all(table is not None for table in tables):
                what = "lead without a scratchpad" if empty else "lead"
                found[f"{what}, {age} age"] = _told(crossed_interval([t for t in tables if t is not None]))
    return found


def _detection(fits: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What kept rows say about labelled windows, by the fits that were asked: mean, and the least and most of a fit."""
    known = [pd.DataFrame(content["detection"]) for content in fits if content.get("detection")]
    found = {}
    for name, what in (
        ("recall", "windows with a kept row"), ("chance", "the same by chance"),
        ("reach", "distance of windows from kept rows, over chance"),
        ("precision_distance", "distance of kept rows from windows, over chance"),
    ):  # fmt: skip
        means = [float(np.average(rows[name], weights=rows["windows"])) for rows in known]
        if means:
            found[what] = f"{np.mean(means):.2f} ({min(means):.2f} to {max(means):.2f}, {len(means)} fits)"
    return found


def _at_age(content: dict[str, Any], place: int, *, empty: bool) -> np.ndarray | None:
    for test in content["tests"]:
        if test["test"] == "lead" and (test["budget_share"] == 0) == empty:
            rows = pd.DataFrame(test["rows"])
            ages = sorted(rows["age_rows"].unique())
            return _by_event(rows[rows["age_rows"] == ages[place]]) if place < len(ages) else None
    return None


def _by_event(rows: pd.DataFrame) -> np.ndarray:
    """Sum and count of each event, in order of their names, [G, 2]."""
    grouped = rows.groupby([rows["label"].astype(str), rows["later"].astype(str)])["value"]
    return grouped.agg(["sum", "count"]).sort_index().to_numpy(dtype=float)


def _scores(fits: Sequence[dict[str, Any]]) -> dict[str, str]:
    found = {}
    for metric, what in METRICS.items():
        for model, label in (("ham", ""), ("seasonal_naive", ", seasonal naive")):
            rows = [row for c in fits for row in c["event_scores"][model] if row["metric"] == metric]
            tables = [np.array(row["groups"], dtype=float) for row in rows if row.get("groups")]
            if tables and len(tables) == len(fits):
                # the rival is not fitted: one of its tables is all of them
                found[what + label] = _told(crossed_interval(tables[: 1 if label else None]))
    return found


def told(content: dict[str, Any], test: dict[str, Any]) -> str:
    """A real test in a line."""
    if "value" not in test:
        return f"{content['set']}  {test['note']}"
    share = f" at budget {test['budget_share']:g}" if "budget_share" in test else ""
    return (
        f"{content['set']}  {test['test']}{share}  {test['value']:.4f} [{test['low']:.4f}, {test['high']:.4f}]  "
        f"{test['events']} events  {test['note']}"
    )
