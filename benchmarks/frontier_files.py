"""Files of the frontier's cells: what a folder holds, and that all of it was fitted and judged in one way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hamts.errors import DataError

__all__ = ["read_cells", "refuse_others"]

ELSEWHERE = "Ask for the same, name another --folder, or pass --again to measure it anew."


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """All cells of a folder, none where there are none; refused where they cannot be set beside one another."""
    paths = sorted(folder.glob("*--seed*.json"))
    cells = [json.loads(path.read_text()) for path in paths]
    first: dict[tuple[str, str], tuple[Any, str]] = {}
    for path, cell in zip(paths, cells, strict=True):
        # sets may be fitted for other numbers of steps, and models at other rates: those of trials
        for name, of in (("registration", ""), ("size", ""), ("steps", cell["set"])):
            value, place = first.setdefault((name, of), (cell.get(name), path.name))
            if cell.get(name) != value:
                raise DataError(
                    "E-CELLS-MIXED",
                    f"cells of a table must be of one {name}{f' on {of}' if of else ''}; {place} of {folder} has "
                    f"{value!r}, {path.name} has {cell.get(name)!r}",
                    fix="Move the cells of one of them to a folder of their own.",
                )
    return cells


def refuse_others(path: Path, asked: Mapping[str, Any]) -> None:
    """An error where a file was not measured as is asked: it would be taken for what is missing."""
    found = json.loads(path.read_text())
    apart = {name: value for name, value in asked.items() if found.get(name) != value}
    if apart:
        said = "; ".join(f"{name} must be {value!r} and is {found.get(name)!r}" for name, value in apart.items())
        raise DataError("E-CELL-OTHER", f"{path} was measured otherwise than is asked: {said}", fix=ELSEWHERE)
