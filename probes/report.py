"""One self-contained HTML page, and the same as Markdown, in ten panels. Failing gates come first, in red."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from probes.contract import FAMILY, generator
from probes.plots import bars_svg, lines_svg, raster_svg, scatter_svg, stacks_svg
from probes.registry import list_probes
from probes.summary import frontier_table, label, score_table, seeds_of, value

__all__ = ["html_report", "markdown_report"]

STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:900px;color:#222}h1{font-size:1.5em}
h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}table{border-collapse:collapse;font-size:12px}
td,th{padding:2px 8px;border-bottom:1px solid #eee;text-align:right}td:first-child,th:first-child{text-align:left}
.fail{color:#b00020;font-weight:600}.note{color:#666}svg{max-width:100%;height:auto}"""
RASTER_ROUTERS = ("surprise", "innovation", "write", "tags", "mix", "random", "oracle")
MOST_LINES = 14


def html_report(documents: Sequence[dict[str, Any]]) -> str:
    """The page."""
    scores = score_table(documents)
    panels = [
        ("1 · Scorecard", _gates(documents) + _scorecard(scores)),
        ("2 · Budget frontier", _frontiers(scores)),
        ("3 · Recall and skill against delay and other axes", _survival(documents)),
        ("4 · Selection in one sequence", _raster(documents)),
        ("5 · Where queries fail", _stages(documents)),
        ("6 · Kept rows by layer and slice", _layers(documents)),
        ("7 · Residual against need", _residuals(documents)),
        ("8 · Prequential error and cache turnover", _prequential(documents)),
        ("9 · Counterfactual effects", _effects(documents)),
        ("10 · What was not shown", _not_shown(documents)),
    ]
    body = "".join(f"<h2>{escape(title)}</h2>{content}" for title, content in panels)
    head = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Preservation probes</title><style>{STYLE}</style>"
    )
    return f"{head}<h1>Preservation probes</h1><p class='note'>{escape(_subtitle(documents))}</p>{body}</html>"


def markdown_report(documents: Sequence[dict[str, Any]]) -> str:
    """Scores, frontiers and limits as text tables."""
    scores = score_table(documents)
    parts = ["# Preservation probes", "", _subtitle(documents), ""]
    failing = [f"- FAILED {name}: {note}" for name, note in failed_gates(documents)]
    if failing:
        parts += ["## Failing gates", "", *failing, ""]
    for (tier, rung), part in scores.groupby(["tier", "rung"], sort=False):
        parts += [f"## {rung} ({tier})", "", _text_table(part.drop(columns=["tier", "rung"])), ""]
    frontier = frontier_table(scores)
    if len(frontier):
        parts += ["## Area under the budget frontier", "", _text_table(frontier), ""]
    parts += ["## What was not shown", "", *(f"- {line}" for line in limits(documents)), ""]
    return "\n".join(parts)


def _subtitle(documents: Sequence[dict[str, Any]]) -> str:
    versions = sorted({f"{d['identity']['suite']} v{d['identity']['suite_version']}" for d in documents})
    tiers = sorted({d["identity"]["tier"] for d in documents})
    return f"{FAMILY}: {len(documents)} runs of {', '.join(versions)}; tiers {', '.join(tiers)}, never ranked together."


def _cell(content: Any) -> str:
    if isinstance(content, float):
        if math.isnan(content):
            return ""
        return "inf" if math.isinf(content) else f"{content:,.0f}" if abs(content) >= 1000 else f"{content:.3f}"
    return str(content)


def _text_table(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * len(frame.columns), *([_cell(x) for x in row] for row in frame.to_numpy())]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in rows)


def _html_table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{escape(str(c))}</th>" for c in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(x))}</td>" for x in row) + "</tr>" for row in frame.to_numpy().tolist()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


# --- the panels


