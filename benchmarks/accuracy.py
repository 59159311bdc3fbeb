"""Accuracy on real data, on CPU: fit on the past, forecast a test part that no choice has seen.

Run ``python -m benchmarks.accuracy [--sets epf ett flights] [--seeds 0 1 2] [--again]`` from the clone; epf and ett
need the folder ``HAMTS_DATA``. A cell is one fit of one variant with one seed, written to
``benchmarks/results/accuracy`` as soon as it is measured and not measured again. The table shows medians over seeds.

What a cell states: the training window (patches read per step by each stream, its memory carried on), and that at test
time the state runs from the start of the frame. Errors of epf and ett are on values standardised by the training rows;
the mean of the forecast for MSE, its median for MAE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gluonts
import numpy as np
import pandas as pd
import torch

import hamts
from benchmarks.cells import write_cell
from hamts.metrics import climatology_quantiles, seasonal_naive

RESULTS = Path(__file__).parent / "results" / "accuracy"
README = Path(__file__).parent.parent / "README.md"
OPENED, CLOSED = "<!-- accuracy -->", "<!-- /accuracy -->"
DECILES = tuple(round(0.1 * k, 1) for k in range(1, 10))
MINUTE_S = 60.0


@dataclass(frozen=True)
class Task:
    """One set with its split, and what must be reached."""

    dataset: str
    h: int
    train_rows: int
    val_rows: int
    test_rows: int
    stride: int
    targets: dict[str, float]
    variants: tuple[str, ...] = ("ham",)
    options: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "epf": Task(
        "epf/NP", 24, 36691, 5242, 10483, 24, {"MSE": 0.180, "MAE": 0.215}, ("ham", "60 s", "no cross-reading")
    ),
    "ett": Task("ett/ETTh1", 96, 8640, 2880, 2880, 1, {"MSE": 0.400, "MAE": 0.420}),
    "flights": Task("nycflights13", 24, 8760 - 84 * 24, 28 * 24, 56 * 24, 24, {"WQL ratio": 0.85}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ham": {},
    "60 s": {"max_time": MINUTE_S},
    "no cross-reading": {"cross_reading": "never"},
}


def versions() -> dict[str, Any]:
    return {
        "hamts": hamts.__version__, "torch": torch.__version__, "gluonts": gluonts.__version__,
        "pandas": pd.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
    }  # fmt: skip


def measure(name: str, variant: str, seed: int) -> dict[str, Any]:
    """One cell: fit once, then score the same weights under several memories."""
    task = TASKS[name]
    data = hamts.load_dataset(task.dataset)
    rows = task.train_rows + task.val_rows + task.test_rows
    df = data.df.groupby("unique_id", sort=False).head(rows)
    seen = df.groupby("unique_id", sort=False).head(rows - task.test_rows)
    columns = data.fit_kwargs() | {"h": task.h}
    began = time.perf_counter()
    model = hamts.fit(
        seen, **columns, val_size=task.val_rows, seed=seed, quantiles=DECILES, verbose=False, progress=False,
        **task.options, **VARIANTS[variant],
    )  # fmt: skip
    fit_s = time.perf_counter() - began
    cell: dict[str, Any] = {
        "set": name, "variant": variant, "seed": seed, "fit_s": round(fit_s, 1), "steps": model.report.steps,
        "best_step": model.report.best_step, "stopped_by": model.report.stopped_by,
        "patch_steps": model.config.patch_steps, "window_patches": model.config.window_patches,
        "training_window_patches": model.plan.train.context_patches, "state_from": "start of the frame",
        "preset": "small", "width": model.config.width,
        "usage_share": round(model.usage_share, 4), "versions": versions(),
        "rows": {},
    }  # fmt: skip
    shares = {"budget 10 %": 0.1} if variant != "ham" else {"budget 10 %": 0.1, "budget 0": 0.0, "budget 100 %": 1.0}
    for label, share in shares.items():
        cell["rows"][label] = score_test(task, data, df, model, share)
    if name == "flights":
        cell["rows"] |= flight_baselines(task, data, df)
    return cell


def score_test(task: Task, data: Any, df: pd.DataFrame, model: Any, share: float) -> dict[str, float]:
    """Errors of every test window."""
    windows = (task.test_rows - task.h) // task.stride + 1
    began = time.perf_counter()
    memory = "full" if share == 1.0 else "model"
    result = model.cross_validation(
        df, task.h, n_windows=windows, step_size=task.stride, budget_share=share, memory=memory, quantiles=DECILES
    )
    seconds = time.perf_counter() - began
    names = result["target_name"] if "target_name" in result else pd.Series(data.target[0], index=result.index)
    y = result["y"].to_numpy(float)
    if task.dataset == "nycflights13":
        levels = np.stack([result[f"HAM_ql{q:g}"].to_numpy(float) for q in DECILES], 1)
        return {f"WQL {t}": weighted_loss(y, levels, (names == t).to_numpy()) for t in data.target} | {"s": seconds}
    train = df.iloc[: task.train_rows]
    scale = names.map({t: train[t].std(ddof=0) for t in data.target}).to_numpy(float)
    mean, median = result["HAM"].to_numpy(float), result["HAM_ql0.5"].to_numpy(float)
    return {
        "MSE": float(np.nanmean(((y - mean) / scale) ** 2)),
        "MAE": float(np.nanmean(np.abs(y - median) / scale)),
        "s": seconds,
    }


def weighted_loss(y: np.ndarray, levels: np.ndarray, chosen: np.ndarray) -> float:
    """Mean over deciles of 2 x pinball / sum |y|, on observed steps. y [n], levels [n, 9]."""
    known = chosen & ~np.isnan(y)
    short = y[known, None] - levels[known]
    q = np.array(DECILES)
    return float((2 * np.maximum(q * short, (q - 1) * short).sum(0) / np.abs(y[known]).sum()).mean())


def flight_baselines(task: Task, data: Any, df: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Seasonal naive (a day, a week) and the training quantiles by airport and hour, on the same windows."""
    rows: dict[str, dict[str, float]] = {"seasonal naive 24": {}, "seasonal naive 168": {}, "airport and hour": {}}
    for target in data.target:
        truth: list[np.ndarray] = []
        parts: dict[str, list[np.ndarray]] = {label: [] for label in rows}
        for _, item in df.groupby("unique_id", sort=False):
            values, hours = item[target].to_numpy(float), item["ds"].dt.hour.to_numpy()
            first = len(values) - task.test_rows
            for cut in range(first, len(values) - task.h + 1, task.stride):
                ahead = slice(cut, cut + task.h)
                truth.append(values[ahead])
                for season in (24, 168):
                    naive = seasonal_naive(values[:cut], season_steps=season, h=task.h)
                    parts[f"seasonal naive {season}"].append(np.repeat(naive[:, None], 9, 1))
                known = task.train_rows
                parts["airport and hour"].append(
                    climatology_quantiles(
                        values[:known], phases=hours[:known], future_phases=hours[ahead], levels=DECILES
                    )
                )
        y = np.concatenate(truth)
        for label, forecasts in parts.items():
            rows[label][f"WQL {target}"] = weighted_loss(y, np.concatenate(forecasts), np.ones(len(y), bool))
    return rows


