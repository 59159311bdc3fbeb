"""What the cells of the frontier say: tables, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.frontier_answers import (
    answers,
    callable_claims,
    claims,
    everything_kept,
    parts_against,
    positive_control,
)
from benchmarks.frontier_files import read_cells
from benchmarks.frontier_grid import CONTROL_SHARES, MODELS, REFERENCE, TENTH, grid
from benchmarks.frontier_lines import ROUTERS, cores_of, drawn, lines_of, markdown, parts_of
from benchmarks.frontier_sets import SETS

__all__ = ["by_seed", "draw", "equal_time", "of_every_seed", "recalled", "short", "table"]

SHOWN = (0.0, 0.02, TENTH, 1.0)
# in the plot
SHOWN_CONTROLS = {"random": "x--", "recency": "+--", "parts": "v-."}


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
            texts += [f"Controls let these be called: {', '.join(sorted(callable_claims(cells))) or 'none'}."]
        if len(parts := parts_against(cells)):
            texts += ["## Served by parts of the budget, same weights", markdown(parts)]
    family = SETS[cores_of(cells)[0]].family
    missing = [cell.name for cell in grid(core=False, family=family) if not (folder / f"{cell.name}.json").exists()]
    core = {cell.name for cell in grid(core=True, family=family)}
    texts.append(
        f"Not run: {len(missing)} cells, of them {len([m for m in missing if m in core])} of the mandatory core."
    )
    return "\n\n".join(texts)


def of_every_seed(lines: pd.DataFrame) -> pd.DataFrame:
    """Those with as many seeds as any of their set: one fit beside means of three would be taken for one of them."""
    return lines[lines["seeds"] == lines.groupby("set")["seeds"].transform("max")]


def draw(folder: Path, path: Path) -> None:
    """One panel for each set and part: error against bytes; a line for each router, dots for each rival, and what two
    controls and parts of the budget keep with the weights of one router."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = of_every_seed(lines_of(read_cells(folder)))
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