def failed_gates(documents: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Gates that documents carry as failed."""
    found = {}
    for content in documents:
        for gate, check in content.get("checks", {}).items():
            if check.get("passed") is False:
                found[f"{content['identity']['rung']} {gate}"] = str(check.get("note", ""))
    return sorted(found.items())


def _gates(documents: Sequence[dict[str, Any]]) -> str:
    failing = failed_gates(documents)
    if failing:
        return "".join(f"<p class='fail'>{escape(name)}: {escape(note)}</p>" for name, note in failing)
    return "<p class='note'>No failed gate is noted in these runs; hamts probes validate runs the gates.</p>"


def _scorecard(scores: pd.DataFrame) -> str:
    parts = []
    for (tier, rung, budget), part in scores.groupby(["tier", "rung", "budget"], sort=False):
        best = part.sort_values("skill", ascending=False)
        rows = [(r.line, r.skill, r.low, r.high) for r in best.itertuples()]
        size = "" if budget < 0 else f", budget {budget:g} x critical rows"
        few = best["flag"].eq("few_seeds").any()
        note = " <span class='note'>(fewer than five training seeds: no ranking)</span>" if few else ""
        parts.append(f"<h3>{escape(str(rung))} · {tier}{size}{note}</h3>{bars_svg(rows, title=str(rung))}")
    return "".join(parts)


def _frontiers(scores: pd.DataFrame) -> str:
    parts = []
    for (tier, rung), part in scores.groupby(["tier", "rung"], sort=False):
        series = {
            str(line): [(r.bytes, max(-1.0, r.skill)) for r in points.itertuples()]
            for line, points in part.groupby("line") if points["bytes"].notna().any()
        }  # fmt: skip
        several = {name: points for name, points in series.items() if len(points) > 1}
        if several:
            shown = dict(list({**several, **series}.items())[:MOST_LINES])
            plot = lines_svg(shown, title=str(rung), x_name="bytes a sequence (log)", y_name="skill", log_x=True)
            parts.append(f"<h3>{escape(str(rung))} · {tier}</h3>{plot}")
    table = frontier_table(scores)
    return ("".join(parts) + (_html_table(table) if len(table) else "")) or "<p>One budget only: no frontier.</p>"


def _survival(documents: Sequence[dict[str, Any]]) -> str:
    parts = []
    for rung in dict.fromkeys(d["identity"]["rung"] for d in documents):
        series = {}
        for content in documents:
            ages = content["diagnosis"].get("survival", {})
            if content["identity"]["rung"] != rung or content["budget"]["frac"] != 1.0 or not ages:
                continue
            name = label(content["identity"])
            series[name] = [(float(age.strip("<=>")), pair[0]) for age, pair in ages.items()]
        if series:
            shown = dict(list(series.items())[:MOST_LINES])
            parts.append(lines_svg(shown, title=rung, x_name=f"{rung}: age of the item in rows (up to, log)",
                                   y_name="share kept", log_x=True))  # fmt: skip
    rows = [
        {"rung": d["identity"]["rung"], "line": label(d["identity"]), "slice": name, **numbers}
        for d in documents for name, numbers in d["diagnosis"].get("slices", {}).items()
        if d["budget"]["frac"] == 1.0
    ]  # fmt: skip
    return "".join(parts) + (_html_table(pd.DataFrame(rows)) if rows else "") or "<p>Nothing measured by age.</p>"


def _raster(documents: Sequence[dict[str, Any]]) -> str:
    """One tier-0 sequence of each suite, drawn anew: what each router keeps of it."""
    from probes.t0_run import draw_case, keep_by

    parts = []
    for suite in dict.fromkeys(d["identity"]["suite"] for d in documents):
        probe = list_probes().get(suite)
        if probe is None or not probe.trained:
            continue
        case = draw_case(probe, probe.main_rung(), preset="smoke", seed=0)
        T = case.batch.context_rows
        rows = [
            ("critical", case.batch.crit[0, :T].tolist(), "#1b9e77"),
            ("distractor", case.batch.distract[0, :T].tolist(), "#b22222"),
        ]
        for name in RASTER_ROUTERS:
            kept = keep_by(case, name, case.critical, 0)
            rows.append((name, kept[0, 0, :T].tolist(), "#1f77b4"))
        parts.append(f"<h3>{escape(probe.main_rung())} (tier 0)</h3>{raster_svg(rows, title=suite)}")
    return "".join(parts) or "<p>No suite with single rows to keep.</p>"


def _stages(documents: Sequence[dict[str, Any]]) -> str:
    rows = []
    for (tier, rung, name, budget), group in seeds_of(documents).items():
        found = [c["diagnosis"].get("stages") for c in group if c["diagnosis"].get("stages")]
        if tier == "T1" and found:
            mean = {stage: sum(part[stage] for part in found) / len(found) for stage in found[0]}
            rows.append((f"{rung} {name} b{budget:g}"[:34], mean))
    if not rows:
        return "<p>Stages are measured in tier 1, for models with a scratchpad.</p>"
    return stacks_svg(rows, title="stages")


def _layers(documents: Sequence[dict[str, Any]]) -> str:
    rows = [
        {"rung": d["identity"]["rung"], "line": label(d["identity"]), "budget": d["budget"]["frac"], "layer": number,
         **numbers}
        for d in documents if d["identity"]["tier"] == "T1"
        for number, numbers in enumerate(d["diagnosis"].get("by_layer", []))
    ]  # fmt: skip
    alloc = [
        {"scheme": d["identity"]["router"].split(":")[1],
         **{m: value(d, f"recall_{m}") for m in ("micro", "macro", "worst")}}
        for d in documents if d["identity"]["router"].startswith("alloc:")
    ]  # fmt: skip
    text = (_html_table(pd.DataFrame(rows)) if rows else "") + (_html_table(pd.DataFrame(alloc)) if alloc else "")
    return text or "<p>Nothing measured by layer.</p>"


def _residuals(documents: Sequence[dict[str, Any]]) -> str:
    """Rows of one tier-0 sequence: size of the state's error, and whether a query needs the row."""
    from probes.t0_run import draw_case

    rows = [
        {"rung": d["identity"]["rung"], "residual percentile": value(d, "residual_percentile"),
         **{f"AUROC {n}": value(d, f"utility_auroc_{n}") for n in ("surprise", "innovation", "write", "mix")}}
        for d in documents if d["identity"]["model"] == "rows"
    ]  # fmt: skip
    plots = []
    for suite in dict.fromkeys(d["identity"]["suite"] for d in documents if d["identity"]["model"] == "rows"):
        probe = list_probes()[suite]
        if not probe.trained:
            continue
        case = draw_case(probe, probe.main_rung(), preset="smoke", seed=0)
        size = case.trace.error.norm(dim=-1)[0, : case.batch.context_rows]
        jitter = generator_noise(len(size))
        crit = case.batch.crit[0]
        points = [(float(size[t]), float(crit[t]) + jitter[t], bool(crit[t])) for t in range(len(size))]
        plots.append(scatter_svg(points, title=suite, x_name=f"{probe.main_rung()}: state residual",
                                 y_name="needed (upper) or not"))  # fmt: skip
    text = (_html_table(pd.DataFrame(rows)) if rows else "") + "".join(plots)
    return text or "<p>Run tier 0 for residuals: hamts probes run --tier T0.</p>"


def generator_noise(count: int) -> list[float]:
    """Spread for points that would lie on one another."""
    import torch

    return (0.3 * torch.rand(count, generator=generator(3)) - 0.15).tolist()


def _prequential(documents: Sequence[dict[str, Any]]) -> str:
    names = ("fading_error", "windowed_mase", "recovery_rows", "recovered_share", "drift_turnover")
    rows = [
        {"rung": d["identity"]["rung"], "line": f"{d['identity']['model']} · {d['identity']['router']}",
         **{name: value(d, name) for name in names}}
        for d in documents if any(name in d["results"] for name in names)
    ]  # fmt: skip
    return _html_table(pd.DataFrame(rows)) if rows else "<p>Run stream in tier 0 for these.</p>"


def _effects(documents: Sequence[dict[str, Any]]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for content in documents:
        taus = [(int(n.split("_")[-1]), value(content, n)) for n in content["results"] if n.startswith("effect_tau_")]
        if taus:
            series[f"{label(content['identity'])} s{content['data_manifest']['train_seed']}"] = [
                (float(t), v) for t, v in taus
            ]
            rows.append({"line": label(content["identity"]), "budget": content["budget"]["frac"],
                         **{n: value(content, n) for n in ("regret_cost", "regret_reward")}})  # fmt: skip
    if not series:
        return "<p>cfr was not trained in these runs.</p>"
    shown = dict(list(series.items())[:MOST_LINES])
    return lines_svg(shown, title="effects", x_name="rows ahead", y_name="effect NMSE") + _html_table(
        pd.DataFrame(rows)
    )


def limits(documents: Sequence[dict[str, Any]]) -> list[str]:
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
    if any(d["identity"]["tier"] == "T0" for d in documents):
        lines.append("Tier 0 has fixed keys and an ideal reader: it says what is kept, not what a network learns.")
    missing = sorted(set(list_probes()) - {d["identity"]["suite"] for d in documents})
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    return lines


def _not_shown(documents: Sequence[dict[str, Any]]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in limits(documents)) + "</ul>"
