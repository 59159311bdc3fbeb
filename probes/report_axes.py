"""Panels of a report on axes of the suites: skill against the value of each, and the hardest that is still solved."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from probes.plots import lines_svg
from probes.registry import list_probes
from probes.report_panels import MOST_LINES, MOST_SHOWN, cell_text, folded, html_table
from probes.results import axis_of
from probes.scores import SOLVED_SKILL
from probes.summary import label, seeds_of, value

__all__ = ["axis_panels", "axis_table"]


def axis_table(documents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Skill and corrected recall by tier, rung, axis, line, budget and value; the rung's own value among them."""
    own, varied = [], []
    for (tier, rung, name, budget), group in seeds_of(documents).items():
        identity = group[0]["identity"]
        axis, told = axis_of(identity)
        skills = [value(content, "skill") for content in group]
        row = {"tier": tier, "rung": rung, "suite": identity["suite"], "line": label({**identity, "axis": ""}),
               "budget": budget, "skill": float(np.mean(skills)), "low": _low(skills), "seeds": len(group),
               "recall": float(np.mean([value(content, "recall_corrected") for content in group])),
               "preset": group[0]["config"].get("preset", "")}  # fmt: skip
        if told:
            varied.append({**row, "axis": axis, "value": told})
        elif name == row["line"]:
            own.append(row)
    # what differs in several things has no usual value
    axes = {(row["tier"], row["rung"], row["axis"]) for row in varied if ", " not in row["axis"]}
    for row in own:
        for tier, rung, axis in axes:
            if (tier, rung) == (row["tier"], row["rung"]):
                varied.append({**row, "axis": axis, "value": str(_usual(row, axis))})
    frame = pd.DataFrame(varied)
    if len(frame):
        frame["place"] = [_place(row.suite, row.axis, row.value) for row in frame.itertuples()]
        frame = frame.sort_values(["tier", "rung", "axis", "line", "budget", "place"], ignore_index=True)
    return frame


def _usual(row: dict[str, Any], axis: str) -> Any:
    """The rung's own value."""
    return getattr(list_probes()[row["suite"]].config(row["preset"], row["rung"]), axis)


def _place(suite: str, axis: str, told: str) -> float:
    """Where a value stands: by its size, else in the order of the contract, easiest first."""
    try:
        return float(told)
    except ValueError:
        known = [str(each) for each in list_probes()[suite].axes.get(axis, ())]
        return float(known.index(told)) if told in known else float(len(known))


def _low(skills: Sequence[float]) -> float:
    """Lower end of the interval over training seeds; of one seed, its own value."""
    error = 1.96 * float(np.std(skills, ddof=1)) / len(skills) ** 0.5 if len(skills) > 1 else 0.0
    return float(np.mean(skills)) - error


def _solved_up_to(part: pd.DataFrame) -> str:
    """The last value, in the order of difficulty, up to which the lower end of skill stays at 0.8."""
    best = ""
    for row in part.itertuples():
        if row.low < SOLVED_SKILL:
            break
        best = str(row.value)
    return best or "none"


def axis_panels(documents: Sequence[dict[str, Any]]) -> str:
    """A plot for each rung and axis with numbers, and a table of all; nothing where no axis was varied."""
    frame = axis_table(documents)
    if frame.empty:
        return ""
    frame = frame[frame["budget"].isin([1.0, -1.0])]
    plots, rows = [], []
    for (tier, rung, axis), part in frame.groupby(["tier", "rung", "axis"], sort=False):
        named = [(str(line), points) for line, points in part.groupby("line", sort=False) if len(points) > 1]
        # mechanisms of a router after the routers
        lines = dict(sorted(named, key=lambda pair: ":" in pair[0]))
        for line, points in lines.items():
            rows.append({"tier": tier, "rung": rung, "axis": axis, "line": line,
                         "solved up to": _solved_up_to(points),
                         "skill": ", ".join(f"{p.value}: {cell_text(p.skill)}" for p in points.itertuples()),
                         "seeds": int(points["seeds"].min())})  # fmt: skip
        series = {name: [(p.place, max(-1.0, p.skill)) for p in points.itertuples()] for name, points in lines.items()}
        plot = lines_svg(
            dict(list(series.items())[:MOST_LINES]), title=f"{rung} {axis}", x_name=str(axis), y_name="skill at once"
        )
        plots.append(f"<h4>{escape(f'{rung} · {tier} · {axis}')}</h4>{plot}")
    rest = folded(f"{len(plots) - MOST_SHOWN} more", "".join(plots[MOST_SHOWN:])) if len(plots) > MOST_SHOWN else ""
    table = html_table(pd.DataFrame(rows))
    return (
        "<h3>Skill against the axes of the suites, at once the critical rows</h3>" + "".join(plots[:MOST_SHOWN]) + rest
        + (folded(f"hardest value with skill of {SOLVED_SKILL:g} and more, {len(rows)} lines", table))
    )  # fmt: skip
