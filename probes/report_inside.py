"""Panels of a report on what happens inside: selection, stages, layers, worth of rows, streams, effects, real sets."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from probes.again_utility import utility_table
from probes.contract import generator
from probes.plots import lines_svg, raster_svg, scatter_svg, stacks_svg
from probes.real_table import real_frame
from probes.registry import list_probes
from probes.report_panels import MOST_LINES, MOST_SHOWN, folded, html_table
from probes.summary import best_rates, label, seeds_of, value

__all__ = ["effects", "layers", "prequential", "raster", "real_series", "residuals", "stage_bars"]

EFFECTS = {
    "regret_cost": "plan regret by cost", "regret_reward": "plan regret by reward", "pehe": "PEHE over that of none",
    "sign_accuracy": "signs right", "effect_slope": "slope (1: no bias)", "placebo_effect": "effect of placebos",
    "consistency": "effect of doing nothing, untaught", "additivity": "both beyond the sum",
    "factual_nmse": "factual NMSE",
    "causal_use": "causal use",
}  # fmt: skip
RASTER_ROUTERS = ("surprise", "innovation", "write", "tags", "mix", "random", "oracle")


# --- 4


def raster(documents: Sequence[dict[str, Any]]) -> str:
    """One tier-0 sequence of each suite, drawn anew: the state's error, and what each router keeps."""
    from probes.t0_run import draw_case, keep_by

    parts = []
    for suite in dict.fromkeys(d["identity"]["suite"] for d in documents):
        probe = list_probes().get(suite)
        if probe is None or not probe.trained:
            continue
        case = draw_case(probe, probe.main_rung(), preset="smoke", seed=0)
        T = case.batch.context_rows
        size = case.trace.error.norm(dim=-1)[0, :T]
        rows: list[tuple[str, Sequence[float], str]] = [
            ("critical", case.batch.crit[0, :T].float().tolist(), "#1b9e77"),
            ("distractor", case.batch.distract[0, :T].float().tolist(), "#b22222"),
            ("tagged", case.batch.tags[0, :T].float().tolist(), "#a6761d"),
            ("error of the state (score)", (size / size.max()).tolist(), "#000"),
        ]
        for name in RASTER_ROUTERS:
            kept = keep_by(case, name, case.critical, 0)
            rows.append((f"kept by {name}", kept[0, 0, :T].float().tolist(), "#1f77b4"))
        parts.append(f"<h3>{escape(probe.main_rung())} · T0</h3>{raster_svg(rows, title=suite)}")
    return "".join(parts) or "<p>No suite with single rows to keep.</p>"


# --- 5, 6


def stage_bars(documents: Sequence[dict[str, Any]]) -> str:
    rows = []
    for (tier, rung, name, budget), group in seeds_of(documents).items():
        found = [c["diagnosis"].get("stages") for c in group if c["diagnosis"].get("stages")]
        if tier == "T1" and found:
            mean = {stage: sum(part[stage] for part in found) / len(found) for stage in found[0]}
            rows.append((f"{rung} {name} b{budget:g}"[:34], mean))
    if not rows:
        return "<p>Stages are measured in tier 1, for models with a scratchpad.</p>"
    return (
        "<p class='note'>Share of the queries, each charged to the first stage that failed; b: budget as a multiple of"
        " the critical rows.</p>" + stacks_svg(rows, title="stages")
    )


def layers(documents: Sequence[dict[str, Any]]) -> str:
    rows = [
        {"rung": d["identity"]["rung"], "line": label(d["identity"]), "budget": d["budget"]["frac"],
         "seed": d["data_manifest"].get("train_seed", 0), "layer": number, **numbers}
        for d in best_rates(documents) if d["identity"]["tier"] == "T1"
        for number, numbers in enumerate(d["diagnosis"].get("by_layer", []))
    ]  # fmt: skip
    alloc = [
        {"rung": d["identity"]["rung"], "scheme": d["identity"]["router"].split(":")[1],
         **{f"recall, {m}": value(d, f"recall_{m}") for m in ("micro", "macro", "worst")}}
        for d in documents if d["identity"]["router"].startswith("alloc:")
    ]  # fmt: skip
    services = "<h3>One budget for services of different noise (T0)</h3>" + html_table(pd.DataFrame(alloc))
    table = html_table(pd.DataFrame(rows)) if rows else ""
    by_layer = table if len(rows) <= 40 else folded(f"{len(rows)} layers", table)
    return (by_layer + (services if alloc else "")) or "<p>Nothing measured by layer.</p>"


