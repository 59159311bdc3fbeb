"""Frames in and out of files: CSV and Parquet, written whole or not at all, never over something else unasked."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hamts.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_output", "read_frame", "written_whole", "write_frame"]

CSV = (".csv", ".csv.gz", ".csv.xz", ".csv.bz2", ".csv.zst")
PARQUET = (".parquet", ".pq")
ID_NAMES, TIME_NAMES = ("unique_id", "item_id"), ("ds", "timestamp")
OFFSET = r"(?:Z|[+-]\d\d:?\d\d)$"
STDOUT = "-"


def kind_of(path: str | Path) -> str:
    """``csv`` or ``parquet``, by the end of the name. Raises DataError E-FILE."""
    name = str(path).lower()
    if name.endswith(CSV):
        return "csv"
    if name.endswith(PARQUET):
        return "parquet"
    raise DataError(
        "E-FILE", f"A table is a CSV or a Parquet file. Got '{path}'.", fix=f"End its name in {CSV[0]} or {PARQUET[0]}."
    )


def read_frame(
    path: str | Path, *, id_column: str | None = None, time_column: str | None = None, zone: str | None = None
) -> pd.DataFrame:
    """Read a table. Ids with leading zeros stay text.

    Args:
        zone: where the times of a CSV were read off the wall; those written with an offset from UTC are turned into it.

    Raises DataError: E-FILE, E-TZ (no such zone).
    """
    import pandas as pd

    kind = kind_of(path)
    if not Path(path).is_file():
        raise DataError("E-FILE", f"There is no file '{path}'.", fix="Check the path.")
    try:
        if kind == "parquet":
            return pd.read_parquet(path)
        frame = pd.read_csv(path)
        for name in (id_column, *ID_NAMES):
            if name in frame and pd.api.types.is_numeric_dtype(frame[name]):
                text = pd.read_csv(path, usecols=[name], dtype=str)[name]
                if text.str.match(r"0\d").any():
                    frame[name] = text
        return frame if zone is None else with_zone(frame, zone, time_column)
    except ImportError as error:
        raise DataError(
            "E-FILE", f"Reading '{path}' needs the package pyarrow.", fix="pip install pyarrow, or convert it to CSV."
        ) from error
    except DataError:
        # what it says of the table, or of a zone, is not the reading's fault
        raise
    except (ValueError, OSError) as error:
        raise DataError(
            "E-FILE", f"'{path}' could not be read as {kind}: {error}", fix="Write the table again."
        ) from error


def with_zone(frame: pd.DataFrame, zone: str, time_column: str | None) -> pd.DataFrame:
    """Times that are text become those of a zone. Summer time gives a CSV two offsets, which are one zone."""
    import pandas as pd

    name = next((n for n in (time_column, *TIME_NAMES) if n in frame), None)
    if name is None or not pd.api.types.is_object_dtype(frame[name]) and not pd.api.types.is_string_dtype(frame[name]):
        return frame
    offset = frame[name].astype(str).str.contains(OFFSET, regex=True)
    try:
        if offset.all():
            times = pd.to_datetime(frame[name], utc=True, format="ISO8601").dt.tz_convert(zone)
        else:
            times = pd.to_datetime(frame[name], format="ISO8601").dt.tz_localize(zone)
    except KeyError as error:
        raise DataError("E-TZ", f"There is no time zone {zone!r}.", fix="America/New_York, UTC, say.") from error
    return frame.assign(**{name: times})


def check_output(path: str | Path | None, *, force: bool) -> None:
    """Refuse, before any work is done, what could not be written after it. Raises DataError E-EXISTS, E-FILE."""
    if path is None or str(path) == STDOUT:
        return
    if Path(path).exists() and not force:
        raise DataError("E-EXISTS", f"'{path}' exists already.", fix="Give another name, or --force to replace it.")
    if Path(path).parent.exists() and not os.access(Path(path).parent, os.W_OK):
        raise DataError("E-FILE", f"Nothing can be written into '{Path(path).parent}'.", fix="Give another folder.")


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to; the file appears under its own name when all of it is there."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # the suffix decides how pandas and matplotlib write
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-", suffix=f"-{target.name}")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes private files
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_frame(frame: pd.DataFrame, path: str | Path | None) -> None:
    """Write a table; to the standard output as CSV without a path."""
    if path is None or str(path) == STDOUT:
        frame.to_csv(sys.stdout, index=False)
        return
    kind = kind_of(path)
    with written_whole(path) as partial:
        if kind == "csv":
            frame.to_csv(partial, index=False)
        else:
            try:
                frame.to_parquet(partial, index=False)
            except ImportError as error:
                raise DataError(
                    "E-FILE", f"Writing '{path}' needs the package pyarrow.", fix="pip install pyarrow, or write CSV."
                ) from error
