"""Numbers -> a frame that looks like the user's own: same library, names, dtypes and zone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.clock import as_numbers
from hamts.data.panel import Dialect, Panel, Schema

__all__ = ["forecast_frame", "key_frame"]


def forecast_frame(
    of: Panel | Schema,
    item_ids: np.ndarray,
    times: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    cutoff: Any = None,
) -> Any:
    """Long frame with one row per item, target and step, in this order.

    Args:
        of: whose dialect the answer speaks.
        item_ids: [I].
        times: [I, h], datetime64 (UTC where zoned) or integers.
        columns: by name, [I, h] with one target or [I, n_targets, h].
        cutoff: last time known to each forecast, one for all or [I]; adds the column ``cutoff``.

    Returns: columns id, time, ``target_name`` (several targets only), ``cutoff``, then ``columns``.
    """
    schema = of.schema if isinstance(of, Panel) else of
    n_items, h = times.shape
    names = schema.targets
    n_targets = next((value.shape[1] for value in map(np.asarray, columns.values()) if value.ndim == 3), 1)
    repeats = n_targets * h
    times = np.repeat(times[:, None, :], n_targets, axis=1).ravel()
    extra: dict[str, Any] = {}
    if len(names) > 1:
        extra["target_name"] = np.tile(np.repeat(np.asarray(names, dtype=object), h), n_items)
    if cutoff is not None:
        extra["cutoff"] = _times_like(
            schema.dialect, np.repeat(np.broadcast_to(np.asarray(cutoff), (n_items,)), repeats)
        )
    for name, value in columns.items():
        extra[name] = np.ascontiguousarray(value).reshape(n_items * repeats)
    return key_frame(schema.dialect, np.repeat(item_ids, repeats), times, extra)


def key_frame(dialect: Dialect, ids: np.ndarray, times: np.ndarray, extra: Mapping[str, Any]) -> Any:
    """Frame of ids and times [rows] in the user's dtypes, and more columns [rows]."""
    data: dict[str, Any] = {}
    if dialect.id_column is not None:
        data[dialect.id_column] = _ids_like(dialect, ids)
    data[dialect.time_column] = _times_like(dialect, times)
    data |= extra
    if dialect.library == "pandas":
        return pd.DataFrame(data)
    import polars as pl

    return pl.DataFrame(data)


def _ids_like(dialect: Dialect, ids: np.ndarray) -> Any:
    name = dialect.id_dtype
    if dialect.library == "pandas":
        if name == "category":
            return pd.Categorical(ids)
        return pd.Series(ids).astype(object if name == "object" else name)
    import polars as pl

    # an Enum's levels are not kept; Categorical joins with it
    kind = pl.Categorical if name in ("Categorical", "Enum") else getattr(pl, name, None)
    return pl.Series(ids.tolist() if ids.dtype.kind == "O" else ids).cast(kind or pl.String)


def _times_like(dialect: Dialect, times: np.ndarray) -> Any:
    integer = times.dtype.kind != "M"
    unit, zone = dialect.time_unit, dialect.time_zone
    if dialect.library == "pandas":
        if integer:
            return pd.Series(times).astype(unit)
        index = pd.DatetimeIndex(times)
        index = index.tz_localize("UTC").tz_convert(zone) if zone else index
        return pd.Series(index.as_unit("s" if unit == "D" else unit))
    import polars as pl

    if integer:
        return pl.Series(times).cast(getattr(pl, unit))
    stamps = pl.Series(as_numbers(times)).cast(pl.Datetime("ns"))
    if unit == "D":
        return stamps.cast(pl.Date)
    if zone:
        stamps = stamps.dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
    # polars has no seconds
    return stamps.dt.cast_time_unit({"ns": "ns", "us": "us"}.get(unit, "ms"))  # type: ignore[arg-type]
