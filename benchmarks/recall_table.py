"""What the cells of token recall say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.recall_model import MODELS

__all__ = ["CONTROLLED", "GRAFTS", "SHARE", "USAGES", "accuracy", "summary", "table"]

SHARE = 0.5
USAGES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
# usages at which chance chooses instead, and weights of a learned score are read in other ways
CONTROLLED = (0.05, 0.1, 0.5)
GRAFTS = ("unbiased", "by surprise")
# the rate of a model is the one of most seeds, then the one that answers best at this length, not that of the claims
CHOSEN_AT = 1024


def table(folder: Path) -> str:
    """Accuracy by model, memory and length, as Markdown."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = ["| ladder | model | lr | seed | task | memory | usage | length: accuracy | kept by layer | attention |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for cell in cells:
        seen: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in cell["rows"]:
            seen.setdefault((row["task"], row["memory"], row["usage"], row["allocation"]), []).append(row)
        for (task, memory, usage, allocation), rows in seen.items():
            said = ", ".join(f"{row['length']}: {row['accuracy']:.3f}" for row in rows)
            last = rows[-1]
            label = memory if allocation == "uniform" else f"{memory}, one threshold"
            kept = " ".join(f"{x:.2f}" for x in last["kept_by_layer"])
            mass = " ".join(f"{x:.2f}" for x in last["scratchpad_attention_by_layer"])
            which = f"{cell['ladder_name']} | {cell['model']} | {cell['rate']:g} | {cell['seed']}"
            lines.append(f"| {which} | {task} | {label} | {usage:g} | {said} | {kept} | {mass} |")
    return "\n".join(lines)


def accuracy(cell: dict[str, Any], length: int, usage: float, memory: str = "model") -> float:
    """Share of queries of multi-query recall answered right; a rival has no usage."""
    own = usage if MODELS[cell["model"]].get("mixer", "ham") == "ham" else 1.0
    names = ("length", "task", "memory", "usage", "allocation")
    wanted = (length, "recall", memory, own, "uniform")
    return next((row["accuracy"] for row in cell["rows"] if tuple(row[name] for name in names) == wanted), math.nan)


def summary(folder: Path) -> str:
    """One row per ladder, model and usage, over seeds, at the rate that was tried on most of them."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [f"| ladder | model | lr (others at {CHOSEN_AT:,}) | seeds | usage | 64 | 256 | 1,024 | 4,096: each seed |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for ladder, name in sorted({(cell["ladder_name"], cell["model"]) for cell in cells}):
        rates: dict[float, list[dict[str, Any]]] = {}
        for cell in cells:
            if (cell["ladder_name"], cell["model"]) == (ladder, name):
                rates.setdefault(cell["rate"], []).append(cell)
        scores = {rate: _mean([accuracy(cell, CHOSEN_AT, SHARE) for cell in own]) for rate, own in rates.items()}
        best = max(scores, key=lambda rate: (len(rates[rate]), scores[rate]))
        others = ", ".join(f"{rate:g}: {score:.3f}" for rate, score in scores.items() if rate != best)
        ham = MODELS[name].get("mixer", "ham") == "ham"
        settings = [(usage, "model") for usage in USAGES] + [(SHARE, "random")] if ham else [(1.0, "model")]
        for usage, memory in settings:
            own = [[accuracy(cell, length, usage, memory) for cell in rates[best]] for length in (64, 256, 1024, 4096)]
            if all(math.isnan(x) for values in own for x in values):
                continue  # a usage that was not asked then
            shown = " | ".join(f"{_mean(values):.3f}" for values in own[:3])
            each = " ".join(f"{value:.3f}" for value in own[3])
            label = f"{usage:g}{' at random' if memory == 'random' else ''}" if ham else "-"
            lines.append(
                f"| {ladder} | {name} | {best:g} ({others}) | {len(rates[best])} | {label} | {shown} | {each} |"
            )
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
