"""Answers in the library of the frame that asked: the dialect of a fit carried over to it, and plain tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.clock import as_times
from hamts.data.panel import Dialect, Panel

__all__ = ["answer_like", "as_starts", "plain_frame"]


def plain_frame(dialect: Dialect, columns: Mapping[str, Any]) -> Any:
    """A table in the user's library."""
    if dialect.library == "pandas":
        return pd.DataFrame(dict(columns))
    import polars as pl

    return pl.DataFrame(dict(columns))


def answer_like(panel: Panel, df: Any) -> Panel:
    """The panel with a dialect whose answers come in the library of ``df``."""
    dialect = panel.schema.dialect
    library = "polars" if type(df).__module__.startswith("polars") else "pandas"
    if library == dialect.library:
        return panel
    swapped = replace(
        dialect,
        library=library,  # type: ignore[arg-type]
        id_dtype=_dtype_like(dialect.id_dtype, library),
        time_unit=_dtype_like(dialect.time_unit, library),
    )
    return replace(panel, schema=replace(panel.schema, dialect=swapped))


def _dtype_like(name: str, library: str) -> str:
    """Name of the nearest dtype of the other library; units of time are the same in both."""
    if name in ("D", "s", "ms", "us", "ns"):
        return name
    plain = name.lower()
    if not plain.startswith(("int", "uint", "float")):
        return "String" if library == "polars" else "object"
    if library == "pandas":
        return plain
    return plain.replace("uint", "UInt") if plain.startswith("uint") else plain.capitalize()


def as_starts(numbers: np.ndarray, dialect: Dialect) -> np.ndarray:
    """int64 -> times of the kind that the dialect has."""
    return as_times(numbers, integer=dialect.time_unit not in ("D", "s", "ms", "us", "ns"))
