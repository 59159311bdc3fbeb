"""One self-contained HTML page, and the same as Markdown, in ten panels. Failing gates come first, in red."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from probes import report_inside as inside
from probes import report_panels as panels
from probes.contract import FAMILY
from probes.gates import TRAINED, GateResult
from probes.registry import list_probes
from probes.report_axes import axis_panels
from probes.report_frontier import area_panel
from probes.report_ranks import profile_panels
from probes.summary import frontier_table, on_axis, score_table

__all__ = ["html_report", "limits", "markdown_report"]

STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:960px;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}h3{font-size:1em;margin-bottom:.3em}
h4{font-size:.95em;margin:.8em 0 .2em;font-weight:600}table{border-collapse:collapse;font-size:12px}
td,th{padding:2px 8px;border-bottom:1px solid #eee;text-align:right;vertical-align:bottom}
td:first-child,th:first-child{text-align:left;white-space:nowrap}.wide{overflow-x:auto}
.narrow td,.narrow th{padding:2px 5px}
.fail{color:#b00020;font-weight:600}.note{color:#666}svg{max-width:100%;height:auto}summary{cursor:pointer;color:#369}"""


def html_report(
    documents: Sequence[dict[str, Any]], *, gates: Sequence[GateResult] = (), real: Sequence[dict[str, Any]] = ()
) -> str:
    """The page.

    Args:
        gates: of ``gates.read_gates``; the failing ones come first.
        real: documents of labelled sets, of ``real_run.read_real``.
    """
    scores = score_table(documents)
    # values of axes have a panel of their own; they would crowd the others
    scores = scores[[not on_axis(str(line)) for line in scores["line"]]]
    found = [
        ("1 · Scorecard", panels.gates_first(gates) + panels.scorecard(scores) + profile_panels(documents)),
        ("2 · Budget frontier", panels.frontiers(scores) + area_panel(documents)),
        (
            "3 · Recall and skill against delay and other axes",
            panels.survival_lines(documents) + axis_panels(documents),
        ),
        ("4 · Selection in one sequence", inside.raster(documents)),
        ("5 · Where queries fail", inside.stage_bars(documents)),
        ("6 · Kept rows by layer and service", inside.layers(documents)),
        ("7 · Scores of routers against the worth of rows", inside.residuals(documents)),
        ("8 · Prequential error and cache turnover", inside.prequential(documents)),
        ("9 · Counterfactual effects", inside.effects(documents)),
        ("Real series: labelled windows", inside.real_series(real)),
        ("10 · What was not shown", _not_shown(documents, gates, real)),
    ]
    body = "".join(f"<h2>{escape(title)}</h2>{content}" for title, content in found)
    head = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Preservation probes</title><style>{STYLE}</style>"
    )
    return f"{head}<h1>Preservation probes</h1><p class='note'>{escape(_subtitle(documents))}</p>{body}</html>"


def markdown_report(
    documents: Sequence[dict[str, Any]], *, gates: Sequence[GateResult] = (), real: Sequence[dict[str, Any]] = ()
) -> str:
    """Failing and unread gates, scores, frontiers and limits as text tables."""
    scores = score_table(documents)
    parts = ["# Preservation probes", "", _subtitle(documents), ""]
    failing = [f"- {gate}" for gate in gates if gate.passed is False]
    if failing:
        parts += ["## Failing gates", "", *failing, ""]
    if unread := [f"- {gate.probe}/{gate.rung} {gate.gate}: {gate.note}" for gate in gates if gate.unread]:
        parts += ["## Gates not read", "", *unread, ""]
    for (tier, rung), part in scores.groupby(["tier", "rung"], sort=False):
        parts += [f"## {rung} ({tier})", "", _text_table(part.drop(columns=["tier", "rung"])), ""]
    frontier = frontier_table(scores)
    if len(frontier):
        parts += ["## Area under the budget frontier", "", _text_table(frontier), ""]
    parts += ["## What was not shown", "", *(f"- {line}" for line in limits(documents, gates, real)), ""]
    return "\n".join(parts)