def cell_path(name: str, variant: str, seed: int) -> Path:
    return RESULTS / f"{name}--{variant.replace(' ', '-')}--seed{seed}.json"


def run(names: list[str], seeds: list[int], variants: list[str], *, again: bool) -> None:
    """Measure what is missing, the mandatory variant of every set first."""
    order = [(s, n, v) for v in variants for s in seeds for n in names if v in TASKS[n].variants]
    for seed, name, variant in order:
        path = cell_path(name, variant, seed)
        if path.exists() and not again:
            continue
        cell = measure(name, variant, seed)
        write_cell(path, cell)
        print(path.name, f"{cell['fit_s']} s,", json.dumps(cell["rows"]), flush=True)


def table(names: list[str]) -> str:
    """Medians over seeds, as Markdown."""
    lines = ["| set | row | seeds | " + "error | fit s | after 60 s |", "|---|---|---|---|---|---|"]
    for name in names:
        cells = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}--*.json"))]
        quick = [c for c in cells if c["variant"] == "60 s"]
        for variant in TASKS[name].variants:
            mine = [c for c in cells if c["variant"] == variant]
            if not mine or variant == "60 s":
                continue
            for row in mine[0]["rows"]:
                label = row if variant == "ham" else variant
                beside = errors(quick, row) if variant == "ham" and quick and row in quick[0]["rows"] else ""
                fit = f"{statistics.median(c['fit_s'] for c in mine):.0f}" if "budget" in row else ""
                lines.append(f"| {name} | {label} | {len(mine)} | {errors(mine, row)} | {fit} | {beside} |")
    return "\n".join(lines)


def with_table(text: str, rows: str) -> str:
    """The README with its table replaced."""
    before, rest = text.split(OPENED)
    _, after = rest.split(CLOSED)
    return f"{before}{OPENED}\n{rows}\n{CLOSED}{after}"


def errors(cells: list[dict[str, Any]], row: str) -> str:
    keys = [key for key in cells[0]["rows"][row] if key != "s"]
    return ", ".join(f"{key} {statistics.median(c['rows'][row][key] for c in cells):.3f}" for key in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--again", action="store_true", help="measure cells that exist, too")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--readme", action="store_true", help="also write the table into README.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not (options.table or options.readme):
        run(options.sets, options.seeds, options.variants, again=options.again)
    print(table(options.sets))
    if options.readme:
        README.write_text(with_table(README.read_text(), table(list(TASKS))))


if __name__ == "__main__":
    main()
