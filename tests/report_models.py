"""Models and histories that reports are made of in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import hamts

NASTY = "<script>window.hacked=1</script>"


def stormy_frame(*, items: int, steps: int, seed: int = 0, names: Any = None) -> pd.DataFrame:
    """Waves with rare tagged storms, and a covariate."""
    rng = np.random.default_rng(seed)
    hours = np.arange(steps)
    parts = []
    for k in range(items):
        storm = np.zeros(steps)
        for start in rng.integers(0, max(steps - 9, 1), max(steps // 400, 1)):
            storm[start : start + 9] = 1
        y = 10 + k + 3 * np.sin(2 * np.pi * hours / 24 + k) + rng.normal(0, 0.3, steps) + 12 * storm
        parts.append(pd.DataFrame({
            "unique_id": f"item {k}" if names is None else names[k],
            "ds": pd.date_range("2012-01-01", periods=steps, freq="h"), "y": y,
            "wind": rng.normal(size=steps).cumsum() / 9, "storm": storm,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def small_model(df: pd.DataFrame, **options: Any) -> hamts.HAMForecaster:
    """A model that has hardly learned."""
    given = {"event_cols": ["storm"], "preset": "tiny", "max_steps": 3, "val_size": 0, "verbose": False}
    return hamts.fit(df, 12, **(given | options))


def made_report(folder: Path, df: pd.DataFrame, **options: Any) -> Path:
    """A report of a model fitted on the first rows of a frame."""
    from hamts.report import write_report

    fitted_on = df.groupby("unique_id", sort=False).head(600)
    options = {"n_windows": 3, "worth": 30} | options
    return write_report(small_model(fitted_on), df, folder / "report.html", **options)
