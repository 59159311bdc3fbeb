"""Groups of items, such as services or nodes: which item is in which, and who fares worst.

I items
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hamts.data.panel import Panel
from hamts.errors import DataError

__all__ = ["item_groups", "mark_worst"]


def item_groups(panel: Panel, by: str | None, group_col: str | None) -> np.ndarray | None:
    """Group of each item, [I] of str, by a static column of categories; None where rows are not ``by`` group.

    Raises DataError E-OPTION: no such column, or ``by`` and ``group_col`` do not go together.
    """
    if by != "group" and group_col is None:
        return None
    known = [column.name for column in panel.schema.static if column.kind == "categorical"]
    if by != "group" or group_col is None:
        what = f"by='group' and group_col= go together. Got by={by!r}, group_col={group_col!r}."
        raise DataError("E-OPTION", what, fix=f"by='group', group_col= one of {known}.")
    if group_col not in known:
        what = f"group_col must be a static column of categories. Available: {known}. Got {group_col!r}."
        raise DataError("E-OPTION", what, fix="Name groups in static_df, one row per item, when fitting.")
    categorical = [i for i, column in enumerate(panel.schema.static) if column.name == group_col]
    column = panel.schema.static[categorical[0]]
    assert panel.static_values is not None
    codes = panel.static_values[:, categorical[0]]  # [I]
    # code 0 is a category that fitting did not see
    names = np.array(["unknown", *map(str, column.levels)], dtype=object)
    return names[np.nan_to_num(codes, nan=0.0).astype(np.int64)]


def mark_worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say in each row whether its group has the highest MASE of its method."""
    highest: dict[str, float] = {}
    for row in rows:
        if np.isfinite(row["MASE"]):
            highest[row["method"]] = max(highest.get(row["method"], -np.inf), row["MASE"])
    return [{**row, "worst": row["MASE"] == highest.get(row["method"])} for row in rows]
