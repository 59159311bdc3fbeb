"""The controls and the comparisons that were registered before anything was run, and the verdicts of the claims."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.frontier_grid import CONTROL_SHARES, REFERENCE, SEEDS, TENTH
from benchmarks.frontier_lines import (
    MARGIN,
    ROUTERS,
    SAME_SIZE,
    cores_of,
    difference,
    drawn,
    lines_of,
    parts_of,
)
from benchmarks.frontier_sets import SETS

__all__ = [
    "answers", "best_router", "callable_claims", "claims", "everything_kept", "judged", "parts_against",
    "positive_control",
]  # fmt: skip

# the memory of a network that is served by parts of the budget
PARTS = "parts"
# claims whose comparisons share their weights, or are of HAM alone: the second control is theirs
OF_HAM = ("a", "c", "d", "e")


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
    """Whether everything kept is better than nothing kept, each seed with its own weights, by core set and router."""
    rows = []
    for name in cores_of(cells):
        for model in ROUTERS:
            pairs = [
                (scores[1.0], scores[0.0])
                for cell in cells
                if (cell["set"], cell["model"]) == (name, model)
                and {1.0, 0.0} <= set(scores := _own_shares(cell, part))
            ]
            if pairs:
                full, empty = ([pair[side] for pair in pairs] for side in (0, 1))
                low, high = drawn(full, empty)
                total = [sum(map(sum, (scores["quantile"] for scores in side))) for side in (full, empty)]
                apart = total[0] / max(total[1], 1e-12) - 1
                row = {"set": name, "model": model, "part": part, "seeds": len(pairs), "difference": apart}
                passed = apart < -MARGIN and high < 0
                rows.append({**row, "low": low, "high": high, "passes": "yes" if passed else "no"})
    return pd.DataFrame(rows)


def _own_shares(cell: dict[str, Any], part: str) -> dict[float | None, dict[str, Any]]:
    """Scores of a cell's own memory by share, where it has that part of the windows."""
    points = [point for point in cell["points"] if point["memory"] == "model" and part in point["parts"]]
    return {point["share"]: point["parts"][part] for point in points}


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


def callable_claims(cells: list[dict[str, Any]]) -> tuple[str, ...]:
    """Claims that the controls let be called, by the ninth registration's rule; of all routers that have every seed:
    no comparison that is called names another."""
    first, second = positive_control(cells), everything_kept(cells)
    second = second[second["seeds"] >= len(SEEDS)] if len(second) else second
    cores = cores_of(cells)

    def whole(frame: pd.DataFrame) -> bool:
        events = frame[frame["part"] == "events"] if len(frame) else frame
        if not len(events) or set(events["set"]) != set(cores):
            return False
        return bool((events["passes"] == "yes").all() and (events["seeds"] >= len(SEEDS)).all())

    if not whole(second):
        return ()
    return (*OF_HAM, "b") if whole(first) else OF_HAM


def parts_against(cells: list[dict[str, Any]], part: str = "events") -> pd.DataFrame:
    """Routers served by parts of the budget against the same weights served evenly, and against the newest entries."""
    rows = []
    for name in cores_of(cells):
        for share in CONTROL_SHARES:
            for model in ROUTERS:
                for other in ("model", "recency", "parts, recency"):
                    found = difference(cells, name, (model, PARTS), (model, other), share, part)
                    if found is not None:
                        rows.append(found)
    return pd.DataFrame(rows)


def answers(cells: list[dict[str, Any]], part: str = "events") -> pd.DataFrame:
    """Each registered claim with its verdict, and the comparisons that it rests on."""
    cores = cores_of(cells)
    lines = lines_of(cells)
    parted = PARTS in set(lines["memory"])
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
            if SETS[name].family in ("old", "calendar") and share == TENTH:
                asked.setdefault("d", []).append((share, name, (best, "recency")))
            if parted and share == CONTROL_SHARES[0]:
                asked.setdefault("e", []).append((share, name, (REFERENCE, PARTS)))
    rows = []
    for claim, comparisons in asked.items():
        said: dict[tuple[float, str], list[str]] = {}
        texts = []
        for share, name, (one, other) in comparisons:
            # with the same weights: a control against the model, and parts of the budget against even ones
            pair = ((one, "model"), (one, other)) if claim in ("a", "d") else ((one, "model"), (other, "model"))
            if claim == "e":
                pair = ((one, PARTS), (one, "model"))
            found = difference(cells, name, *pair, share, part)
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
