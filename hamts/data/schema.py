"""What each column is: dialect, targets and roles when fitting; the same columns again when predicting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import narwhals.stable.v2 as nw
import pandas as pd

from hamts.data.columns import Notes, column_kind, dtype_error, nearest, some
from hamts.data.panel import Role, Schema
from hamts.errors import DataError

__all__ = ["Layout", "check_columns", "find_keys", "find_layout", "name_index", "role_columns"]

ID_NAMES = ("unique_id", "item_id")
TIME_NAMES = ("ds", "timestamp")
TARGET_NAMES = ("y", "target")
WIDE_TIME_NAMES = (*TIME_NAMES, "date", "datetime", "time")


@dataclass(frozen=True)
class Layout:
    """Names of the columns that carry ids, times and targets. ``targets`` is None where a wide frame decides."""

    name: Literal["nixtla", "gluonts", "wide"]
    id_column: str | None
    time_column: str
    targets: tuple[str, ...] | None


def name_index(df: Any, *, id_col: str | None, time_col: str | None) -> tuple[Any, list[str | None], str | None]:
    """See whether the index of a pandas frame is its time column.

    Returns the frame (a shallow copy where an unnamed index got a name), the index levels that are columns in
        disguise, and the name of the time column where it is the index.
    """
    names: list[str | None] = [id_col, time_col, *ID_NAMES, *TIME_NAMES]
    is_time = isinstance(df, pd.DataFrame) and isinstance(df.index, pd.DatetimeIndex | pd.PeriodIndex)
    if not is_time or any(n in df.columns for n in (time_col, *TIME_NAMES) if n):
        return df, names, time_col
    if df.index.name is None:
        df = df.copy(deep=False)
        df.index = df.index.rename(time_col or "ds")
    return df, [*names, df.index.name], time_col or df.index.name


def find_layout(
    frame: nw.DataFrame[Any], *, target: str | Sequence[str] | None, id_col: str | None, time_col: str | None
) -> Layout:
    """Recognise the dialect. Raises DataError E-COLUMNS naming what is missing, what there is, and the nearest name."""
    columns = frame.columns
    targets = _targets(target, columns)
    id_column, time_column = find_keys(frame, id_col=id_col, time_col=time_col)
    if targets is None:
        found = next((n for n in TARGET_NAMES if n in columns), None)
        targets = (found,) if found else None
    if id_column is not None and targets is None:
        raise _missing("y", columns, "target")
    style: Literal["nixtla", "gluonts", "wide"] = "nixtla"
    if id_column == "item_id" or time_column == "timestamp" or targets == ("target",):
        style = "gluonts"
    if targets is None or (id_column is None and not set(targets) & set(TARGET_NAMES)):
        style = "wide"
    return Layout(style, id_column, time_column, targets)


def find_keys(frame: nw.DataFrame[Any], *, id_col: str | None, time_col: str | None) -> tuple[str | None, str]:
    """Names of the id column (None: one item) and the time column. Raises DataError E-COLUMNS."""
    for asked, argument in ((id_col, "id_col"), (time_col, "time_col")):
        if asked is not None and asked not in frame.columns:
            raise _missing(asked, frame.columns, argument)
    id_column = id_col or next((n for n in ID_NAMES if n in frame.columns), None)
    return id_column, time_col or _time_column(frame, wide=id_column is None)


def _targets(target: str | Sequence[str] | None, columns: list[str]) -> tuple[str, ...] | None:
    if target is None:
        return None
    targets = (target,) if isinstance(target, str) else tuple(target)
    if not targets or len(set(targets)) < len(targets):
        raise DataError(
            "E-ROLE", f"target must name at least one column, each once. Got {list(targets)}.", fix="target='y'"
        )
    for name in targets:
        if name not in columns:
            raise _missing(name, columns, "target")
    return targets


def _missing(name: str, columns: Sequence[str], argument: str) -> DataError:
    return DataError(
        "E-COLUMNS",
        f"The frame has no column {name!r}. It has {some(columns)}.{nearest(name, columns)}",
        column=name,
        fix=f"Rename it, or pass {argument}=... with its name.",
    )


def _time_column(frame: nw.DataFrame[Any], *, wide: bool) -> str:
    found = [n for n in TIME_NAMES if n in frame.columns]
    if not found and wide:
        found = [n for n in frame.columns if isinstance(frame[n].dtype, nw.Datetime | nw.Date)]
        if len(found) != 1:
            found = [n for n in frame.columns if n.lower() in WIDE_TIME_NAMES] or found
    if len(found) > 1:
        raise DataError(
            "E-COLUMNS",
            f"Several columns could be the time: {found}.",
            column=found[0],
            fix=f"Pass time_col={found[0]!r}.",
        )
    if not found:
        raise _missing("ds", frame.columns, "time_col")
    return found[0]


def role_columns(
    frame: nw.DataFrame[Any],
    layout: Layout,
    lists: Mapping[Role, Sequence[str] | None],
    notes: Notes,
) -> dict[str, Role]:
    """Role of every column that is read: targets first, then past, future, event and action ones, each by name.

    Columns in no list are past covariates unless ``lists["past"]`` is given; in a wide frame the numeric ones are
    targets.
    Raises DataError: E-LEAK, E-ROLE, E-COLUMNS, E-DTYPE.
    """
    listed = _listed(frame, layout, lists)
    rest = [c for c in frame.columns if c not in listed and c not in {layout.id_column, layout.time_column}]
    targets = layout.targets
    if targets is None:
        targets = tuple(sorted(c for c in rest if column_kind(frame[c]) == "numeric"))
        if not targets:
            raise DataError(
                "E-COLUMNS",
                f"A wide frame needs at least one numeric column. Got {some(frame.columns)}.",
                fix="Pass target=... with the name of the column to forecast.",
            )
    roles: dict[str, Role] = dict.fromkeys(targets, "target")
    rest = [c for c in rest if c not in roles]
    if lists["past"] is None:
        listed |= {c: "past" for c in rest if _usable(frame[c], notes)}
    elif rest:
        notes.add("W-IGNORED", f"columns {sorted(rest)} have no role and are not read.")
    order = ("past", "future", "event", "action")
    return roles | dict(sorted(listed.items(), key=lambda pair: (order.index(pair[1]), pair[0])))


def _listed(frame: nw.DataFrame[Any], layout: Layout, lists: Mapping[Role, Sequence[str] | None]) -> dict[str, Role]:
    listed: dict[str, Role] = {}
    arguments = {"past": "past_cols", "future": "futr_cols", "event": "event_cols", "action": "action_cols"}
    for role, names in lists.items():
        if isinstance(names, str):
            raise DataError("E-ROLE", f"{arguments[role]} must be a list of names.", column=names, fix=f"[{names!r}]")
        for name in names or ():
            if name not in frame.columns:
                raise _missing(name, frame.columns, arguments[role])
            if layout.targets and name in layout.targets:
                raise DataError(
                    "E-LEAK",
                    f"Target {name!r} is also listed in {arguments[role]}: the model would see what it forecasts.",
                    column=name,
                    fix=f"Take it out of {arguments[role]}; the past of a target is always read.",
                )
            if name in listed or name in (layout.id_column, layout.time_column):
                other = arguments[listed[name]] if name in listed else "the id or time column"
                raise DataError(
                    "E-ROLE",
                    f"A column has one role. {name!r} is in {arguments[role]} and is {other}.",
                    column=name,
                    fix="Keep it in one list.",
                )
            listed[name] = role
    return listed


def _usable(column: nw.Series[Any], notes: Notes) -> bool:
    if column_kind(column) is not None:
        return True
    notes.add(
        "W-IGNORED", f"column {column.name!r} ({column.dtype}) is neither number, boolean nor category and is not read."
    )
    return False


def check_columns(frame: nw.DataFrame[Any], schema: Schema, notes: Notes) -> None:
    """Compare a frame with the schema, by name. Raises DataError: E-SCHEMA (missing column, other kind of values)."""
    dialect = schema.dialect
    wanted = [c.name for c in schema.channels if not c.from_log]
    for name in (dialect.id_column, dialect.time_column, *wanted):
        if name is not None and name not in frame.columns:
            raise DataError(
                "E-SCHEMA",
                f"The frame needs column {name!r} of fit. It has {some(frame.columns)}.{nearest(name, frame.columns)}",
                column=name,
                fix="Pass a frame with the columns of fit.",
            )
    extra = sorted(set(frame.columns) - {dialect.id_column, dialect.time_column, *wanted})
    if extra:
        notes.add("W-IGNORED", f"columns {extra} were not there when fitting and are not read.")


def check_kind(column: nw.Series[Any], kind: str, *, role: str) -> None:
    """Refuse values of another kind than fitting saw.

    Raises DataError: E-DTYPE (unreadable), E-SCHEMA (another kind).
    """
    found = column_kind(column)
    if found is None:
        raise dtype_error(column, role=role)
    # a column of missing values only has no kind of its own
    if found == kind or column.null_count() == len(column) or {found, kind} == {"boolean", "numeric"}:
        return
    if kind == "categorical" and column.dtype.is_integer():
        return
    if role == "target":
        raise dtype_error(column, role=role)
    raise DataError(
        "E-SCHEMA",
        f"Column {column.name!r} was {kind} when fitting, here it is {found} ({column.dtype}).",
        column=column.name,
        fix="Convert it to what it was when fitting.",
    )
