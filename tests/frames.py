"""Frames that several tests are made of."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.frame import to_panel
from hamts.data.panel import Panel
from hamts.errors import DataWarning


def long_frame(n_items: int = 2, rows: int = 5, *, freq: str = "h", zone: str | None = None) -> pd.DataFrame:
    """Items b0, a1, b2, ...: targets count up through all items."""
    ids = np.repeat([f"{'ba'[i % 2]}{i}" for i in range(n_items)], rows)
    stamps = pd.date_range("2024-01-01", periods=rows, freq=freq, tz=zone).as_unit("ns")
    return pd.DataFrame({"unique_id": ids, "ds": list(stamps) * n_items, "y": np.arange(n_items * rows) * 1.0})


def quiet_panel(df: Any, **options: Any) -> Panel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return to_panel(df, **options)


def assert_same(one: Panel, other: Panel) -> None:
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    np.testing.assert_array_equal(one.starts, other.starts)
    np.testing.assert_array_equal(one.item_ids.astype(str), other.item_ids.astype(str))
    assert one.schema.channels == other.schema.channels
    assert one.schema.frequency == other.schema.frequency


def rich_frame(rng: np.random.Generator, *, with_gaps: bool = True) -> pd.DataFrame:
    """Three items with gaps, missing values, and columns of all kinds."""
    df = long_frame(3, 12)
    df["y"] = np.where(rng.random(36) < 0.2, np.nan, rng.normal(size=36))
    df["f"] = rng.normal(size=36)
    df["c"] = rng.choice(["u", "v", "w"], size=36)
    df["q"] = rng.random(36) < 0.5
    df["n"] = rng.integers(0, 9, size=36)
    return df.drop(index=[3, 4, 17, 30]) if with_gaps else df
