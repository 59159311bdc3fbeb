"""Errors that say what must hold, what came, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["DataError", "DataWarning", "ModelFolderError", "StateFolderError"]


class DataError(ValueError):
    """Bad input, refused before anything was computed or written.

    Args:
        code: stable, greppable name of the problem, such as ``E-DUP``.
        message: what must hold and what came.
        column: the column at fault, if one is.
        series: the item (``unique_id``) at fault, or a few of them.
        rows: the first offending rows, at most five, as shown to the user.
        fix: one sentence that says what to do.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        column: str | None = None,
        series: Any = None,
        rows: Sequence[Any] = (),
        fix: str = "",
    ) -> None:
        self.code = code
        self.message = message
        self.column = column
        self.series = series
        self.rows = tuple(rows)[:5]
        self.fix = fix
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        if self.column is not None:
            lines.append(f"  column: {self.column!r}")
        if self.series is not None:
            lines.append(f"  series: {self.series!r}")
        if self.rows:
            lines.append("  first rows: " + "; ".join(str(row) for row in self.rows))
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ModelFolderError(DataError):
    """A model folder that is missing, foreign, damaged, or from another format version."""


class StateFolderError(DataError):
    """A folder of a stream's state that is locked, foreign, damaged, not writable, or from another format version."""


class DataWarning(UserWarning):
    """Input that is usable, with something its owner would want to know. Starts with a ``W-`` code."""
