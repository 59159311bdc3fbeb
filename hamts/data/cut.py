"""Split a frame in time, before anything is fitted."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from hamts.data.columns import Notes, open_frame, read_ids
from hamts.data.schema import find_keys, name_index
from hamts.data.timestamps import Times, read_times
from hamts.errors import DataError

__all__ = ["split"]


def split(
    df: Any, *, at: Any = None, test_steps: int | None = None, id_col: str | None = None, time_col: str | None = None
) -> tuple[Any, Any]:
    """Split a pandas or polars frame into the rows before and the rows from some time on.

    Args:
        at: first time of the second part (anything ``pd.Timestamp`` reads, in the zone of the frame, or an integer).
        test_steps: or the number of last rows of each item that go to the second part.

    Returns: two frames of the caller's kind, rows in their order. Raises DataError: E-SPLIT (both or neither given, or
        one part empty), and what reading ids and times raises.
    """
    if (at is None) == (test_steps is None):
        raise DataError("E-SPLIT", "Pass one of at and test_steps.", fix="split(df, test_steps=24)")
    named, index_columns, time_col = name_index(df, id_col=id_col, time_col=time_col)
    frame = open_frame(named, index_columns=index_columns)
    id_column, time_column = find_keys(frame, id_col=id_col, time_col=time_col)
    times = read_times(frame[time_column], Notes())
    is_test = times.values >= _moment(at, times) if test_steps is None else _last(frame, id_column, times, test_steps)
    if is_test.all() or not is_test.any():
        part = "first" if is_test.all() else "second"
        raise DataError(
            "E-SPLIT", f"The {part} part has no rows. Got at={at!r}, test_steps={test_steps!r}.", fix="Move it."
        )
    return _rows(df, ~is_test), _rows(df, is_test)


def _moment(at: Any, times: Times) -> int:
    if times.integer:
        return int(at)
    stamp = pd.Timestamp(at)
    if times.zone is not None:
        stamp = stamp.tz_localize(times.zone) if stamp.tz is None else stamp
    elif stamp.tz is not None:
        raise DataError("E-TZ-DRIFT", f"Times have no zone, at={at!r} has one.", fix="Pass at without a zone.")
    return int(stamp.as_unit("ns").value)


def _last(frame: nw.DataFrame[Any], id_column: str | None, times: Times, count: int) -> np.ndarray:
    """Whether each row is among the last ``count`` of its item, [rows]."""
    if count < 1:
        raise DataError("E-SPLIT", f"test_steps must be at least 1. Got {count!r}.", fix="split(df, test_steps=24)")
    codes = np.zeros(len(frame), dtype=np.int64) if id_column is None else read_ids(frame[id_column]).codes
    order = np.lexsort((times.values, codes))
    ends = np.cumsum(np.bincount(codes))[codes[order]]
    is_last = np.empty(len(order), dtype=bool)
    is_last[order] = ends - np.arange(len(order)) <= count
    return is_last


def _rows(df: Any, keep: np.ndarray) -> Any:
    if isinstance(df, pd.DataFrame):
        return df[keep]
    return df.filter(keep)
