"""Frames that models are fitted on in tests, and models that have hardly learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

import hamts


def sine_frame(*, items: int = 2, steps: int = 400, seed: int = 0) -> pd.DataFrame:
    """Daily waves with their own phase and level, and noise."""
    rng = np.random.default_rng(seed)
    hours = np.arange(steps)
    parts = [
        pd.DataFrame(
            {
                "unique_id": f"i{k}",
                "ds": pd.date_range("2024-01-01", periods=steps, freq="h"),
                "y": 20 * k + 3 * np.sin(2 * np.pi * hours / 24 + k) + rng.normal(0, 0.2, steps),
            }
        )
        for k in range(items)
    ]
    return pd.concat(parts, ignore_index=True)


def rich_frames(*, steps: int = 260, seed: int = 1) -> dict[str, Any]:
    """Every role, gaps, missing values and unequal lengths, in a zone with a clock change; and what is known ahead."""
    rng = np.random.default_rng(seed)
    parts, ahead = [], []
    for k, length in enumerate((steps, steps - 37, steps - 100)):
        stamps = pd.date_range("2024-03-25 05:00", periods=length + 24, freq="h", tz="Europe/Berlin")
        hours = np.arange(len(stamps))
        frame = pd.DataFrame(
            {
                "unique_id": [f"s{k}"] * len(stamps),
                "ds": stamps,
                "load": 50 * k + 5 * np.sin(2 * np.pi * hours / 24) + rng.normal(size=len(stamps)),
                "price": 10 + rng.normal(size=len(stamps)).cumsum(),
                "temperature": rng.normal(size=len(stamps)),
                "wind_plan": rng.normal(size=len(stamps)),
                "kind": rng.choice(["a", "b", "c"], len(stamps)),
                "holiday": rng.random(len(stamps)) < 0.03,
                "valve": (hours // 50 % 2).astype(float),
            }
        )
        ahead.append(frame.iloc[length:].drop(columns=["temperature"]))
        history = frame.iloc[:length].copy()
        history.loc[history.index[rng.random(length) < 0.05], "load"] = np.nan
        parts.append(history.drop(index=history.index[60:70]))
    df = pd.concat(parts, ignore_index=True)
    log = pd.DataFrame(
        {
            "unique_id": ["s0", "s1", "s0"],
            "ds": df["ds"].iloc[[40, 80, 120]].to_numpy(),
            "type": ["storm", "storm", "fault"],
        }
    )
    log["ds"] = pd.to_datetime(log["ds"], utc=True).dt.tz_convert("Europe/Berlin") + pd.Timedelta("20min")
    static = pd.DataFrame({"unique_id": ["s0", "s1", "s2"], "size": [1.0, 2.0, np.nan], "region": ["n", "s", "n"]})
    return {"df": df, "futr_df": pd.concat(ahead, ignore_index=True), "events": log, "static_df": static}


ROLES: dict[str, Any] = {
    "target": ["load", "price"],
    "futr_cols": ["wind_plan", "kind"],
    "event_cols": ["holiday"],
    "action_cols": ["valve"],
}


def quick(df: Any, h: int | None = None, **options: Any) -> hamts.HAMForecaster:
    """A model that has hardly learned, for what must hold of any model; fitted on the processor, wherever it is."""
    where = {"accelerator": "cpu"} if torch.cuda.is_available() else {}
    return hamts.fit(df, h, **{"preset": "tiny", "max_steps": 2, "val_size": 0, "verbose": False, **where, **options})


def irregular_frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = []
    for item, rows in (("a", 120), ("b", 90)):
        stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.exponential(60, rows).cumsum().round(3), unit="s")
        parts.append(pd.DataFrame({"unique_id": item, "ds": stamps, "y": rng.normal(size=rows).cumsum()}))
    return pd.concat(parts, ignore_index=True)