# --- 7


def residuals(documents: Sequence[dict[str, Any]]) -> str:
    """How routers order rows: against what each row is worth to full attention, and against what is critical."""
    worth = utility_table(documents)
    text = ""
    if worth:
        text = "<h3>Scores of trained routers against the worth of rows (leave one out)</h3>" + html_table(
            pd.DataFrame(worth)
        )
        seen: dict[str, int] = {}
        for content in best_rates(documents):
            about, rung = content["diagnosis"].get("utility"), content["identity"]["rung"]
            if about and content["identity"]["router"] in ("learned", "innovation") and seen.setdefault(rung, 0) < 1:
                seen[rung] += 1
                points = [(float(x), float(y), bool(m)) for x, y, m in about["points"]]
                text += f"<h4>{escape(rung)} · {escape(label(content['identity']))}, one sequence</h4>" + scatter_svg(
                    points, title=rung, x_name="rank of the router's score (1: asks most)",
                    y_name="error added by leaving the row out, over the floor's",
                )  # fmt: skip
    rows = [
        {"rung": d["identity"]["rung"], "axis": d["identity"].get("axis", ""),
         "residual percentile of critical rows": value(d, "residual_percentile"),
         **{f"AUROC {n}": value(d, f"utility_auroc_{n}") for n in ("surprise", "innovation", "write", "mix")}}
        for d in documents if d["identity"]["model"] == "rows"
    ]  # fmt: skip
    if rows:
        text += "<h3>Scores of tier 0 against critical rows</h3>" + html_table(pd.DataFrame(rows))
        text += folded("residuals of one sequence of each suite", _tier_0_scatter(documents))
    return text or "<p>Run tier 0, or hamts probes evaluate DIR --utility.</p>"


def _tier_0_scatter(documents: Sequence[dict[str, Any]]) -> str:
    import torch

    from probes.t0_run import draw_case

    plots = []
    for suite in dict.fromkeys(d["identity"]["suite"] for d in documents if d["identity"]["model"] == "rows"):
        probe = list_probes()[suite]
        if not probe.trained:
            continue
        case = draw_case(probe, probe.main_rung(), preset="smoke", seed=0)
        size = case.trace.error.norm(dim=-1)[0, : case.batch.context_rows]
        spread = 0.3 * torch.rand(len(size), generator=generator(3)) - 0.15
        crit = case.batch.crit[0]
        points = [(float(size[t]), float(crit[t]) + float(spread[t]), bool(crit[t])) for t in range(len(size))]
        plots.append(f"<h4>{escape(probe.main_rung())}</h4>" + scatter_svg(
            points, title=suite, x_name="error of the state when the row was written",
            y_name="a query needs the row (1) or not (0), spread for reading",
        ))  # fmt: skip
    return "".join(plots)


# --- 8, 9


def prequential(documents: Sequence[dict[str, Any]]) -> str:
    names = (
        "fading_error",
        "windowed_mase",
        "recovery_rows",
        "recovered_share",
        "drift_turnover",
        "recall_after_drift",
    )
    rows = [
        {"rung": d["identity"]["rung"], "line": f"{d['identity']['model']} · {d['identity']['router']}",
         **{name.replace("_", " "): value(d, name) for name in names}}
        for d in documents if any(name in d["results"] for name in names)
    ]  # fmt: skip
    if not rows:
        return "<p>Run stream in tier 0 for these.</p>"
    return _drifts(sorted({row["rung"] for row in rows})) + html_table(pd.DataFrame(rows))


