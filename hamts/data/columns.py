"""Columns of any frame -> numpy: ids as codes, times as int64, values as float64.

Everything that depends on a dtype of pandas, pyarrow or polars is here. Nothing writes to the caller's frame.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pandas as pd

from hamts.data.panel import Kind
from hamts.errors import DataError, DataWarning

__all__ = [
    "Ids",
    "Notes",
    "categories_of",
    "column_kind",
    "encode_categories",
    "nearest",
    "open_frame",
    "read_ids",
    "read_numbers",
]

MAX_LEVELS = 1000
EXACT_INTEGER = 2**53


@dataclass
class Notes:
    """What was done or noticed on the way in; kept on the panel and warned of once."""

    texts: list[str] = field(default_factory=list)

    def add(self, code: str, text: str) -> None:
        note = f"{code}: {text}"
        if note not in self.texts:
            self.texts.append(note)

    def issue(self) -> tuple[str, ...]:
        """Warn of each note at the line outside of this package that called it; returns the notes."""
        level, frame = 2, sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "hamts":
            level, frame = level + 1, frame.f_back
        for note in self.texts:
            warnings.warn(DataWarning(note), stacklevel=level)
        return tuple(self.texts)


@dataclass(frozen=True)
class Ids:
    """Item of every row: ``codes`` int64 [rows] into ``values`` [I], in order of first appearance."""

    codes: np.ndarray
    values: np.ndarray
    dtype: str


def nearest(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or nothing."""
    near = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def some(names: Sequence[str]) -> str:
    """A list of names for a message, cut after twenty."""
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{list(names[:20])}{rest}"


def open_frame(
    df: Any, *, name: str = "df", index_columns: Sequence[str | None] = (), empty: bool = False
) -> nw.DataFrame[Any]:
    """Wrap a pandas or polars frame; a named index among ``index_columns`` becomes a column.

    Raises DataError: E-TYPE (no such frame), E-COLUMNS (duplicate, nested or non-text column names), E-EMPTY (no rows).
    """
    if isinstance(df, pd.DataFrame):
        _check_pandas_columns(df, name)
        df = _index_to_columns(df, name, index_columns)
    elif type(df).__module__.startswith("polars") and type(df).__name__ == "LazyFrame":
        raise DataError("E-TYPE", f"{name} is a lazy polars frame.", fix=f"Pass {name}.collect().")
    elif not type(df).__module__.startswith("polars"):
        kind = f"{type(df).__module__}.{type(df).__name__}"
        fix = f"Pass {name}.to_pandas()." if hasattr(df, "to_pandas") else f"Pass pandas.DataFrame({name})."
        raise DataError("E-TYPE", f"{name} must be a pandas or polars DataFrame. Got {kind}.", fix=fix)
    frame = nw.from_native(df, eager_only=True)
    if len(frame) == 0 and not empty:
        raise DataError(
            "E-EMPTY", f"{name} has no rows. Columns: {some(frame.columns)}.", fix="Pass at least two rows per item."
        )
    return frame


def _check_pandas_columns(df: pd.DataFrame, name: str) -> None:
    if df.columns.nlevels > 1:
        raise DataError(
            "E-COLUMNS",
            f"{name} has nested column names with {df.columns.nlevels} levels: {list(df.columns[:3])} ...",
            fix=f'Flatten them: {name}.columns = ["_".join(map(str, c)) for c in {name}.columns].',
        )
    doubled = df.columns[df.columns.duplicated()].unique()
    if len(doubled):
        first = doubled[0]
        positions = [i for i, c in enumerate(df.columns) if c == first]
        raise DataError(
            "E-COLUMNS",
            f"{name} has columns of the same name: {list(doubled)}; {first!r} is at positions {positions}.",
            column=str(first),
            fix="Rename or drop one of them.",
        )
    unnamed = [c for c in df.columns if not isinstance(c, str)]
    if unnamed:
        raise DataError(
            "E-COLUMNS",
            f"Column names of {name} must be text. Got {unnamed[:5]}.",
            fix=f"{name}.columns = {name}.columns.map(str)",
        )


def _index_to_columns(df: pd.DataFrame, name: str, index_columns: Sequence[str | None]) -> pd.DataFrame:
    named = [level for level in df.index.names if level is not None and level in index_columns]
    doubled = [level for level in named if level in df.columns]
    if doubled:
        raise DataError(
            "E-COLUMNS",
            f"{doubled[0]!r} is both a column and the index of {name}.",
            column=str(doubled[0]),
            fix=f"{name} = {name}.reset_index(drop=True)",
        )
    # reset_index makes a new frame; the caller's own keeps its index
    return df.reset_index(level=named) if named else df


