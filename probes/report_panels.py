"""Panels of a report on scores: scorecard with gates, frontiers, delays. Each is a piece of HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from probes.evaluate import DELAY
from probes.gates import GateResult
from probes.plots import bars_svg, lines_svg
from probes.scores import SOLVED_SKILL, effective_level, pareto
from probes.summary import frontier_table, label, on_axis, seeds_of

__all__ = [
    "MOST_LINES",
    "MOST_SHOWN",
    "cell_text",
    "folded",
    "frontiers",
    "gates_first",
    "html_table",
    "line_name",
    "scorecard",
    "survival_lines",
]

MOST_LINES = 14
# lines that differ from a rung by how entries are shared, or by nothing but the fit
OWN_LINES = r" \[.*(?:layers |trained again)"
MOST_SHOWN = 6
ORACLES, RANDOMS = ("ham · oracle", "kv · oracle"), ("ham · random", "kv · random")
WIDE_STATES = ("recurrent_wide", "state_wide · none")


def cell_text(content: Any) -> str:
    """A number or a word in a table."""
    if isinstance(content, float):
        if math.isnan(content):
            return ""
        return "inf" if math.isinf(content) else f"{content:,.0f}" if abs(content) >= 1000 else f"{content:.3f}"
    return str(content)


def html_table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{breakable(str(c))}</th>" for c in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell_text(x))}</td>" for x in row) + "</tr>" for row in frame.to_numpy().tolist()
    )
    return f"<div class='wide'><table><tr>{head}</tr>{rows}</table></div>"


def breakable(name: str) -> str:
    """A heading that may be broken after its underscores."""
    return escape(name).replace("_", "_<wbr>")


def line_name(content: dict[str, Any]) -> str:
    return label(content["identity"])


def folded(title: str, text: str) -> str:
    """What is long and seldom read, behind a click."""
    return f"<details><summary>{escape(title)}</summary>{text}</details>"


# --- 1


def gates_first(gates: Sequence[GateResult]) -> str:
    """Failing gates in red, those that could not be read and why, then how many passed."""
    failing = [gate for gate in gates if gate.passed is False]
    text = "".join(
        f"<p class='fail'>FAIL {escape(f'{g.probe}/{g.rung} {g.gate}')}: {g.value:.3f}, limit {g.limit:.3f}."
        f" {escape('; '.join(part for part in (g.note, g.reason) if part))}.</p>"
        for g in failing
    )
    unread = [gate for gate in gates if gate.unread]
    text += "".join(
        f"<p class='note'>{escape(f'{g.probe}/{g.rung} {g.gate}')}:"
        f" {escape('; '.join(part for part in (g.note, g.reason) if part))}.</p>"
        for g in unread
    )
    passed = sum(gate.passed is True for gate in gates)
    if not gates:
        note = "No gates were run into this folder: hamts probes validate --all --out DIR."
    else:
        rest = len(gates) - passed - len(failing) - len(unread)
        note = f"Gates: {passed} passed, {len(failing)} failed, {len(unread)} not read, {rest} do not apply."
    return f"{text}<p class='note'>{note}</p>"


def scorecard(scores: pd.DataFrame) -> str:
    """Lines against rungs for each tier and budget; of tier 1 also bars with intervals."""
    parts = []
    # networks before what is scored without any
    for tier, of_tier in sorted(scores.groupby("tier"), key=lambda pair: pair[0] == "T0"):
        fixed = of_tier[of_tier["budget"] < 0]
        for budget in sorted(b for b in of_tier["budget"].unique() if b >= 0) or [-1.0]:
            part = pd.concat([fixed, of_tier[of_tier["budget"] == budget]]).drop_duplicates(["rung", "line"])
            size = "" if budget < 0 else f", budget {budget:g} x the critical rows"
            parts.append(f"<h3>{tier}{size}: skill</h3>{_matrix(part)}")
            if tier != "T0":
                bars = "".join(_bars(rung, group) for rung, group in part.groupby("rung", sort=False))
                parts.append(bars if budget == 1.0 else folded(f"bars with intervals at budget {budget:g}", bars))
    note = (
        "<p class='note'>Skill: 1 answers as well as the generator, 0 as the best predictor without a memory of single"
        " items. Lines are sorted by their mean over rungs for reading only: no mean ranks them.</p>"
    )
    return note + "".join(parts)


def _matrix(part: pd.DataFrame) -> str:
    """Skill by line and rung, tinted."""
    table = part.pivot_table(index="line", columns="rung", values="skill", sort=False)
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index]
    head = "".join(f"<th>{breakable(str(rung))}</th>" for rung in table.columns)
    rows = []
    for line, row in table.iterrows():
        cells = "".join(
            "<td></td>"
            if math.isnan(x)
            else f"<td style='background:rgba(27,158,119,{max(0.0, min(x, 1.0)) * 0.6:.2f})'>{x:.2f}</td>"
            for x in row
        )
        rows.append(f"<tr><td>{escape(str(line))}</td>{cells}</tr>")
    return f"<div class='wide'><table class='narrow'><tr><th>line</th>{head}</tr>{''.join(rows)}</table></div>"


def _tint(skill: float) -> str:
    return f"background:rgba(27,158,119,{max(0.0, min(skill, 1.0)) * 0.6:.2f})"


def _bars(rung: Any, group: pd.DataFrame) -> str:
    best = group.sort_values("skill", ascending=False)
    rows = [(str(r.line), r.skill, r.low, r.high) for r in best.itertuples()]
    few = " <span class='note'>(fewer than five training seeds: no ranking)</span>"
    note = few if best["flag"].eq("few_seeds").any() else ""
    return f"<h4>{escape(str(rung))}{note}</h4>{bars_svg(rows, title=str(rung))}"


# --- 2


def frontiers(scores: pd.DataFrame) -> str:
    """Skill against bytes; between chance and the truth shaded; who is never beaten, and where KV overtakes a state."""
    parts = []
    for (tier, rung), part in scores.groupby(["tier", "rung"], sort=False):
        series = {
            str(line): [(r.bytes, max(-1.0, r.skill)) for r in points.itertuples()]
            for line, points in part.groupby("line", sort=False) if points["bytes"].notna().any()
        }  # fmt: skip
        if not any(len(points) > 1 for points in series.values()):
            continue
        shown = dict(list({**{n: p for n, p in series.items() if len(p) > 1}, **series}.items())[:MOST_LINES])
        oracle = next((name for name in ORACLES if name in shown), "")
        random = next((name for name in RANDOMS if name in shown), "")
        plot = lines_svg(
            shown, title=str(rung), x_name="bytes a sequence (log scale)", y_name="skill", log_x=True,
            band=(random, oracle),
        )  # fmt: skip
        parts.append((f"{rung} · {tier}", plot))
    axes = _axes(scores)
    parts.sort(key=lambda part: part[0].endswith("T0"))
    if not parts:
        return axes or "<p>One budget only: no frontier.</p>"
    shown_plots = "".join(f"<h3>{escape(title)}</h3>{plot}" for title, plot in parts[:MOST_SHOWN])
    rest = "".join(f"<h3>{escape(title)}</h3>{plot}" for title, plot in parts[MOST_SHOWN:])
    table = frontier_table(scores)
    return (
        "<p class='note'>Shaded: between rows kept at random and the rows that are needed.</p>" + shown_plots
        + (folded(f"{len(parts) - MOST_SHOWN} more", rest) if rest else "") + "<h3>Area under the frontier, fewest"
        " bytes for 50 and 90 % of full attention, regret to the oracle (skill, bytes)</h3>" + html_table(table)
        + _crossings(scores) + axes
    )  # fmt: skip


def _axes(scores: pd.DataFrame) -> str:
    """Skill against bytes over precisions of the entries and widths of the state, each budget a line of its own.

    Splits of the layers and networks that were trained again are lines of the plots above.
    """
    lines = scores["line"].astype(str)
    scores = scores[~lines.str.contains(OWN_LINES)]
    varied = scores[scores["line"].astype(str).str.contains(" [", regex=False)]
    parts = []
    for tier, rung in varied[["tier", "rung"]].drop_duplicates().itertuples(index=False):
        part = scores[(scores["tier"] == tier) & (scores["rung"] == rung)]
        base = part["line"].astype(str).str.split(" [", regex=False).str[0]
        series = {}
        for line, points in part.groupby(base, sort=False):
            several = points["line"].nunique() > 1
            sizes = (
                points.groupby("budget", sort=True) if several and points["budget"].nunique() > 1 else [(None, points)]
            )
            for budget, some in sizes:
                if len(some) > 1:
                    name = str(line) if budget is None else f"{line} at {budget:g}x"
                    series[name] = sorted((r.bytes, max(-1.0, r.skill)) for r in some.itertuples())
        shown = dict(list(series.items())[:MOST_LINES])
        plot = lines_svg(shown, title=str(rung), x_name="bytes a sequence (log scale)", y_name="skill", log_x=True)
        parts.append(f"<h3>{escape(str(rung))} · {tier}, precisions of entries and widths of the state</h3>{plot}")
    return "".join(parts)


def _crossings(scores: pd.DataFrame) -> str:
    """Points that none beats, and the bytes from which a line with kept rows is above the widened state."""
    rows = []
    for (tier, rung), part in scores.groupby(["tier", "rung"], sort=False):
        known = part[np.isfinite(part["bytes"]) & (part["bytes"] > 0)]
        low, high = known["low"].fillna(known["skill"]), known["high"].fillna(known["skill"])
        best = known[pareto(known["bytes"].to_numpy(), low.to_numpy(), high.to_numpy())] if len(known) else known
        wide = next((known[known["line"] == name] for name in WIDE_STATES if (known["line"] == name).any()), None)
        for line, points in known.groupby("line", sort=False):
            if wide is None or not str(line).startswith(("ham ·", "kv ·")) or len(points) < 2 or len(wide) < 2:
                continue
            rows.append({
                "tier": tier, "rung": rung, "line": line, "above the widened state from (bytes)":
                crossover(points, wide), "points that none beats": int((best["line"] == line).sum()),
            })  # fmt: skip
    if not rows:
        return ""
    return "<h3>Where kept rows overtake a state of equal bytes</h3>" + folded("table", html_table(pd.DataFrame(rows)))


def crossover(points: pd.DataFrame, wide: pd.DataFrame) -> str:
    """Bytes from which one line stays above another, by straight lines over log bytes; in words where it never is."""
    first, second = (part.sort_values("bytes") for part in (points, wide))
    low = max(first["bytes"].min(), second["bytes"].min())
    high = min(first["bytes"].max(), second["bytes"].max())
    if not high > low:
        return "no common sizes"
    grid = np.exp2(np.linspace(np.log2(low), np.log2(high), 200))
    apart = np.interp(np.log2(grid), np.log2(first["bytes"]), first["skill"]) - np.interp(
        np.log2(grid), np.log2(second["bytes"]), second["skill"]
    )
    below = np.flatnonzero(apart <= 0)
    if len(below) == 0:
        return f"{low:,.0f} (all sizes)"
    return "never" if below[-1] == len(grid) - 1 else f"{grid[below[-1] + 1]:,.0f}"


# --- 3


def survival_lines(documents: Sequence[dict[str, Any]]) -> str:
    """Share kept by age, skill by delay with the largest that is still solved, and the other slices."""
    parts = []
    for (tier, rung), found in _at_one(documents, "survival").items():
        series = {name: [(float(age.strip("<=>")), pair[0]) for age, pair in ages.items()] for name, ages in found}
        shown = dict(list(series.items())[:MOST_LINES])
        parts.append((f"{rung} · {tier}", lines_svg(
            shown, title=rung, x_name="age of the item, up to so many rows (log scale)", y_name="share kept", log_x=True
        )))  # fmt: skip
    parts.sort(key=lambda part: part[0].endswith("T0"))
    first = "".join(f"<h3>{escape(title)}</h3>{plot}" for title, plot in parts[:MOST_SHOWN])
    rest = "".join(f"<h3>{escape(title)}</h3>{plot}" for title, plot in parts[MOST_SHOWN:])
    rows = [
        {"rung": d["identity"]["rung"], "tier": d["identity"]["tier"], "line": line_name(d),
         "seed": d["data_manifest"].get("train_seed", 0), "slice": name, **numbers}
        for d in documents for name, numbers in d["diagnosis"].get("slices", {}).items()
        if d["budget"]["frac"] == 1.0
    ]  # fmt: skip
    text = first + (folded(f"{len(parts) - MOST_SHOWN} more", rest) if rest else "") + _effective(documents)
    return text + (folded("all slices", html_table(pd.DataFrame(rows))) if rows else "") or "<p>No ages measured.</p>"


def _at_one(documents: Sequence[dict[str, Any]], name: str) -> dict[tuple[str, str], list[tuple[str, dict[str, Any]]]]:
    """A part of the diagnosis of each line at budget 1, its first seed, by tier and rung."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for content in documents:
        part = content["diagnosis"].get(name, {})
        if part and content["budget"]["frac"] == 1.0 and not on_axis(line_name(content)):
            key = (content["identity"]["tier"], content["identity"]["rung"])
            found.setdefault(key, {}).setdefault(line_name(content), part)
    # mechanisms of a router after the routers
    return {key: sorted(lines.items(), key=lambda pair: ":" in pair[0]) for key, lines in found.items()}


