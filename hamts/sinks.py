"""What a stream says, written so that each thing is said exactly once: files that appear with a commit, or not at all.

Everything of a generation is written beside its final place before the commit and renamed into it afterwards. A crash
in between leaves files that the next start either brings out, if their generation was committed, or deletes: its rows
are then read again. What belongs to generations that were given up (after damage to the state) is set aside under the
ending ``.retracted``, since replayed rows say it again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hamts.errors import DataError
from hamts.storage import sync_folder

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FolderSink", "SinkFormat"]

SinkFormat = Literal["jsonl", "parquet"]
_KIND = re.compile(r"[a-z]+")
_PUBLISHED = re.compile(r"([a-z]+)-(\d{8,12})\.(jsonl|parquet)")


class FolderSink:
    """Files ``<kind>-<generation>.jsonl`` or ``.parquet`` in a folder, one of each kind with each commit.

    Args:
        folder: made if it is not there.
        format: JSON lines (times as ISO 8601, null where there is no number) or Parquet.
    """

    def __init__(self, folder: str | os.PathLike[str], format: SinkFormat = "jsonl") -> None:
        if format not in ("jsonl", "parquet"):
            raise ValueError(f"format must be 'jsonl' or 'parquet'. Got {format!r}.")
        self.folder, self.format = Path(folder), format
        self._waiting: dict[str, list[pd.DataFrame]] = {}

    def add(self, kind: str, rows: pd.DataFrame | Sequence[dict[str, Any]]) -> None:
        """Rows that come out with the next commit."""
        if not _KIND.fullmatch(kind):
            raise ValueError(f"A kind must match {_KIND.pattern!r}. Got {kind!r}.")
        if len(rows) == 0:
            return
        import pandas as pd

        self._waiting.setdefault(kind, []).append(rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows))

    def put(self, kind: str, rows: pd.DataFrame | Sequence[dict[str, Any]]) -> None:
        """Rows that come out with the next commit, in the place of those of that kind that wait."""
        self._waiting.pop(kind, None)
        self.add(kind, rows)

    def stage(self, generation: int) -> None:
        """Write everything of a generation durably, not yet under its name. May be called again with more rows."""
        if not self._waiting:
            return
        import pandas as pd

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for kind, frames in self._waiting.items():
                frame = pd.concat(frames, ignore_index=True)
                self._write(self.folder / f".{kind}-{generation:08d}.{self.format}.staged", frame)
            sync_folder(self.folder)
        except OSError as error:
            raise _not_written(self.folder, error, "The state was not committed either.") from error

    def publish(self, generation: int) -> None:
        """Bring out what belongs to a generation that was committed."""
        self._waiting.clear()
        try:
            self._bring_out(generation)
        except OSError as error:
            raise _not_written(self.folder, error, "It comes out with the next commit or start.") from error

    def recover(self, generation: int | None) -> None:
        """After a start: bring out what was committed, delete what was not, set aside what was given up.

        Args:
            generation: that was committed last; None for a new stream, which must not mix with what another one said.

        Raises DataError: E-EXISTS, E-OUTPUT-WRITE.
        """
        files = self._files()
        if generation is None and not all(staged for _, _, staged in files):
            raise DataError(
                "E-EXISTS",
                f"'{self.folder}' holds what another stream said.",
                rows=[path.name for path, _, staged in files if not staged],
                fix="Give another folder, or empty this one.",
            )
        last = -1 if generation is None else generation
        try:
            self._bring_out(last)
            for path, number, staged in self._files():
                if number > last and staged:
                    path.unlink()
                elif number > last:
                    os.replace(path, path.with_name(path.name + ".retracted"))
        except OSError as error:
            raise _not_written(self.folder, error, "The stream was not started.") from error

    def _bring_out(self, generation: int) -> None:
        found = [path for path, number, staged in self._files() if staged and number <= generation]
        for path in found:
            os.replace(path, path.with_name(path.name[1:].removesuffix(".staged")))
        if found:
            sync_folder(self.folder)

    def _files(self) -> list[tuple[Path, int, bool]]:
        """Files of ours with their generation, and whether they are still to come out."""
        if not self.folder.is_dir():
            return []
        found = []
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            staged = entry.name.startswith(".") and entry.name.endswith(".staged")
            match = _PUBLISHED.fullmatch(entry.name[1:].removesuffix(".staged") if staged else entry.name)
            if match:
                found.append((Path(entry.path), int(match[2]), staged))
        return found

    def _write(self, path: Path, frame: pd.DataFrame) -> None:
        if self.format == "parquet":
            try:
                frame.to_parquet(path, index=False)
            except ImportError as error:
                raise DataError("E-FILE", "Parquet needs the package pyarrow.", fix="pip install pyarrow") from error
        else:
            frame.to_json(path, orient="records", lines=True, date_format="iso", date_unit="us", double_precision=15)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _not_written(folder: Path, error: OSError, consequence: str) -> DataError:
    return DataError(
        "E-OUTPUT-WRITE",
        f"Nothing can be written to '{folder}': {error}. {consequence}",
        fix="Make the disk writable and give it room.",
    )
