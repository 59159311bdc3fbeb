"""What the cells of the frontier say: tables, and the comparisons that were registered before anything was run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.frontier_files import read_cells
from benchmarks.frontier_grid import CONTROL_SHARES, MODELS, REFERENCE, SEEDS, TENTH, grid
from benchmarks.frontier_sets import SETS

__all__ = [
    "by_seed",
    "claims",
    "cores_of",
    "difference",
    "draw",
    "drawn",
    "everything_kept",
    "equal_time",
    "lines_of",
    "markdown",
    "parts_of",
    "positive_control",
    "recalled",
    "table",
    "verdict",
]

DRAWS, MARGIN = 2000, 0.02
# memories are of the same size up to this share
SAME_SIZE = 0.1
SHOWN = (0.0, 0.02, TENTH, 1.0)
# in the plot
SHOWN_CONTROLS = {"random": "x--", "recency": "+--"}
ROUTERS = [label for label, model in MODELS.items() if model.controls]


def cores_of(cells: list[dict[str, Any]]) -> list[str]:
    """The core sets that are judged together with those of some cells."""
    families = {SETS[cell["set"]].family for cell in cells if cell["set"] in SETS} or {"recent"}
    return [name for name, spec in SETS.items() if spec.core and spec.family in families]


def parts_of(cells: list[dict[str, Any]]) -> tuple[str, ...]:
    """Parts of the windows of some cells: all events, those of each age, and all rows."""
    ages = dict.fromkeys(age for name in cores_of(cells) for age, _ in SETS[name].ages)
    return ("events", *ages, "all")


def lines_of(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per set, model, memory, share and part, over seeds; intervals over seeds, then blocks of windows."""
    found: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for cell in cells:
        for point in cell["points"]:
            for part, scores in point["parts"].items():
                key = (cell["set"], cell["model"], point["memory"], point["share"], part)
                found.setdefault(key, []).append((point, scores))
    rows = []
    for (name, model, memory, share, part), seeds in found.items():
        low, high = drawn([scores for _, scores in seeds])
        costs = ("usage_share", "bytes", "scratchpad_attention", "ms_per_step")
        means = {cost: _mean([point[cost] for point, _ in seeds]) for cost in costs}
        rows.append(
            {"set": name, "model": model, "memory": memory, "share": share, "part": part, "seeds": len(seeds)}
            | {"WQL": _mean([scores["WQL"] for _, scores in seeds]), "low": low, "high": high}
            | {"MASE": _mean([scores["MASE"] for _, scores in seeds]), **means}
        )
    return pd.DataFrame(rows)


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def drawn(
    seeds: list[dict[str, Any]], against: list[dict[str, Any]] | None = None, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the score, or of its ratio to another's less 1, paired by both: seeds are drawn, then blocks."""
    rng = np.random.default_rng(0)
    loss, size = (np.array([one[name] for one in seeds]) for name in ("quantile", "size"))  # 2 x [seeds, blocks]
    place = rng.integers(len(loss), size=(DRAWS, len(loss), 1))
    block = rng.integers(loss.shape[1], size=(DRAWS, 1, loss.shape[1]))
    values = loss[place, block].sum((1, 2)) / np.maximum(size[place, block].sum((1, 2)), 1e-12)
    if against is not None:
        other = np.array([one["quantile"] for one in against])[place, block].sum((1, 2))
        values = loss[place, block].sum((1, 2)) / np.maximum(other, 1e-12) - 1
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(
    cells: list[dict[str, Any]], name: str, one: tuple[str, str], two: tuple[str, str], share: float | None, part: str
) -> dict[str, Any] | None:
    """Relative difference of two (model, memory) at a share, paired by seed; None where a seed of either is missing."""
    sides: list[dict[int, dict[str, Any]]] = []
    for model, memory in (one, two):
        sides.append(
            {
                cell["seed"]: {**point["parts"][part], "bytes": point["bytes"]}
                for cell in cells
                if (cell["set"], cell["model"]) == (name, model)
                for point in cell["points"]
                if (point["memory"], point["share"]) == (memory, share) and part in point["parts"]
            }
        )
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        return None
    left, right = ([side[seed] for seed in seeds] for side in sides)
    low, high = drawn(left, right)
    total = [sum(map(sum, (scores["quantile"] for scores in side))) for side in (left, right)]
    apart = total[0] / max(total[1], 1e-12) - 1
    sizes = [sum(side[seed]["bytes"] for seed in seeds) for side in sides]
    ratio = sizes[0] / sizes[1]
    return {
        "set": name, "one": "/".join(one), "two": "/".join(two), "share": share, "part": part, "seeds": len(seeds),
        "difference": apart, "low": low, "high": high, "bytes_ratio": ratio,
        "verdict": verdict(apart, low, high, seeds=len(seeds), bytes_ratio=ratio),
    }  # fmt: skip


def verdict(difference: float, low: float, high: float, *, seeds: int, bytes_ratio: float = 1.0) -> str:
    """In the words of the registration; nothing is called of few seeds, nor of memories of other sizes."""
    if seeds < len(SEEDS):
        return f"{seeds} of {len(SEEDS)} seeds: nothing is called"
    if abs(bytes_ratio - 1) > SAME_SIZE:
        return "other bytes: nothing is called"
    if difference < -MARGIN and high < 0:
        return "better"
    if low > -MARGIN:
        return "no better"
    return "undecided"


def positive_control(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """Whether everything kept is better than nothing kept, for each core set and part of its windows."""
    rows = []
    for name in cores_of(cells):
        for part in parts_of(cells):
            found = difference(cells, name, ("attention", "model"), ("recurrent", "model"), None, part)
            if found is not None:
                passed = found["difference"] < -MARGIN and found["high"] < 0
                shown = {key: found[key] for key in ("set", "part", "seeds", "difference", "low", "high")}
                rows.append({**shown, "passes": "yes" if passed else "no"})
    return pd.DataFrame(rows)


def everything_kept(cells: list[dict[str, Any]], part: str = "events") -> pd.DataFrame:
    """Whether everything kept is better than nothing kept with the same weights, for each core set and router."""
    rows = []
    for name in cores_of(cells):
        for model in ROUTERS:
            own = [cell for cell in cells if (cell["set"], cell["model"]) == (name, model)]
            sides = [
                [
                    point["parts"][part]
                    for cell in own
                    for point in cell["points"]
                    if (point["memory"], point["share"]) == ("model", share)
                ]
                for share in (1.0, 0.0)
            ]
            if own:
                low, high = drawn(*sides)
                total = [sum(map(sum, (scores["quantile"] for scores in side))) for side in sides]
                apart = total[0] / max(total[1], 1e-12) - 1
                row = {"set": name, "model": model, "part": part, "seeds": len(own), "difference": apart}
                passed = apart < -MARGIN and high < 0
                rows.append({**row, "low": low, "high": high, "passes": "yes" if passed else "no"})
    return pd.DataFrame(rows)


def recalled(cells: list[dict[str, Any]], share: float = TENTH) -> pd.DataFrame:
    """Difference of every model at one budget, or of its one size, to nothing kept (``recurrent``), by age of echo."""
    place = {(cell["set"], cell["model"], cell["seed"]): cell for cell in cells}
    rows = []
    for cell in cells:
        base = place.get((cell["set"], "recurrent", cell["seed"]))
        points = {(p["memory"], p["share"]): p["parts"] for p in cell["points"]}
        sizes = [point for point in points if point[0] == "model" and point[1] in (share, None)]
        sizes += [("recency", share)] if ("recency", share) in points else []
        if base is None:
            continue
        for point in sizes:
            row = {"set": cell["set"], "model": cell["model"], "memory": point[0], "seed": cell["seed"]}
            for part in parts_of(cells):
                one, two = points[point][part], base["points"][0]["parts"][part]
                low, high = drawn([one], [two])
                apart = sum(one["quantile"]) / max(sum(two["quantile"]), 1e-12) - 1
                row[part] = f"{100 * apart:+.1f} [{100 * low:+.0f}, {100 * high:+.0f}]"
            rows.append(row)
    return pd.DataFrame(rows)


def by_seed(cells: list[dict[str, Any]], share: float = TENTH) -> pd.DataFrame:
    """Error inside events of every fit of a router at each budget, and of the controls at one; the same of the oldest
    echoes; and the share of tokens that it took: fits that learned to look up are not those that did not."""
    oldest = parts_of(cells)[-2]
    rows = []
    for cell in cells:
        found = {(point["memory"], point["share"]): point for point in cell["points"]}
        if cell["model"] not in ROUTERS or not {"events", oldest} <= set(cell["points"][0]["parts"]):
            continue
        row: dict[str, Any] = {"set": cell["set"], "model": cell["model"], "seed": cell["seed"]}
        shown = [("model", asked) for asked in SHOWN] + [(name, share) for name in ("shuffled", "random", "recency")]
        for memory, asked in [key for key in shown if key in found]:
            label = f"{100 * asked:g} %" if memory == "model" else f"{memory} {100 * asked:g} %"
            row[label] = found[memory, asked]["parts"]["events"]["WQL"]
        for memory in [name for name in ("model", "recency") if (name, share) in found]:
            row[f"{oldest}, {memory}"] = found[memory, share]["parts"][oldest]["WQL"]
        row |= {
            f"took at {100 * asked:g} %": found["model", asked]["usage_share"]
            for asked in CONTROL_SHARES
            if ("model", asked) in found
        }
        rows.append(row)
    return pd.DataFrame(rows)


def claims(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """Every comparison that the registered claims need, on the core sets."""
    rows = []
    for name in cores_of(cells):
        for share in CONTROL_SHARES:
            for part in ("events", "all"):
                pairs = [((r, "model"), (r, control)) for r in ROUTERS for control in ("shuffled", "random", "recency")]
                pairs += [
                    ((r, "model"), (rival, "model")) for r in ROUTERS for rival in ("recurrent_wide", "neighbours")
                ]
                pairs += [(("learned", "model"), ("learned-token", "model"))]
                rows += [difference(cells, name, one, two, share, part) for one, two in pairs]
    return pd.DataFrame([row for row in rows if row is not None])


def answers(cells: list[dict[str, Any]], part: str = "events") -> pd.DataFrame:
    """Each registered claim with its verdict, and the comparisons that it rests on."""
    cores = cores_of(cells)
    lines = lines_of(cells)
    asked: dict[str, list[tuple[float, str, tuple[str, str]]]] = {"a": [], "b": [], "c": []}
    for name in cores:
        for share in CONTROL_SHARES:
            here = lines[(lines["set"] == name) & (lines["share"] == share) & (lines["part"] == part)]
            best = best_router(here)
            asked["a"] += [(share, name, (best, control)) for control in ("shuffled", "random")]
            for rival in ("recurrent_wide", "neighbours"):
                size = here.loc[here["model"] == rival, "bytes"]
                asked["b"].append((share, name, (best_router(here, None if size.empty else size.iloc[0]), rival)))
            asked["c"].append((share, name, ("learned", "learned-token")))
            if SETS[name].family == "old" and share == TENTH:
                asked.setdefault("d", []).append((share, name, (best, "recency")))
    rows = []
    for claim, comparisons in asked.items():
        said: dict[tuple[float, str], list[str]] = {}
        texts = []
        for share, name, (one, other) in comparisons:
            two = (one, other) if claim in ("a", "d") else (other, "model")
            found = difference(cells, name, (one, "model"), two, share, part)
            word = "not run" if found is None else found["verdict"]
            said.setdefault((share, name), []).append(word)
            apart = "" if found is None else f" {100 * found['difference']:+.1f} %"
            texts.append(f"{name} {share:g}: {one} against {other}{apart}, {word}")
        rows.append({"claim": claim, "part": part, "verdict": judged(claim, said, cores), "seen": "; ".join(texts)})
    return pd.DataFrame(rows)


def best_router(here: pd.DataFrame, size: float | None = None) -> str:
    """The router with the lowest score of those with as many seeds as any, and of about so many bytes where some are:
    one seed that went well is not the best router, nor is one that takes more than its rival."""
    own = here[(here["memory"] == "model") & here["model"].isin(ROUTERS)].sort_values("WQL")
    own = own[own["seeds"] == own["seeds"].max()]
    if size is not None and len(alike := own[(own["bytes"] / size - 1).abs() <= SAME_SIZE]):
        own = alike
    return str(own["model"].iloc[0]) if len(own) else REFERENCE


def judged(claim: str, said: dict[tuple[float, str], list[str]], sets: list[str]) -> str:
    """The verdict of a claim from those of its comparisons, by budget and set, as registered."""
    words = [word for those in said.values() for word in those]
    if any("nothing is called" in word or word == "not run" for word in words):
        return "not called"
    wins = {share: all(word == "better" for name in sets for word in said[share, name]) for share, _ in said}
    # one budget at which it holds is enough for (b), and one rival that is as good for refuting it
    if any(wins.values()) if claim == "b" else all(wins.values()):
        return "supported"
    worse = any if claim == "b" else all
    if all(worse(word == "no better" for word in those) for those in said.values()):
        return "refuted"
    return "undecided"


def equal_time(lines: pd.DataFrame, reference: str = REFERENCE, share: float = 0.1) -> pd.DataFrame:
    """For each model the best score among its points that take no longer than a reference does."""
    rows = []
    for (name, part), own in lines[lines["memory"] == "model"].groupby(["set", "part"]):
        limit = own[(own["model"] == reference) & (own["share"] == share)]["ms_per_step"]
        if len(limit):
            usable = own[own["ms_per_step"] <= 1.02 * limit.iloc[0]]
            best = usable.sort_values("WQL").groupby("model").head(1)
            rows.append(best.assign(set=name, part=part))
    return pd.concat(rows) if rows else lines.head(0)


def short(lines: pd.DataFrame) -> pd.DataFrame:
    """Error inside events and over all rows, a row for each set, model and memory, a column for each budget."""
    rows = []
    for (name, model, memory), own in lines.groupby(["set", "model", "memory"], sort=False):
        row: dict[str, Any] = {"set": name, "model": model if memory == "model" else f"{model}, {memory}"}
        row["seeds"] = int(own["seeds"].max())
        for part in ("events", "all"):
            scores = own[own["part"] == part]
            # rivals that have no size are one point
            shown = {share: f"{100 * share:g} %" for share in SHOWN}
            for share, label in shown.items():
                here = scores[scores["share"] == share]
                row[f"{part} {label}"] = float(here["WQL"].iloc[0]) if len(here) else ""
            whole = scores[scores["share"].isna()]
            row[f"{part} whole"] = float(whole["WQL"].iloc[0]) if len(whole) else ""
        at = own[(own["part"] == "all") & ((own["share"] == TENTH) | own["share"].isna())]
        for column in ("usage_share", "bytes", "scratchpad_attention", "ms_per_step"):
            row[column] = float(at[column].iloc[0]) if len(at) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def table(folder: Path) -> str:
    """All that was measured, the claims, and what was not run."""
    cells, texts = read_cells(folder), []
    if cells:
        lines = lines_of(cells)
        texts += [f"## In short (costs at {100 * TENTH:g} %)", markdown(short(lines))]
        texts += ["## Error against bytes", markdown(lines), "## At equal milliseconds", markdown(equal_time(lines))]
        if len(control := positive_control(cells)):
            texts += ["## Positive control: attention against recurrent", markdown(control)]
        if len(kept := everything_kept(cells)):
            texts += ["## Second control: everything kept against nothing, same weights", markdown(kept)]
        if len(seeds := by_seed(cells)):
            texts += ["## Routers, seed by seed", markdown(seeds)]
        if len(apart := recalled(cells)):
            texts += [f"## Against recurrent, in percent, at {100 * TENTH:g} % or whole", markdown(apart)]
        if len(found := claims(cells)):
            texts += ["## Comparisons (negative: the first is better)", markdown(found)]
            whole = pd.concat([answers(cells), answers(cells, "all")])
            texts += ["## Claims", markdown(whole)]
    family = SETS[cores_of(cells)[0]].family
    missing = [cell.name for cell in grid(core=False, family=family) if not (folder / f"{cell.name}.json").exists()]
    core = {cell.name for cell in grid(core=True, family=family)}
    texts.append(
        f"Not run: {len(missing)} cells, of them {len([m for m in missing if m in core])} of the mandatory core."
    )
    return "\n\n".join(texts)


def markdown(frame: pd.DataFrame) -> str:
    rows = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in frame.itertuples(index=False)]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(folder: Path, path: Path) -> None:
    """One panel for each set and part: error against bytes; a line for each router, dots for each rival, and what two
    controls keep with the weights of one router."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = lines_of(read_cells(folder))
    lines = lines[lines["part"].isin(["all", "events"])]
    controls, lines = lines[lines["model"] == REFERENCE], lines[lines["memory"] == "model"]
    sets, models = list(lines["set"].unique()), [name for name in MODELS if name in set(lines["model"])]
    figure = Figure(figsize=(10, 3.6 * len(sets) + 0.7), layout="constrained")
    panels = figure.subplots(len(sets), 2, squeeze=False)
    for row, name in zip(panels, sets, strict=True):
        for axes, part in zip(row, ("all", "events"), strict=True):
            for model in models:
                own = lines[(lines["set"] == name) & (lines["part"] == part) & (lines["model"] == model)]
                own, place, router = own.sort_values("bytes"), models.index(model), model in ROUTERS
                axes.plot(
                    own["bytes"], own["WQL"], "o-" if router else "D:", color=colormaps["tab20"](place % 20), ms=4,
                    lw=1.3, label=model,
                )  # fmt: skip
            for control, style in SHOWN_CONTROLS.items():
                own = controls[(controls["set"] == name) & (controls["part"] == part) & (controls["memory"] == control)]
                own = own.sort_values("bytes")
                label = f"{REFERENCE}, {control}"
                axes.plot(own["bytes"], own["WQL"], style, color="0.35", ms=5, lw=1.0, label=label)
            axes.set_xscale("log")
            axes.set_title(f"{name}, {part}", fontsize="medium")
            axes.set_xlabel("bytes of one item's memory")
            axes.set_ylabel("WQL")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize="small")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
