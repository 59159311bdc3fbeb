"""Where a stream's rows come from: anything that can say which rows follow a position.

A source keeps no place of its own. The position travels with the state of the stream and is committed with it, so that
after a crash the rows after the last commit are read again, and only those. Built in: a folder of CSV and Parquet
drops, here, and Kafka, in ``sources_kafka``.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

from hamts.errors import DataError, DataWarning
from hamts.files import CSV, PARQUET, read_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FolderSource", "Position", "Rejected", "Source", "check_position", "open_source"]

Position = dict[str, Any] | None
OnCorrupt = Literal["error", "quarantine"]
MOST_NAMES = 20


@runtime_checkable
class Source(Protocol):
    """What a stream can be fed from."""

    def poll(self, position: Position) -> tuple[Any | None, Position]:
        """The next rows after a position, and the position after them.

        Args:
            position: what an earlier poll returned, perhaps in another process; None for the start. JSON.

        Returns: a frame, or None where there are no rows (yet), and a position, which may have moved over something
            that holds no rows.

        Raises DataError where rows that were promised are gone or have changed.
        """


class Rejected:
    """What a source could not make rows of, until somebody takes it."""

    def __init__(self) -> None:
        self._kept: list[dict[str, Any]] = []

    def add(self, **entry: Any) -> None:
        self._kept.append(entry)

    def take(self) -> list[dict[str, Any]]:
        """Everything since the last time."""
        taken, self._kept = self._kept, []
        return taken


def open_source(text: str, *, max_rows: int = 10_000, on_corrupt: OnCorrupt = "error", **read: Any) -> Source:
    """A source by its address: ``kafka://host:9092,other:9092/topic``, or the path of a folder of drops.

    Args:
        read: ``id_column``, ``time_column`` and ``zone`` of the rows.

    Raises DataError E-SOURCE.
    """
    if not text.startswith("kafka://"):
        return FolderSource(text, max_rows=max_rows, on_corrupt=on_corrupt, **read)
    parts = urlsplit(text)
    topic = parts.path.strip("/")
    if not parts.netloc or not topic or "/" in topic or parts.query or parts.fragment:
        raise DataError(
            "E-SOURCE", f"A Kafka topic is named as kafka://host:port/topic. Got {text!r}.", fix="Name one topic."
        )
    from hamts.sources_kafka import KafkaSource

    return KafkaSource(parts.netloc, topic, max_rows=max_rows, on_corrupt=on_corrupt)


def check_position(position: Position, kind: str, needed: dict[str, type]) -> None:
    """A position of another source, or of none, must not be read as if it were one's own. Raises DataError."""
    if position is None:
        return
    good = isinstance(position, dict) and position.get("source") == kind
    if not good or any(type(position.get(name)) is not wanted for name, wanted in needed.items()):
        raise DataError(
            "E-SOURCE-POSITION",
            f"The stream's position must be one of a {kind} source. Got {position!r}.",
            fix="Feed the stream from the source that it was fed from, or start another state folder.",
        )


