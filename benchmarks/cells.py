"""Cells of the benchmarks: one JSON file each, all of it or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_cell"]


def write_cell(path: Path, content: Mapping[str, Any]) -> None:
    """Under its name when all of it is there; what a killed process leaves behind has no name that a table reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