def _drifts(rungs: Sequence[str]) -> str:
    """The fading error of one stream of each rung, with its drifts."""
    from probes.prequential import fading_error
    from probes.registry import get_probe
    from probes.t0_run import draw_case

    parts = []
    for rung in rungs[:MOST_SHOWN]:
        case = draw_case(get_probe(f"stream/{rung}")[0], rung, preset="smoke", seed=0)
        fading = fading_error(case.trace.error.square().mean(-1))[0]  # [T]
        points = [(float(row), float(fading[row])) for row in range(0, len(fading), 10)]
        parts.append(f"<h4>{escape(rung)}</h4>" + lines_svg(
            {"state, tier 0": points}, title=rung, x_name="row; drifts in red", y_name="fading squared error",
            dots=False, marks=case.batch.extra["drift_rows"][0].tolist(),
        ))  # fmt: skip
    return "".join(parts)


def effects(documents: Sequence[dict[str, Any]]) -> str:
    """Effect error by rows ahead, and plan regret."""
    parts = []
    for rung in sorted({d["identity"]["rung"] for d in documents if "effect_tau_1" in d["results"]}):
        series: dict[str, list[tuple[float, float]]] = {}
        rows = []
        for (tier, own, name, budget), group in seeds_of(documents).items():
            if own != rung or "effect_tau_1" not in group[0]["results"]:
                continue
            taus = [int(n.split("_")[-1]) for n in group[0]["results"] if n.startswith("effect_tau_")]
            means = {tau: float(np.mean([value(c, f"effect_tau_{tau}") for c in group])) for tau in taus}
            if budget == 1.0:
                series[name] = [(float(tau), mean) for tau, mean in means.items()]
            rows.append({"line": name, "tier": tier, "budget": budget, "seeds": len(group), **{
                what: float(np.mean([value(c, metric) for c in group])) for metric, what in EFFECTS.items()
                if any(metric in c["results"] for c in group)}})  # fmt: skip
        shown = dict(list(series.items())[:MOST_LINES])
        parts.append(f"<h3>{escape(rung)}, budget 1</h3>" + lines_svg(
            shown, title=rung, x_name="rows ahead", y_name="error of the effect, over that of assuming none"
        ) + html_table(pd.DataFrame(rows)))  # fmt: skip
    return "".join(parts) or "<p>cfr was not trained in these runs.</p>"


def real_series(real: Sequence[dict[str, Any]]) -> str:
    """Edit, drop and lead tests, gain by age, and scores around events of labelled sets."""
    if not real:
        return "<p>No labelled set was asked: hamts probes real --all --out DIR.</p>"
    tests, ages, events, found = [], [], [], []
    for content in real:
        fit = {"set": content["set"], "preset": content["preset"], "seed": content["seed"]}
        for test in content["tests"]:
            if "value" not in test:
                tests.append({**fit, "test": "none", "note": test["note"]})
                continue
            share = test.get("budget_share", content["budget_share"])
            tests.append({**fit, "test": test["test"], "budget share": share, "mean": test["value"],
                          "low": test["low"], "high": test["high"], "events": test["events"],
                          "rows": len(test["rows"]), "note": test["note"]})  # fmt: skip
            for age in sorted({row["age_rows"] for row in test["rows"]}) if test["test"] == "lead" else ():
                gains = [row["value"] for row in test["rows"] if row["age_rows"] == age]
                ages.append({**fit, "budget share": share, "age (rows)": age,
                             "mean gain": float(np.mean(gains)), "pairs": len(gains)})  # fmt: skip
        found += [{**fit, **row} for row in content.get("detection", ())]
        for name, rows in content["event_scores"].items():
            events.append({**fit, "forecaster": name, **{row["metric"]: row["value"] for row in rows}})
    note = (
        "<p class='note'>Changes of forecasts and errors in units of the target's spread, with 95 % intervals from"
        " fits and events resampled together. Above 0: the forecast depends on what was remembered. Event scores in"
        " units of the seasonal-naive error of the training part; scores inside events are diagnostics, twCRPS over"
        " all times decides.</p>"
    )
    return (
        note + html_table(real_frame(real)) + folded("tests of each fit", html_table(pd.DataFrame(tests)))
        + folded("gain of an earlier window by its age", html_table(pd.DataFrame(ages)))
        + (folded("labelled windows and kept rows", html_table(pd.DataFrame(found))) if found else "")
        + folded("around events", html_table(pd.DataFrame(events)))
    )  # fmt: skip
