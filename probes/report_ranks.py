"""How often a line does well and how often it does better than another, suite by suite; no mean over suites."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from probes.models import SIZELESS
from probes.plots import lines_svg
from probes.report_panels import MOST_LINES, folded, html_table
from probes.stats import PRACTICAL_MARGIN, interquartile_mean
from probes.summary import on_axis, seeds_of, value

__all__ = ["profile_panels", "profile_table", "win_rates"]

LEVELS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
CURVE = tuple(round(0.05 * step, 2) for step in range(21))

Runs = dict[str, dict[str, list[float]]]


def runs_of(documents: Sequence[dict[str, Any]], *, budget: float) -> dict[str, Runs]:
    """Skills of trained runs, clipped to [-1, 1]: suite -> line -> rung -> one a training seed."""
    found: dict[str, Runs] = {}
    for (tier, rung, line, own), group in seeds_of(documents).items():
        # a line of one size stands beside every budget, whatever it is called in brackets
        sizeless = line.partition(" [")[0] in SIZELESS
        if tier != "T1" or on_axis(line) or own != (1.0 if sizeless else budget):
            continue
        skills = [float(np.clip(value(content, "skill"), -1.0, 1.0)) for content in group]
        suite = str(group[0]["identity"]["suite"])
        found.setdefault(suite, {}).setdefault(line, {})[rung] = skills
    return found


def win_rates(runs: Runs) -> dict[str, float]:
    """Chance that a run of a line does better than one of another on the same rung, mean over rungs and other lines.

    What lies within the practical margin is half a win.
    """
    found = {}
    for line, rungs in runs.items():
        chances = [
            _chance(skills, other[rung])
            for name, other in runs.items() if name != line
            for rung, skills in rungs.items() if rung in other
        ]  # fmt: skip
        found[line] = float(np.mean(chances)) if chances else float("nan")
    return found


def _chance(first: Sequence[float], second: Sequence[float]) -> float:
    apart = np.asarray(first)[:, None] - np.asarray(second)[None]
    return float(((apart > PRACTICAL_MARGIN) + 0.5 * (np.abs(apart) <= PRACTICAL_MARGIN)).mean())


def profile_table(runs: Runs) -> pd.DataFrame:
    """One row a line: runs, interquartile mean, win rate, and the share of runs that reach each level of skill."""
    wins = win_rates(runs)
    rows = []
    for line, rungs in runs.items():
        skills = np.array([skill for own in rungs.values() for skill in own])
        rows.append({"line": line, "rungs": len(rungs), "runs": len(skills), "IQM": interquartile_mean(skills),
                     "win rate": wins[line],
                     **{f"runs of {x:g} and more": float((skills >= x).mean()) for x in LEVELS}})  # fmt: skip
    return pd.DataFrame(rows).sort_values("win rate", ascending=False, ignore_index=True)


def profile_panels(documents: Sequence[dict[str, Any]]) -> str:
    """For each suite and budget the table, and at once the critical rows the curve; nothing without trained runs."""
    budgets = sorted({float(d["budget"]["frac"]) for d in documents if d["identity"]["tier"] == "T1"})
    parts = []
    for budget in budgets:
        for suite, runs in runs_of(documents, budget=budget).items():
            if len(runs) < 2:
                continue
            table = profile_table(runs)
            if budget == 1.0:
                series = {
                    str(line): [(level, float(np.mean([s >= level for own in runs[line].values() for s in own])))
                                for level in CURVE]
                    for line in table["line"][:MOST_LINES]
                }  # fmt: skip
                parts.append(f"<h4>{escape(suite)}, budget 1</h4>" + lines_svg(
                    series, title=suite, x_name="skill", y_name="share of runs that reach it", dots=False
                ))  # fmt: skip
            parts.append(
                folded(f"{suite}, budget {budget:g}: interquartile means, win rates, shares", html_table(table))
            )
    if not parts:
        return ""
    note = (
        "<p class='note'>Runs of all rungs and training seeds of a suite. Win rate: chance that a run does better than"
        " one of another line on the same rung, by more than 0.02 of skill; less is half a win.</p>"
    )
    return folded("Performance profiles and win rates, suite by suite", note + "".join(parts))
