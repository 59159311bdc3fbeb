"""Aggregates of documents for reports: a line per rung, model, router and budget, over training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from probes.packed import sequence_errors
from probes.stats import interquartile_mean, mean_interval

__all__ = ["best_rates", "chosen_rates", "frontier_table", "on_axis", "score_table", "seeds_of"]

SOLVED = 0.8


def label(identity: dict[str, Any]) -> str:
    """Name of a line in plots and tables."""
    name = f"ham · {identity['router']}" if identity["model"] == "ham" else str(identity["model"])
    if identity.get("tier") == "T0":
        name = f"{identity['model']} · {identity['router']}"
    return f"{name} [{identity['axis']}]" if identity.get("axis") else name


def on_axis(line: str) -> bool:
    """Whether a line differs from its rung by the value of an axis."""
    return " [" in line and "=" in line.rpartition(" [")[2]


def value(content: dict[str, Any], metric: str) -> float:
    result = content["results"].get(metric)
    return math.nan if result is None else float(result.get("value", result["median"]))


def rate_group(content: dict[str, Any]) -> tuple[str, ...]:
    """What a learning rate is chosen for: an architecture on a rung."""
    identity = content["identity"]
    return tuple(str(identity.get(name, "")) for name in ("tier", "rung", "model", "readout", "axis"))


def chosen_rates(documents: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], float]:
    """For each architecture on each rung, the learning rate that is best on validation with the first seed.

    Rates are tried with one router or size of an architecture, so only the line with most rates is asked.
    """
    lines: dict[tuple[str, ...], dict[tuple[Any, ...], dict[float, float]]] = {}
    for content in documents:
        identity, seed = content["identity"], int(content["data_manifest"].get("train_seed", 0))
        sized = () if identity["model"] == "ham" else (content["budget"]["frac"],)
        rates = lines.setdefault(rate_group(content), {}).setdefault((seed, identity["router"], *sized), {})
        validation = content["runtime"].get("validation") or [[0, 0.0]]
        rates[float(content["config"].get("learning_rate", 0.0))] = float(validation[-1][1])
    found = {}
    for group, tried in lines.items():
        # of equal numbers of rates the first seed, then the first in the alphabet
        line = min(tried, key=lambda key: (-len(tried[key]), str(key)))
        found[group] = min(tried[line], key=lambda rate: tried[line][rate])
    return found


def best_rates(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at the chosen learning rates; all others stay in the folder and in the tidy table."""
    rates = chosen_rates(documents)
    return [c for c in documents if float(c["config"].get("learning_rate", 0.0)) == rates[rate_group(c)]]


def seeds_of(documents: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str, float], list[dict[str, Any]]]:
    """Documents of the same tier, rung, line and budget, one a training seed."""
    groups: dict[tuple[str, str, str, float], list[dict[str, Any]]] = {}
    for content in best_rates(documents):
        identity = content["identity"]
        name = label(identity)
        budget = float(content["budget"]["frac"])
        key = (identity["tier"], identity["rung"], name, -1.0 if math.isnan(budget) else budget)
        groups.setdefault(key, []).append(content)
    return groups


def score_table(documents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per tier, rung, line and budget: skill with its interval, recall, bytes, share of solved seeds."""
    rows = []
    for (tier, rung, name, budget), group in seeds_of(documents).items():
        skills = [value(content, "skill") for content in group]
        if all(math.isnan(s) for s in skills):
            continue
        low, high, flag = _interval(group, skills)
        rows.append({
            "tier": tier, "rung": rung, "line": name, "budget": budget, "skill": float(np.nanmean(skills)),
            "low": low, "high": high, "iqm": interquartile_mean(np.clip(skills, -1, 1)), "seeds": len(group),
            "solved": float(np.mean([s >= SOLVED for s in skills])),
            "recall": float(np.nanmean([value(c, "recall_corrected") for c in group] or [math.nan]))
            if any(not math.isnan(value(c, "recall_corrected")) for c in group) else math.nan,
            "bytes": float(np.mean([c["budget"]["bytes_total"] for c in group])), "flag": flag,
            "status": ",".join(sorted({c["runtime"]["status"] for c in group})),
        })  # fmt: skip
    columns = ["tier", "rung", "line", "budget", "skill", "low", "high", "iqm", "seeds", "solved", "recall", "bytes",
               "flag", "status"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).sort_values(["tier", "rung", "budget", "skill"], ignore_index=True)


def _interval(group: Sequence[dict[str, Any]], skills: list[float]) -> tuple[float, float, str]:
    """Over training seeds and sequences where the errors lie beside the documents; else over seeds alone."""
    errors = [sequence_errors(content) for content in group] if group[0]["identity"]["tier"] != "T0" else [None]
    tables = [1.0 - part / c["floor"]["mse"] for part, c in zip(errors, group, strict=False) if part is not None]
    if len(tables) < len(group):
        if len(skills) == 1:
            return math.nan, math.nan, "one_draw"
        found = mean_interval(np.array(skills)[:, None], resamples=500)
        return found.low, found.high, "seeds_alone"
    width = min(len(table) for table in tables)
    found = mean_interval(np.stack([table[:width] for table in tables]), resamples=500)
    return found.low, found.high, found.flag


def frontier_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Area under the budget frontier, B50, B90 and regret to the oracle, for lines with two budgets or more."""
    from probes.scores import budget_area, bytes_at_share

    rows = []
    for (tier, rung), part in scores.groupby(["tier", "rung"]):
        full = part[part["line"].isin(["full", "full · all"])]
        if full.empty:
            continue
        full_skill, full_bytes = float(full["skill"].iloc[0]), float(full["bytes"].iloc[0])
        areas = {}
        for line, points in part.groupby("line"):
            sizes, skills = points["bytes"].to_numpy(), points["skill"].to_numpy()
            if len(set(sizes)) < 2 or not np.isfinite(sizes).all():
                continue
            areas[line] = {
                "aubf": budget_area(sizes, skills, bytes_full=full_bytes),
                "b50": bytes_at_share(sizes, skills, full_skill=full_skill, share=0.5),
                "b90": bytes_at_share(sizes, skills, full_skill=full_skill, share=0.9),
            }
        best = next((areas[name]["aubf"] for name in ("ham · oracle", "kv · oracle") if name in areas), math.nan)
        rows += [
            {"tier": tier, "rung": rung, "line": line, **numbers, "regret": best - numbers["aubf"]}
            for line, numbers in areas.items()
        ]
    return pd.DataFrame(rows, columns=["tier", "rung", "line", "aubf", "b50", "b90", "regret"])