def _subtitle(documents: Sequence[dict[str, Any]]) -> str:
    if not documents:
        return f"{FAMILY}: no runs of probes."
    versions = sorted({f"{d['identity']['suite']} v{d['identity']['suite_version']}" for d in documents})
    tiers = sorted({d["identity"]["tier"] for d in documents})
    return f"{FAMILY}: {len(documents)} runs of {', '.join(versions)}; tiers {', '.join(tiers)}, never ranked together."


def _text_table(frame: pd.DataFrame) -> str:
    cells = ([panels.cell_text(x) for x in row] for row in frame.to_numpy())
    rows = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in rows)


def limits(
    documents: Sequence[dict[str, Any]], gates: Sequence[GateResult] = (), real: Sequence[dict[str, Any]] = ()
) -> list[str]:
    """What these runs cannot say."""
    lines = ["Synthetic sequences, but where a run says otherwise; nothing here ranks forecasters on real series."]
    trained = [d for d in documents if d["identity"]["tier"] == "T1"]
    if trained:
        seeds = sorted({d["data_manifest"]["train_seed"] for d in trained})
        presets = sorted({str(d["config"].get("preset")) for d in trained})
        lines.append(f"Trained-small models only, presets {', '.join(presets)}, {len(seeds)} training seeds.")
        if len(seeds) < 5:
            lines.append("Fewer than five training seeds: routers cannot be ranked.")
        unsolved = sum(any("never reached" in w for w in d["warnings"]) for d in trained)
        if unsolved:
            lines.append(f"{unsolved} of {len(trained)} runs never reached skill 0.8 on validation.")
        diverged = sum(d["runtime"]["status"] != "ok" for d in trained)
        if diverged:
            lines.append(f"{diverged} runs diverged; they are in the table.")
    longer = sorted({str(d["config"]["eval_preset"]) for d in trained if _extrapolates(d)})
    if longer:
        count = sum(_extrapolates(d) for d in trained)
        lines.append(
            f"Extrapolation: {count} runs were asked at another size ({', '.join(longer)}) than they were trained at."
        )
    if any(d["identity"]["tier"] == "T0" for d in documents):
        lines.append("Tier 0 has fixed keys and an ideal reader: it says what is kept, not what a network learns.")
    if real:
        few = sorted({content["set"] for content in real if content["events"] < 20})
        fits = Counter((content["set"], content.get("preset")) for content in real)
        lines.append(
            f"Real series: {min(fits.values())} to {max(fits.values())} fits of a set and preset; fewer than twenty"
            f" events, so case studies: {', '.join(few) or 'none'}."
        )
    lines += _without_gates(gates)
    missing = sorted(set(list_probes()) - {d["identity"]["suite"] for d in documents})
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    return lines


def _without_gates(gates: Sequence[GateResult]) -> list[str]:
    """How many gates that train models have no result."""
    lines = []
    of_training = [gate for gate in gates if gate.gate in TRAINED]
    there = {(g.probe, g.rung, g.gate) for g in of_training if g.passed is not None or g.unread}
    wanted = [(p.name, r, g) for p in list_probes().values() if p.trained for r in p.rungs for g in TRAINED]
    if open_gates := len(set(wanted) - there):
        lines.append(f"{open_gates} of {len(wanted)} gates that train models were not run (G1, G2, G5 of every rung).")
    if unread := sum(gate.unread for gate in of_training):
        lines.append(f"{unread} of {len(wanted)} gates that train models have too few seeds to be read.")
    return lines


def _extrapolates(content: dict[str, Any]) -> bool:
    return content["config"].get("eval_preset", content["config"].get("preset")) != content["config"].get("preset")


def _not_shown(documents: Sequence[dict[str, Any]], gates: Sequence[GateResult], real: Sequence[dict[str, Any]]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in limits(documents, gates, real)) + "</ul>"
