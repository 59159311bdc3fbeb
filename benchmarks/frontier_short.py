"""The tables that ``frontier.md`` shows of a folder of cells: routers with their controls, rivals, HAM against each of
them on the seeds that both have, ages of echoes, and routers served by parts of the budget.

``python -m benchmarks.frontier_short --folder benchmarks/results/frontier/eighth``; errors are means over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.frontier_answers import best_router
from benchmarks.frontier_files import read_cells
from benchmarks.frontier_grid import CONTROL_SHARES, CONTROLS, MODELS, TENTH
from benchmarks.frontier_lines import ROUTERS, cores_of, difference, lines_of, markdown, parts_of
from hamts.errors import DataError

SIZED = [name for name, model in MODELS.items() if model.sized]
WHOLE = [name for name, model in MODELS.items() if not model.sized and not model.controls and name != "recurrent"]
SHOWN = (0.0, *CONTROL_SHARES, 1.0)


def _one(lines: pd.DataFrame, name: str, model: str, memory: str, share: float | None, part: str) -> pd.Series | None:
    own = lines[(lines["set"] == name) & (lines["model"] == model) & (lines["memory"] == memory)]
    own = own[(own["part"] == part) & (own["share"].isna() if share is None else own["share"] == share)]
    return own.iloc[0] if len(own) else None


def _error(row: pd.Series | None) -> str:
    return "" if row is None else f"{row['WQL']:.4f}" if row["WQL"] < 0.2 else f"{row['WQL']:.3f}"


def routers(lines: pd.DataFrame, name: str, part: str = "events") -> pd.DataFrame:
    """Error of every router at each budget, and of its controls; what it took of what was asked."""
    rows = []
    for model in [model for model in ROUTERS if model in set(lines.loc[lines["set"] == name, "model"])]:
        row: dict[str, Any] = {"set": name, "router": model}
        at = {share: _one(lines, name, model, "model", share, part) for share in SHOWN}
        row["seeds"] = 0 if (tenth := at[TENTH]) is None else int(tenth["seeds"])
        row |= {f"{100 * share:g} %": _error(found) for share, found in at.items()}
        for share in CONTROL_SHARES:
            for control in CONTROLS:
                row[f"{control} {100 * share:g} %"] = _error(_one(lines, name, model, control, share, part))
        row["took"] = ", ".join(
            f"{one['usage_share']:.3f}" for share in CONTROL_SHARES if (one := at[share]) is not None
        )
        rows.append(row)
    return pd.DataFrame(rows)


def sizes(cells: list[dict[str, Any]], lines: pd.DataFrame, name: str) -> pd.DataFrame:
    """Error, bytes and milliseconds of rivals, and of the best router at each budget; error of each seed, too."""
    rows: list[tuple[str, float | None]] = []
    here = lines[(lines["set"] == name) & (lines["memory"] == "model") & (lines["part"] == "events")]
    rows += [(best_router(here[here["share"] == share]), share) for share in CONTROL_SHARES]
    rivals = [model for model in dict.fromkeys(here["model"]) if model not in ROUTERS]
    rows += [
        (model, None if pd.isna(share) else share)
        for model in rivals
        for share in sorted(set(here.loc[here["model"] == model, "share"]))
    ]
    found = []
    for model, share in rows:
        events, whole = (_one(lines, name, model, "model", share, part) for part in ("events", "all"))
        if events is not None and whole is not None:
            size = "" if share is None else f"{100 * share:g} %"
            found.append(
                {"set": name, "model": model, "size": size, "seeds": int(events["seeds"]), "events": _error(events)}
                | {"all rows": _error(whole), "MB": f"{events['bytes'] / 1e6:.2f}"}
                | {
                    "ms a step": f"{events['ms_per_step']:.2f}",
                    "events, of each seed": _seeds(cells, name, model, share),
                }
            )
    return pd.DataFrame(found)


def _seeds(cells: list[dict[str, Any]], name: str, model: str, share: float | None) -> str:
    errors = [
        f"{cell['seed']}: {_error(pd.Series(point['parts']['events']))}"
        for cell in cells
        for point in cell["points"]
        if (cell["set"], cell["model"], point["memory"], point["share"]) == (name, model, "model", share)
    ]
    return ", ".join(errors)


def against(cells: list[dict[str, Any]], lines: pd.DataFrame, name: str, part: str = "events") -> pd.DataFrame:
    """Routers against rivals that have a size, in percent with intervals, on the seeds that both have, with the ratio
    of their bytes and of their milliseconds: those of other bytes, or of few seeds, are not called."""
    rows = []
    for share in CONTROL_SHARES:
        for model in [model for model in ROUTERS if model in set(lines.loc[lines["set"] == name, "model"])]:
            for rival in SIZED:
                found = difference(cells, name, (model, "model"), (rival, "model"), share, part)
                both = [_one(lines, name, one, "model", share, part) for one in (model, rival)]
                if found is not None and both[0] is not None and both[1] is not None:
                    rows.append(
                        {"set": name, "share": share, "router": model, "rival": rival, "seeds": found["seeds"]}
                        | {"difference": _percent(found), "bytes": f"{found['bytes_ratio']:.2f}"}
                        | {"ms": f"{both[0]['ms_per_step'] / both[1]['ms_per_step']:.2f}", "verdict": found["verdict"]}
                    )
    return pd.DataFrame(rows)


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"


def ages(cells: list[dict[str, Any]], name: str) -> pd.DataFrame:
    """Against ``recurrent``, in percent with intervals, by age of echo: routers and the newest at a tenth, rivals."""
    rows = []
    shown: list[tuple[str, str, float | None]]
    shown = [(model, memory, TENTH) for model in ROUTERS for memory in ("model", "recency")]
    shown += [(model, "model", TENTH) for model in SIZED]
    shown += [(model, "model", None) for model in WHOLE]
    for model, memory, share in shown:
        moved = _as_whole(cells, model, share)
        row: dict[str, Any] = {"set": name, "model": model if memory == "model" else f"{model}, {memory}"}
        for part in parts_of(cells):
            found = difference(moved, name, (model, memory), ("recurrent", "model"), None, part)
            if found is None:
                break
            row["seeds"] = found["seeds"]
            row[part] = _percent(found)
        else:
            rows.append(row)
    return pd.DataFrame(rows)


def parted(cells: list[dict[str, Any]], lines: pd.DataFrame, name: str, part: str = "events") -> pd.DataFrame:
    """Routers served by parts of the budget that come from the scores, against the same weights served evenly, the
    newest in as many bytes (in even parts, and in the same ones), and rivals of these bytes."""
    rows = []
    for share in CONTROL_SHARES:
        for model in [model for model in ROUTERS if model in set(lines.loc[lines["set"] == name, "model"])]:
            if (own := _one(lines, name, model, "parts", share, part)) is None:
                continue
            row: dict[str, Any] = {"set": name, "share": share, "router": model}
            row |= {
                "parts": _error(own),
                "attention": f"{own['scratchpad_attention']:.2f}",
                "took": f"{own['usage_share']:.3f}",
            }
            others = {
                "even": (model, "model"),
                "newest": (model, "recency"),
                "newest, same parts": (model, "parts, recency"),
                **{rival: (rival, "model") for rival in SIZED},
            }
            for label, other in others.items():
                found = difference(cells, name, (model, "parts"), other, share, part)
                if found is not None:
                    apart = "other bytes" if found["verdict"].startswith("other bytes") else _percent(found)
                    row[label] = f"{_error(_one(lines, name, *other, share, part))}, {apart}"
            rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _as_whole(cells: list[dict[str, Any]], model: str, share: float | None) -> list[dict[str, Any]]:
    """The same cells, where one model has one size only, as ``recurrent`` has."""
    return [
        {**cell, "points": [{**point, "share": None} for point in cell["points"] if point["share"] == share]}
        if cell["model"] == model
        else cell
        for cell in cells
    ]


def tables(folder: Path) -> str:
    """All of them, for every core set of what a folder holds."""
    if not (cells := read_cells(folder)):
        raise DataError(
            "E-NO-CELLS", f"{folder} must hold cells of the frontier, and has no file *--seed*.json",
            fix="Name another --folder; python -m benchmarks.frontier writes them.",
        )  # fmt: skip
    lines, texts = lines_of(cells), []
    for name in [name for name in cores_of(cells) if name in set(lines["set"])]:
        frames = (
            *(routers(lines, name), sizes(cells, lines, name), against(cells, lines, name)),
            *(ages(cells, name), parted(cells, lines, name)),
        )
        texts += [markdown(frame) for frame in frames if len(frame)]
    return "\n\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    print(tables(parser.parse_args().folder))


if __name__ == "__main__":
    main()