def _effective(documents: Sequence[dict[str, Any]]) -> str:
    """The largest delay up to which skill stays at 0.8, by the lower end of its interval over training seeds."""
    rows = []
    for (tier, rung, name, budget), group in seeds_of(documents).items():
        by_delay: dict[float, list[float]] = {}
        for content in group:
            for part, numbers in content["diagnosis"].get("slices", {}).items():
                if part.startswith(DELAY):
                    by_delay.setdefault(float(part.removeprefix(DELAY)), []).append(numbers["skill"])
        if not by_delay:
            continue
        levels = sorted(by_delay)
        low = [_lower_end(by_delay[x]) for x in levels]
        rows.append({"rung": rung, "tier": tier, "line": name, "budget": budget, "seeds": len(group),
                     "effective delay (rows)": effective_level(levels, low),
                     **{f"skill, delay up to {x:,.0f}": float(np.mean(by_delay[x])) for x in levels}})  # fmt: skip
    if not rows:
        return ""
    return f"<h3>Largest delay with skill of {SOLVED_SKILL:g} and more</h3>" + html_table(pd.DataFrame(rows))


def _lower_end(skills: Sequence[float]) -> float:
    """Of the interval over training seeds; of one seed, its own value."""
    error = 1.96 * float(np.std(skills, ddof=1)) / math.sqrt(len(skills)) if len(skills) > 1 else 0.0
    return float(np.mean(skills)) - error
