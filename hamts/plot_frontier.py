"""The frontier of a model as a picture file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hamts.errors import DataError
from hamts.plot_quality import plot_frontier

__all__ = ["save_frontier"]

COSTS = ("bytes", "ms_per_step", "usage_share")


def save_frontier(table: Any, path: Path, *, x: str = "bytes", y: str = "WQL") -> None:
    """Error against a cost, one line for each memory and one panel for each part of the windows.

    Args:
        table: of ``HAMForecaster.frontier``.
        path: a file whose ending matplotlib can write.
        x: one of bytes, ms_per_step, usage_share.

    Raises DataError E-OPTION: another x.
    """
    if x not in COSTS:
        raise DataError("E-OPTION", f"x must be one of {list(COSTS)}. Got {x!r}.", fix="x='bytes'")
    from matplotlib.figure import Figure

    rows = pd.DataFrame(table)
    parts = list(rows["part"].unique())
    figure = Figure(figsize=(5.5 * len(parts), 3.8), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        own = rows[rows["part"] == part]
        plot_frontier(own, x=x, y=y, group="memory", low=f"{y}_low", high=f"{y}_high", axes=axes)
        axes.set_title(part, fontsize="medium")
    figure.savefig(path, dpi=150)
