"""What the cells of one ladder of token recall say to the claims, and why the learned score does what it does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.recall_model import MODELS
from benchmarks.recall_table import CONTROLLED, GRAFTS, SHARE, USAGES

__all__ = ["claims"]

LENGTH = 4096
# at which routers are compared, and with whom
COMPARED = (0.02, 0.05, 0.1, SHARE)
REFERENCE = "surprise"
Cells = dict[str, list[dict[str, Any]]]


def claims(folder: Path, ladder: str, rate: float) -> str:
    """Tables of what was recalled, what was held and read, differences from the reference, and the other claims."""
    read = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{ladder}--*.json"))]
    cells: Cells = {}
    for cell in read:
        if cell["rate"] == rate and cell["rows"][-1]["length"] == LENGTH:
            cells.setdefault(cell["model"], []).append(cell)
    cells = {name: cells[name] for name in MODELS if name in cells}
    tables = [recalled, lengths, needles, held, settled, against, layers, trend]
    return "\n\n".join([*(one(cells) for one in tables), rates(read, rate)])


def value(
    cell: dict[str, Any], usage: float, of: Callable[[dict[str, Any]], float], *, memory: str = "model",
    task: str = "recall", allocation: str = "uniform", length: int = LENGTH,
) -> float:  # fmt: skip
    """Of the one row that this is, nan where there is none; a rival has no usage."""
    own = usage if routes(cell["model"]) else 1.0
    wanted = (length, task, memory, own, allocation)
    names = ("length", "task", "memory", "usage", "allocation")
    return next((of(row) for row in cell["rows"] if tuple(row[name] for name in names) == wanted), math.nan)


def routes(name: str) -> bool:
    return MODELS[name].get("mixer", "ham") == "ham"


def right(row: dict[str, Any]) -> float:
    return float(row["accuracy"])


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def recalled(cells: Cells) -> str:
    """Share of queries right at the last length by usage, and each seed at the usage of the claims."""
    names = [f"{usage:.0%}" for usage in USAGES] + [f"{usage:.0%} by lot" for usage in CONTROLLED]
    lines = [f"| right at {LENGTH:,}: model | {' | '.join(names)} | {SHARE:.0%}, each seed |", _rule(len(names) + 2)]
    for name, own in cells.items():
        if routes(name):
            said = [mean([value(cell, usage, right) for cell in own]) for usage in USAGES]
            said += [mean([value(cell, usage, right, memory="random") for cell in own]) for usage in CONTROLLED]
        else:
            said = [math.nan] * (len(USAGES) - 1) + [mean([value(cell, 1.0, right) for cell in own])]
            said += [math.nan] * len(CONTROLLED)
        each = " ".join(f"{value(cell, SHARE, right):.3f} ({cell['seed']})" for cell in own)
        lines.append(f"| {name} | {' | '.join(_shown(x) for x in said)} | {each} |")
    return "\n".join(lines)


def needles(cells: Cells) -> str:
    """The same of the single needle, by usage."""
    names = [f"{usage:.0%}" for usage in USAGES]
    lines = [f"| needle right at {LENGTH:,}: model | {' | '.join(names)} | seeds |", _rule(len(names) + 2)]
    for name, own in cells.items():
        asked = USAGES if routes(name) else (*[math.nan] * (len(USAGES) - 1), 1.0)
        said = [mean([value(cell, usage, right, task="needle") for cell in own]) for usage in asked]
        said = [x if usage == usage else math.nan for x, usage in zip(said, asked, strict=True)]
        lines.append(f"| {name} | {' | '.join(_shown(x) for x in said)} | {len(own)} |")
    return "\n".join(lines)


def held(cells: Cells) -> str:
    """Of queries: whose value the last layer holds; of these, how many are right; the same weights read otherwise."""
    names = [f"{usage:.0%} held, right of held" for usage in COMPARED]
    names += [f"{usage:.0%} {how}" for how in GRAFTS for usage in CONTROLLED] + ["values lost, 100 %"]
    lines = [f"| why: model | {' | '.join(names)} |", _rule(len(names) + 1)]
    for name, own in cells.items():
        if not routes(name):
            continue
        said = []
        for usage in COMPARED:
            kept = mean([value(cell, usage, lambda row: row["value_kept_by_layer"][-1]) for cell in own])
            some = [c for c in own if value(c, usage, lambda row: row["value_kept_by_layer"][-1]) > 0]
            of = mean([value(cell, usage, lambda row: row["right_of_kept_by_layer"][-1]) for cell in some])
            said.append(f"{kept:.3f}, {of:.3f}")
        said += [
            _shown(mean([value(c, usage, right, memory=how) for c in own])) for how in GRAFTS for usage in CONTROLLED
        ]
        said.append(_shown(mean([value(cell, 1.0, lambda row: row["values_lost"]) for cell in own])))
        lines.append(f"| {name} | {' | '.join(said)} |")
    return "\n".join(lines)


def lengths(cells: Cells) -> str:
    """Share of queries right at the usage of the claims, and from the state alone, by length."""
    lines = [f"| right at {SHARE:.0%} (state alone), by length: model | 64 | 256 | 1,024 | 4,096 |", _rule(5)]
    for name, own in cells.items():
        said = []
        for length in (64, 256, 1024, 4096):
            whole = mean([value(cell, SHARE, right, length=length) for cell in own])
            alone = mean([value(cell, 0.0, right, length=length) for cell in own])
            said.append(f"{whole:.3f} ({alone:.3f})" if routes(name) else f"{whole:.3f}")
        lines.append(f"| {name} | {' | '.join(said)} |")
    return "\n".join(lines)


def settled(cells: Cells) -> str:
    """Whose value the last layer holds at a tenth, by length: each seed."""
    lines = ["| held at 10 % in the last layer, each seed, by length: model | 64 | 256 | 1,024 | 4,096 |", _rule(5)]
    for name, own in cells.items():
        if routes(name):
            said = []
            for length in (64, 256, 1024, 4096):
                each = [value(c, 0.1, lambda row: row["value_kept_by_layer"][-1], length=length) for c in own]
                said.append(" ".join(f"{x:.3f}" for x in each))
            lines.append(f"| {name} | {' | '.join(said)} |")
    return "\n".join(lines)


def against(cells: Cells) -> str:
    """Each router's answers minus the reference's, over seeds that both have."""
    names = [f"{usage:.0%}" for usage in COMPARED]
    lines = [f"| minus {REFERENCE}, mean (each seed): model | {' | '.join(names)} |", _rule(len(names) + 1)]
    base = {cell["seed"]: cell for cell in cells.get(REFERENCE, [])}
    for name, own in cells.items():
        both = [cell for cell in own if cell["seed"] in base]
        if not routes(name) or name == REFERENCE or not both:
            continue
        said = []
        for usage in COMPARED:
            apart = [value(cell, usage, right) - value(base[cell["seed"]], usage, right) for cell in both]
            said.append(f"{mean(apart):+.3f} ({' '.join(f'{x:+.3f}' for x in apart)})")
        lines.append(f"| {name} | {' | '.join(said)} |")
    return "\n".join(lines)


def layers(cells: Cells) -> str:
    """Usage by layer under one threshold for all layers."""
    lines = ["| one threshold, usage by layer: model | mean of layers | apart | each seed |", _rule(4)]
    for name, own in cells.items():
        if not routes(name):
            continue

        def kept(cell: dict[str, Any], layer: int) -> float:
            return value(cell, SHARE, lambda row: row["kept_by_layer"][layer], allocation="pooled")

        pairs = [(kept(cell, 0), kept(cell, 1)) for cell in own]
        shown = " ".join(f"{mean([pair[layer] for pair in pairs]):.2f}" for layer in (0, 1))
        apart = mean([abs(first - second) for first, second in pairs])
        each = ", ".join(f"{first:.2f} {second:.2f}" for first, second in pairs)
        lines.append(f"| {name} | {shown} | {apart:.2f} | {each} |")
    return "\n".join(lines)


def trend(cells: Cells) -> str:
    """How much the error rises at most from one usage to the next."""
    lines = [f"| error by usage ({', '.join(f'{x:.0%}' for x in USAGES)}): model | mean | largest rise |", _rule(3)]
    for name, own in cells.items():
        if routes(name):
            wrong = [1 - mean([value(cell, usage, right) for cell in own]) for usage in USAGES]
            rise = max(later - before for before, later in zip(wrong, wrong[1:], strict=False))
            lines.append(f"| {name} | {', '.join(f'{x:.3f}' for x in wrong)} | {rise:+.3f} |")
    return "\n".join(lines)


def rates(cells: list[dict[str, Any]], rate: float) -> str:
    """Other learning rates beside this one, at seeds that both have."""
    lines = [f"| other rates: model | seed | rate | right at {LENGTH:,} | at {rate:g} |", _rule(5)]
    for cell in cells:
        twins = [c for c in cells if (c["model"], c["seed"], c["rate"]) == (cell["model"], cell["seed"], rate)]
        if cell["rate"] != rate and twins:
            pair = [_shown(value(c, SHARE, right)) for c in (cell, twins[0])]
            lines.append(f"| {cell['model']} | {cell['seed']} | {cell['rate']:g} | {' | '.join(pair)} |")
    return "\n".join(lines)


def _shown(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3f}"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
