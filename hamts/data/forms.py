"""The accepted forms of a data file, and how each is read into the same table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from hamts.errors import DataError

__all__ = ["FileForm", "Found", "values_digest"]


@dataclass(frozen=True)
class FileForm:
    """One accepted form of a file, such as a CSV as published or the same values as Parquet.

    Attributes:
        path: where it lies inside a data folder, with forward slashes.
        sha256: of exactly these bytes.
        url: a public address that serves exactly these bytes; empty where there is none.
        made_from: where there is no such address, what the file was made from.
        values: ``values_digest`` of the table, for files that everyone has to make: other bytes with the same values
            are accepted too.
        rename: columns of this form whose name differs from the set's.
        times: time columns that need a format to be read.
        header: False where the first row already holds values.
    """

    path: str
    sha256: str
    url: str = ""
    made_from: str = ""
    values: str = ""
    rename: dict[str, str] = field(default_factory=dict)
    times: dict[str, str] = field(default_factory=dict)
    header: bool = True

    def describe(self) -> str:
        origin = self.url or (f"made from {self.made_from}" if self.made_from else "no public address")
        return f"{self.path} (sha256 {self.sha256}; {origin})"

    def read(self, path: Path) -> pd.DataFrame:
        """Read a file of this form, under the column names of the set."""
        if path.suffix == ".parquet":
            table = _read_parquet(path)
        else:
            # the default parser is off by one unit in the last place now and then
            table = pd.read_csv(path, float_precision="round_trip", header=0 if self.header else None)
        table.columns = [str(name).strip() for name in table.columns]
        table = table.rename(columns=self.rename)
        for column, layout in self.times.items():
            table[column] = pd.to_datetime(table[column], format=layout)
        return table


@dataclass(frozen=True)
class Found:
    """A file on this machine and the form that it has."""

    path: Path
    form: FileForm

    def read(self) -> pd.DataFrame:
        return self.form.read(self.path)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise DataError(
            "E-DATASET", f"reading {path} takes a Parquet engine.", fix="pip install 'hamts[datasets]'"
        ) from error


def values_digest(table: pd.DataFrame) -> str:
    """SHA-256 of names and values, the same for every way of storing them.

    Numbers count as float64, times as nanoseconds, everything else as text.
    """
    digest = hashlib.sha256()
    for name in table.columns:
        column = table[name]
        digest.update(f"{name}\0{len(column)}\0".encode())
        if pd.api.types.is_datetime64_any_dtype(column.dtype):
            digest.update(column.to_numpy("datetime64[ns]").astype("<i8").tobytes())
        elif pd.api.types.is_numeric_dtype(column.dtype):
            numbers = column.to_numpy("<f8", na_value=np.nan)
            digest.update(np.where(np.isnan(numbers), np.nan, numbers + 0.0).tobytes())
        else:
            digest.update("\0".join(column.astype(object).fillna("").astype(str)).encode())
    return digest.hexdigest()
