"""Tables of ``hamts probes table`` beside the open questions: gates, permuted flags, kinds of queries, services.

S training seeds · V services · D resamples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.gates_trained import ORACLE_SHARE, ROOMY_STATE, SMALL_STATE, SOLVED, gates_of_runs

if TYPE_CHECKING:
    from probes.answers import Results

__all__ = ["gates", "kinds", "markdown_rows", "permuted", "services", "unranked"]

# labels of slices that are told apart, by rung
KINDS = {
    "rrr": ("regime=0", "regime=1"),
    "pbcR": ("rare=1", "rare=0"),
    "topo": ("hop=0", "hop=1"),
    "topo2": ("hop=0", "hop=2"),
    "topo2H": ("hop=0", "hop=2"),
}
SERVICE = "service="
RESAMPLES = 2_000


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def gates(found: Results, documents: Sequence[dict[str, Any]]) -> str:
    """Gates as the runs show them; where a line has too few seeds, how many it has."""
    rows: dict[str, dict[str, str]] = {}
    for gate in gates_of_runs(documents):
        told = f"{gate.value:.2f}" if gate.roomy is None else f"{gate.value:.2f} / {gate.roomy:.2f}"
        if gate.passed is None:
            told = gate.note
        elif not gate.passed:
            told = f"**{told}**"
        rows.setdefault(gate.rung, {})[gate.gate] = told
    if not rows:
        return ""
    lines = [[rung, *(rows[rung].get(name, "") for name in ("G1", "G2", "G5"))] for rung in found.rungs if rung in rows]
    head = [
        "rung", f"G1 full attention (at least {SOLVED:g})",
        f"G2 state of 8 (at most {SMALL_STATE:g}) / of 64 (at least {ROOMY_STATE:g})",
        f"G5 oracle's list (at least {ORACLE_SHARE:g} of full attention)",
    ]  # fmt: skip
    return "**Gates, read off the runs (bold: fails).**\n\n" + markdown_rows(head, lines)


def permuted(found: Results) -> str:
    """Skill with the columns of flags permuted at test, of the lines that answer best."""
    budget = max(found.budgets, default=1.0)
    rows = []
    for line in ("full", *found.candidates, "recurrent_wide"):
        numbers = [found.mean(rung, line, budget, "skill_flags_permuted") for rung in found.rungs]
        if not all(math.isnan(number) for number in numbers):
            rows.append([line, *("" if math.isnan(number) else f"{number:.2f}" for number in numbers)])
    if not rows:
        return ""
    title = f"**Skill at {budget:g} x the critical rows with flags permuted at test.**\n\n"
    return title + markdown_rows(["", *found.rungs], rows)


def kinds(found: Results) -> str:
    """Skill by kind of query where a rung has several."""
    budget = max(found.budgets, default=1.0)
    rows = []
    for rung in found.rungs:
        for label in KINDS.get(rung, ()):
            row = [rung, label]
            for line in ("full", "oracle", *found.candidates, "recurrent_wide"):
                group = found.groups.get((rung, line, 1.0 if line in found.sizeless else budget), [])
                skills = [part["diagnosis"].get("slices", {}).get(label, {}).get("skill", math.nan) for part in group]
                row.append(f"{np.nanmean(skills):.2f}" if skills and not np.isnan(skills).all() else "")
            if any(row[2:]):
                rows.append(row)
    if not rows:
        return ""
    head = ["rung", "queries", "full", "oracle", *found.candidates, "recurrent_wide"]
    return f"**Kinds of queries, skill at {budget:g} x the critical rows.**\n\n" + markdown_rows(head, rows)


def services(found: Results) -> str:
    """One budget for services of different noise: the mean over services, and the one that fares worst.

    The worst is that of the mean over seeds; intervals are over seeds, the worst found anew in each resample.
    """
    rows = []
    for (rung, line, budget), group in sorted(
        found.groups.items(), key=lambda pair: (pair[0][0], -pair[0][2], pair[0][1])
    ):
        slices = [part["diagnosis"].get("slices", {}) for part in group]
        names = [name for name in slices[0] if name.startswith(SERVICE)]
        if not names:
            continue
        table = np.array([[each[name]["skill"] for name in names] for each in slices])  # [S, V]
        drawn = table[np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))].mean(1)  # [D, V]
        mean, worst = table.mean(0), int(table.mean(0).argmin())
        told = [
            f"{value:.2f} [{np.quantile(draws, 0.025):.2f}, {np.quantile(draws, 0.975):.2f}]"
            for value, draws in (
                (mean.mean(), drawn.mean(1)), (mean[worst], drawn.min(1)),
                (mean.mean() - mean[worst], drawn.mean(1) - drawn.min(1)),
            )
        ]  # fmt: skip
        size = "" if line in found.sizeless else f"{budget:g}"
        rows.append([rung, line, size, told[0], f"{told[1]} ({names[worst].removeprefix(SERVICE)})", told[2]])
    if not rows:
        return ""
    head = ["rung", "line", "budget", "mean over services", "worst service", "mean - worst"]
    return "**Services that share a budget, skill.**\n\n" + markdown_rows(head, rows)


def unranked(found: Results) -> str:
    """Which rungs are in no ranking, and why: full attention fails there, or a line of other rungs has not run."""
    lines: dict[str, set[float]] = {}
    for _, line, budget in found.groups:
        lines.setdefault(line, set()).add(budget)
    reasons: dict[str, list[str]] = {}
    ranked = found.ranked
    for rung in found.rungs:
        if rung not in ranked:
            missing = _missing(found, rung, lines)
            fails = found.at(rung, "full", 1.0) is not None and not found.solved(rung)
            why = "not solved by full attention" if fails else "; ".join(missing) or "no full attention"
            reasons.setdefault(why, []).append(rung)
    if not reasons:
        return ""
    told = "; ".join(f"{', '.join(rungs)} ({why})" for why, rungs in reasons.items())
    return f"Not ranked: {told}." if ranked else f"No rung is ranked: {told}."


def _missing(found: Results, rung: str, lines: dict[str, set[float]]) -> list[str]:
    """Lines of other rungs that this one has not, by why it has not."""
    reasons: dict[str, list[str]] = {}
    for line, budgets in lines.items():
        gaps = sorted(budget for budget in budgets if (rung, line, budget) not in found.groups)
        if gaps:
            told = [found.left_out[rung, line, budget] for budget in gaps if (rung, line, budget) in found.left_out]
            some = "" if len(gaps) == len(budgets) else f" at {', '.join(f'{budget:g}' for budget in gaps)}x"
            reasons.setdefault(told[0] if told else "not run", []).append(f"`{line}`{some}")
    return [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
