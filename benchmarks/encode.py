"""Time and memory of encoding a frame of a million rows and a thousand items, in the shapes that users have.

Run ``python -m benchmarks.encode`` from the clone: prints a table and writes ``benchmarks/results/encode.json``.
``peak_ratio`` is the most memory that encoding held at once beyond the frame, over the 24 bytes a row of its ids, times
and values (texts not counted).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import narwhals
import numpy as np
import pandas as pd
import polars as pl

from hamts.data.frame import to_panel

RESULT = Path(__file__).parent / "results" / "encode.json"
BYTES_PER_ROW = 24
# the shape that the limits hold for
LIMITS = {"sorted": {"seconds": 1.5, "peak_ratio": 4.0}}


def hourly_frame(n_rows: int, n_items: int) -> pd.DataFrame:
    """Items one after the other, hourly, ids as texts."""
    steps = n_rows // n_items
    ids = np.repeat(np.array([f"item_{i:05d}" for i in range(n_items)], dtype=object), steps)
    stamps = np.tile(pd.date_range("2020", periods=steps, freq="h").to_numpy(), n_items)
    return pd.DataFrame({"unique_id": ids, "ds": stamps, "y": np.random.default_rng(0).normal(size=len(ids))})


def frames(n_rows: int, n_items: int) -> dict[str, Callable[[], Any]]:
    """Makers of the frames, by name."""
    base = hourly_frame(n_rows, n_items)
    steps = n_rows // n_items

    def clock(freq: str, **options: Any) -> pd.DataFrame:
        return base.assign(ds=np.tile(pd.date_range("1950", periods=steps, freq=freq, **options), n_items))

    def gappy() -> pd.DataFrame:
        return base.drop(index=np.random.default_rng(1).choice(len(base), len(base) // 100, replace=False))

    return {
        "sorted": lambda: base,
        "by time": lambda: base.sort_values("ds", kind="stable"),
        "shuffled": lambda: base.sample(frac=1, random_state=0),
        "1 % gaps": gappy,
        "categorical ids": lambda: base.astype({"unique_id": "category"}),
        "times as texts": lambda: base.assign(ds=base["ds"].astype(str)),
        "daily, Berlin": lambda: clock("D", tz="Europe/Berlin"),
        "month ends": lambda: clock("ME"),
        "polars": lambda: pl.from_pandas(base),
        "polars, shuffled": lambda: pl.from_pandas(base.sample(frac=1, random_state=0)),
    }


def measure(frame: Any, *, repeats: int) -> dict[str, float]:
    """Best of several runs, then one more run under tracemalloc."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        to_panel(frame)
        seconds.append(time.perf_counter() - start)
    gc.collect()
    tracemalloc.start()
    panel = to_panel(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = len(frame)
    return {
        "rows": rows,
        "steps": len(panel.values),
        "first_seconds": seconds[0],
        "seconds": min(seconds),
        "peak_mib": peak / 2**20,
        "peak_ratio": peak / (BYTES_PER_ROW * rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    to_panel(hourly_frame(100, 2))
    cells = {}
    print(f"{'frame':18s} {'first s':>8s} {'best s':>8s} {'peak MiB':>9s} {'peak / data':>12s}")
    for name, make in frames(arguments.rows, arguments.items).items():
        cell = cells[name] = measure(make(), repeats=arguments.repeats)
        ratio, limit = cell["peak_ratio"], LIMITS.get(name)
        verdict = ""
        if limit:
            verdict = "within limits" if all(cell[key] <= limit[key] for key in limit) else f"OVER {limit}"
        print(
            f"{name:18s} {cell['first_seconds']:8.2f} {cell['seconds']:8.2f} {cell['peak_mib']:9.0f}"
            f" {ratio:12.1f} {verdict}"
        )
    versions = {m.__name__: m.__version__ for m in (pd, pl, np, narwhals)} | {"python": platform.python_version()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"versions": versions, "limits": LIMITS, "cells": cells}, indent=1) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