class FolderSource:
    """A folder into which files of rows are dropped, read in the order of their names.

    A drop must be complete when it gets its name, and stay as it is: write it under a name that begins with "." or "_"
    or has another ending, such as .csv.tmp, and rename it. For writers that do not, a file is left alone until it has
    not been changed for ``settle_seconds``; a CSV whose writer pauses for longer would be read in part, a Parquet file
    would be refused as corrupt. Names must sort by time: a file that comes to lie before one that was read is never
    read, which is noticed (W-SOURCE-LATE) where it can be.

    Args:
        max_rows: most rows of one poll. A poll never spans two files, so that its rows depend on the position alone.
        on_corrupt: ``error``, or ``quarantine``: pass over a file that cannot be read, and count it in the position.
        id_column, time_column, zone: see ``files.read_frame``.

    Raises DataError: E-SOURCE (no such folder), E-SOURCE-CORRUPT, E-SOURCE-GONE and E-SOURCE-CHANGED (a file that was
        read in part is gone, or is another now), E-SOURCE-POSITION.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_rows: int = 10_000,
        settle_seconds: float = 1.0,
        on_corrupt: OnCorrupt = "error",
        id_column: str | None = None,
        time_column: str | None = None,
        zone: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError("E-SOURCE", f"There is no folder '{folder}'.", fix="Make it, or check the path.")
        if max_rows < 1 or settle_seconds < 0:
            raise ValueError(f"max_rows must be at least 1 and settle_seconds 0. Got {max_rows}, {settle_seconds}.")
        self.max_rows, self.settle_seconds, self.on_corrupt = max_rows, settle_seconds, on_corrupt
        self.rejected = Rejected()
        self._read = {"id_column": id_column, "time_column": time_column, "zone": zone}
        self._passed: set[str] | None = None
        self._unsettled = False
        self._open: tuple[str, int, pd.DataFrame] | None = None

    @property
    def at_end(self) -> bool:
        """Whether the last poll saw no file that is still being written."""
        return not self._unsettled

    def poll(self, position: Position) -> tuple[pd.DataFrame | None, Position]:
        """The next rows of the file that was begun, or the first of the next file."""
        check_position(position, "folder", {"file": str, "rows": int, "bytes": int, "done": bool, "files": int})
        while True:
            name = self._next(position)
            if name is None:
                return None, position
            begun = position if position is not None and not position["done"] else None
            frame = self._frame(name)
            if frame is None:
                position = self._after(position, name, rows=0, done=True, skipped=True)
                continue
            low = 0 if begun is None else begun["rows"]
            high = min(low + self.max_rows, len(frame))
            position = self._after(position, name, rows=high, done=high == len(frame))
            if low < high:
                return frame.iloc[low:high].reset_index(drop=True), position

    def _next(self, position: Position) -> str | None:
        """The file to read from; None where there is none yet."""
        self._unsettled = False
        names = self._names()
        if position is None:
            return self._settled(names[0]) if names else None
        at = position["file"]
        self._check_same(position)
        if not position["done"]:
            return at
        self._note_late(names, position)
        following = [name for name in names if name > at]
        # an unfinished file holds back the later ones, since their rows come after its own
        return self._settled(following[0]) if following else None

    def _names(self) -> list[str]:
        return sorted(
            entry.name
            for entry in os.scandir(self.folder)
            if entry.name.lower().endswith((*CSV, *PARQUET))
            and not entry.name.startswith((".", "_"))
            and entry.is_file()
        )

    def _settled(self, name: str) -> str | None:
        age = time.time() - (self.folder / name).stat().st_mtime
        # a time in the future says nothing of when the file was changed
        self._unsettled = 0 <= age < self.settle_seconds
        return None if self._unsettled else name

    def _check_same(self, position: dict[str, Any]) -> None:
        """A file that was read, or begun, must not become another one."""
        path = self.folder / position["file"]
        if not path.is_file():
            if position["done"]:
                return
            raise DataError(
                "E-SOURCE-GONE",
                f"'{path}' was read up to row {position['rows']} and is gone now.",
                fix="Put it back; a drop may be removed when all of its rows are committed.",
            )
        if path.stat().st_size != position["bytes"]:
            raise DataError(
                "E-SOURCE-CHANGED",
                f"'{path}' had {position['bytes']:,} bytes when it was read and has {path.stat().st_size:,} now.",
                fix="Put the old file back and drop what is new as another file, with a name that sorts after it.",
            )

    def _note_late(self, names: list[str], position: dict[str, Any]) -> None:
        earlier = {name for name in names if name <= position["file"]}
        if self._passed is None:
            # of files that came while nobody looked, only their number can tell
            late = len(earlier) - position["files"]
            what = f"{late} files" if late > 0 else ""
        else:
            new = sorted(earlier - self._passed)
            what = ", ".join(new[:MOST_NAMES])
        if what:
            warnings.warn(
                DataWarning(
                    f"W-SOURCE-LATE: {what} in '{self.folder}' came after '{position['file']}' was read, but sort"
                    " before it; they are not read. Names must sort by time."
                ),
                stacklevel=4,
            )
        self._passed = earlier

    def _after(self, position: Position, name: str, *, rows: int, done: bool, skipped: bool = False) -> dict[str, Any]:
        before = position or {"files": 0, "skipped": 0, "skipped_files": []}
        again = position is not None and position["file"] == name
        if self._passed is not None:
            self._passed.add(name)
        return {
            "source": "folder",
            "file": name,
            "rows": rows,
            "bytes": self._size(name),
            "done": done,
            "files": before["files"] + (not again),
            "skipped": before["skipped"] + skipped,
            "skipped_files": [*before["skipped_files"], *([name] if skipped else [])][-MOST_NAMES:],
        }

    def _size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError as error:
            raise DataError(
                "E-SOURCE-GONE", f"'{self.folder / name}' went away while it was read.", fix="Put it back."
            ) from error

    def _frame(self, name: str) -> pd.DataFrame | None:
        """All rows of a file; None where it is passed over."""
        size = self._size(name)
        if self._open is not None and self._open[:2] == (name, size):
            return self._open[2]
        try:
            frame = read_frame(self.folder / name, **self._read)
        except Exception as error:
            if _not_its_fault(error):
                raise
            if self.on_corrupt == "error":
                raise DataError(
                    "E-SOURCE-CORRUPT",
                    f"'{self.folder / name}' cannot be read: {error.__cause__ or error}",
                    fix="Drop it again, remove it, or let the source pass over such files (quarantine).",
                ) from error
            self.rejected.add(file=name, error=str(error.__cause__ or error))
            return None
        self._open = (name, size, frame)
        return frame


def _not_its_fault(error: BaseException) -> bool:
    """Whether reading failed for another reason than what is in the file: the disk, the rights, a missing library."""
    cause = error.__cause__ or error
    code = getattr(error, "code", None)
    if isinstance(cause, ImportError | MemoryError) or code == "E-TZ":
        return True
    # readers of Parquet raise OSError for what they find, but without a number of the system
    return isinstance(cause, OSError) and cause.errno is not None