def describe_rows(frame: nw.DataFrame[Any], positions: Any, names: Sequence[str | None]) -> list[str]:
    """The first five of these rows as text: position, then the named columns."""
    shown = [n for n in dict.fromkeys(names) if n is not None and n in frame.columns]
    rows = []
    for position in np.asarray(positions)[:5]:
        cells = ", ".join(f"{n}={_cell(frame[n][int(position)])}" for n in shown)
        rows.append(f"row {int(position)}: {cells}")
    return rows


def _cell(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    return repr(value) if isinstance(value, str | int | float | bool | None) else f"'{value}'"


def read_ids(column: nw.Series[Any], *, name: str = "df") -> Ids:
    """Codes of items in order of first appearance.

    Raises DataError: E-ID-NULL (null or empty ids), E-ID-TYPE (texts and numbers mixed, or neither).
    """
    codes, values = _factorize(column)
    empty = np.flatnonzero(values == "") if values.dtype.kind not in "iuf" else np.empty(0, dtype=int)
    missing = np.flatnonzero((codes < 0) | np.isin(codes, empty)) if len(empty) or (codes < 0).any() else empty
    if len(missing):
        raise DataError(
            "E-ID-NULL",
            f"Every row of {name} needs an id. {len(missing)} rows have none.",
            column=column.name,
            rows=[f"row {i}" for i in missing[:5]],
            fix=f"{name}.dropna(subset=[{column.name!r}]), or fill them in.",
        )
    ids, dtype = _plain_ids(values, column.name, name), dtype_name(column)
    # numbers in an object column are told from texts by their dtype later on
    return Ids(codes, ids, str(ids.dtype) if dtype == "object" else dtype)


def _factorize(column: nw.Series[Any]) -> tuple[np.ndarray, np.ndarray]:
    native = column.to_native()
    if isinstance(native, pd.Series):
        codes, values = pd.factorize(native)
        return codes.astype(np.int64, copy=False), np.asarray(values)
    plain = _plain(column)
    if column.null_count() or not isinstance(plain.dtype, nw.String):
        return _factorize_objects(plain.to_numpy())
    # polars hashes its own texts faster than numpy holds them as objects; its codes say nothing about order
    codes, _ = pd.factorize(column.cast(nw.Categorical).to_native().to_physical().to_numpy())
    _, first = np.unique(codes, return_index=True)
    return codes.astype(np.int64, copy=False), plain.to_native().gather(first).to_numpy()


def _factorize_objects(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, found = pd.factorize(values)
    return codes.astype(np.int64, copy=False), np.asarray(found)


def _plain(column: nw.Series[Any]) -> nw.Series[Any]:
    return column.cast(nw.String) if isinstance(column.dtype, nw.Categorical | nw.Enum) else column


def _plain_ids(values: np.ndarray, column: str, name: str) -> np.ndarray:
    """Ids as int64, float64 or an object array of texts."""
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    if values.dtype.kind == "f":
        return values
    kinds = {"text" if isinstance(v, str) else "number" if _is_number(v) else type(v).__name__ for v in values}
    if kinds == {"text"}:
        return values.astype(object)
    if kinds == {"number"}:
        return np.asarray(values.tolist())
    examples = {kind: next(v for v in values if _id_kind(v) == kind) for kind in sorted(kinds)}
    raise DataError(
        "E-ID-TYPE",
        f"Ids must be all text or all numbers. Got a mix or another type in {name}: {examples}.",
        column=column,
        fix=f"{name}[{column!r}] = {name}[{column!r}].astype(str)",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _id_kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "number" if _is_number(value) else type(value).__name__


def dtype_name(column: nw.Series[Any]) -> str:
    """Name of the native dtype: ``int64``, ``object``, ``str``, ``category``; of polars ``String``, ``Int64``."""
    native = column.to_native()
    if not isinstance(native, pd.Series):
        return str(column.dtype).split("(")[0]
    # "string" alone would lose how the texts are stored
    return f"string[{native.dtype.storage}]" if str(native.dtype) == "string" else str(native.dtype)


def id_family(values: np.ndarray) -> str:
    """``numbers`` or ``texts``, for messages and comparison."""
    return "numbers" if values.dtype.kind in "iuf" else "texts"


def match_ids(ids: np.ndarray, known: np.ndarray, *, column: str | None, name: str) -> np.ndarray:
    """Position of each id among ``known``, -1 where there is none.

    Raises DataError E-ID-TYPE where texts meet numbers.
    """
    if len(ids) and len(known) and id_family(ids) != id_family(known):
        to = "str" if id_family(known) == "texts" else "int"
        raise DataError(
            "E-ID-TYPE",
            f"Ids of {name} are {id_family(ids)} ({ids[0]!r}) where those known are {id_family(known)} ({known[0]!r}).",
            column=column,
            fix=f"{name}[{column!r}] = {name}[{column!r}].astype({to})",
        )
    return pd.Index(known).get_indexer(pd.Index(ids)).astype(np.int64)


def column_kind(column: nw.Series[Any]) -> Kind | None:
    """How a covariate is read; None where it cannot be (dates, durations, complex, nested, mixed)."""
    dtype, native = column.dtype, column.to_native()
    if isinstance(dtype, nw.Boolean):
        return "boolean"
    if isinstance(dtype, nw.Categorical | nw.Enum | nw.String):
        return "categorical"
    if isinstance(dtype, nw.Decimal):
        return None
    if dtype.is_numeric():
        return "numeric"
    if isinstance(native, pd.Series):
        return _object_kind(native)
    return "numeric" if str(dtype) == "Unknown" and native.is_empty() else None


def _object_kind(native: pd.Series) -> Kind | None:
    inferred = pd.api.types.infer_dtype(native, skipna=True)
    if inferred in ("integer", "floating", "mixed-integer-float", "empty") and native.dtype.kind != "c":
        return "numeric"
    return {"boolean": "boolean", "string": "categorical"}.get(inferred)  # type: ignore[return-value]


def read_numbers(column: nw.Series[Any], notes: Notes) -> np.ndarray:
    """A numeric or boolean column as a float64 array of its own or a read-only view, [rows]; missing is NaN."""
    native = column.to_native()
    if isinstance(native, pd.Series):
        if isinstance(native.dtype, pd.SparseDtype):
            native = native.sparse.to_dense()
        _note_precision(native, column, notes)
        return native.to_numpy(dtype=np.float64, na_value=np.nan)
    _note_precision(native, column, notes)
    return column.cast(nw.Float64).to_numpy()


def _note_precision(native: Any, column: nw.Series[Any], notes: Notes) -> None:
    if isinstance(column.dtype, nw.Int64 | nw.UInt64) and len(native):
        largest = max(abs(int(native.max() or 0)), abs(int(native.min() or 0))) if native.count() else 0
        if largest > EXACT_INTEGER:
            text = f"column {column.name!r} holds integers beyond 2**53 (such as {largest}); float64 rounds them."
            notes.add("W-PRECISION", text)


def categories_of(column: nw.Series[Any]) -> tuple[str, ...]:
    """Sorted levels that occur, as texts. Raises DataError E-CARD above 1000."""
    _, values = _factorize(column)
    levels = sorted({str(v) for v in values})
    if len(levels) > MAX_LEVELS:
        raise DataError(
            "E-CARD",
            f"A category may have at most {MAX_LEVELS} levels. {column.name!r} has {len(levels)}: {levels[:3]} ...",
            column=column.name,
            fix="Group the rare levels, drop the column, or leave it out of the roles (past_cols=[...]).",
        )
    return tuple(levels)


def encode_categories(column: nw.Series[Any], levels: Sequence[str], notes: Notes) -> np.ndarray:
    """Codes as float64 [rows]: i + 1 for ``levels[i]``, 0 for an unseen one (noted W-UNSEEN), NaN for a missing one."""
    codes, values = _factorize(column)
    position = {level: i + 1.0 for i, level in enumerate(levels)}
    table = np.array([position.get(str(v), 0.0) for v in values] + [np.nan])
    unseen = [str(v) for v in values if str(v) not in position]
    if unseen:
        notes.add(
            "W-UNSEEN",
            f"column {column.name!r} has categories that fitting did not see, read as unknown: {unseen[:5]}.",
        )
    return table[codes]


def dtype_error(column: nw.Series[Any], *, role: str) -> DataError:
    """E-DTYPE with sample values and the line that converts this column."""
    name, dtype = column.name, column.dtype
    sample = [str(v) for v in column.drop_nulls().head(3).to_list()]
    fix = f"df[{name!r}] = pd.to_numeric(df[{name!r}])"
    if isinstance(dtype, nw.Boolean) or dtype_name(column) == "bool":
        fix = f"df[{name!r}] = df[{name!r}].astype(float)"
    elif isinstance(dtype, nw.Duration):
        fix = f"df[{name!r}] = df[{name!r}].dt.total_seconds()"
    elif isinstance(dtype, nw.Datetime | nw.Date):
        fix = f"Leave {name!r} out, or turn it into numbers."
    elif "complex" in dtype_name(column):
        fix = f"df[{name!r}] = df[{name!r}].abs(), or two columns for the real and the imaginary part."
    elif isinstance(dtype, nw.Decimal) or "Decimal" in sample.__repr__() or _holds_decimals(column):
        fix = f"df[{name!r}] = df[{name!r}].astype(float)"
    article = "The target" if role == "target" else f"A {role} covariate"
    wanted = "numbers" if role == "target" else "numbers, booleans or categories"
    return DataError(
        "E-DTYPE", f"{article} must hold {wanted}. Got {dtype_name(column)} such as {sample}.", column=name, fix=fix
    )


def _holds_decimals(column: nw.Series[Any]) -> bool:
    native = column.to_native()
    return isinstance(native, pd.Series) and pd.api.types.infer_dtype(native, skipna=True) == "decimal"
