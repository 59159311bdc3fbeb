"""What all pictures share: colours, marks, thinning, and how axes look.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers; reasons also differ in marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hamts.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "REASONS", "as_pandas", "between", "calm", "choose", "find_column", "legend", "own_axes", "reasons_of",
    "save_picture", "thin", "two_axes", "wall",
]  # fmt: skip

INK, FAINT = "#4d4d4d", "#bfbfbf"
BAND, SHADE = "#56B4E9", "#F0E442"
# colour and marker of every reason
REASONS = {
    "event": ("#E69F00", "s"),
    "action": ("#CC79A7", "D"),
    "surprise": ("#D55E00", "^"),
    "innovation": ("#009E73", "v"),
    "learned": ("#0072B2", "o"),
    "mix": ("#000000", "P"),
    # eight colours are all that can be told apart: the rest differ in lightness and marker
    "error": ("#8c510a", "<"),
    "write": ("#7a7a7a", ">"),
    "uncertainty": ("#5e3c99", "X"),
    "residual": ("#a6761d", "p"),
}
ANY_REASON = ("#000000", "*")
ID_NAMES, TIME_NAMES = ("unique_id", "item_id"), ("ds", "timestamp")
# points of a line beyond which more cannot be seen
MOST_POINTS = 4000


def reasons_of(entries: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of the reasons that occur, in the order of ``REASONS``."""
    present = [reason for reason in entries["reason"].unique() if reason]
    known = [reason for reason in REASONS if reason in present]
    return {reason: REASONS.get(reason, ANY_REASON) for reason in [*known, *sorted(set(present) - set(known))]}


def thin(times: pd.Series, values: pd.Series, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``most`` points of a line: of every stretch its lowest and its highest, so that spikes survive.

    A stretch without a value stays a gap.
    """
    clock, numbers = np.asarray(times), np.asarray(values, dtype=float)
    size = -(-len(numbers) // max(most // 2, 1))
    if size <= 2:
        return clock, numbers
    stretches = -(-len(numbers) // size)
    padded = np.full(stretches * size, np.nan)
    padded[: len(numbers)] = numbers
    grid = padded.reshape(stretches, size)
    known = ~np.isnan(grid)
    low = np.where(known, grid, np.inf).argmin(1)
    high = np.where(known, grid, -np.inf).argmax(1)
    picked = np.sort(np.stack([low, high], 1), axis=1) + np.arange(stretches)[:, None] * size
    index = np.minimum(picked.ravel(), len(numbers) - 1)
    return clock[index], numbers[index]


def as_pandas(frame: Any) -> pd.DataFrame:
    return frame if isinstance(frame, pd.DataFrame) else frame.to_pandas()


def find_column(frame: pd.DataFrame, names: Sequence[str], *, missing_ok: bool = False) -> Any:
    """The first of these columns that the frame has."""
    found = next((name for name in names if name in frame), None)
    if found is None and not missing_ok:
        raise DataError(
            "E-COLUMNS",
            f"A frame to be drawn needs one of the columns {list(names)}. It has {list(frame.columns)}.",
            fix="Rename the column.",
        )
    return found


def choose(frame: pd.DataFrame, name: str, *, item: Any) -> pd.DataFrame:
    """The rows of one item; the first where none is named, all where there are no items."""
    column = find_column(frame, ID_NAMES, missing_ok=True)
    if frame.empty:
        raise DataError("E-EMPTY", f"{name} has no rows to draw.", fix="Pass a frame with rows.")
    if column is None:
        return frame
    chosen = frame[column].iloc[0] if item is None else item
    rows = frame[frame[column] == chosen]
    if rows.empty:
        raise DataError(
            "E-COLUMNS",
            f"{name} has no item {chosen!r}.",
            column=column,
            series=chosen,
            rows=list(frame[column].unique()[:5]),
            fix="Pass item=... with one of its ids.",
        )
    return rows


def between(frame: pd.DataFrame, column: str, start: Any, end: Any) -> pd.DataFrame:
    for bound, keep in ((start, "ge"), (end, "le")):
        if bound is None or frame.empty:
            continue
        stamp = bound if pd.api.types.is_integer_dtype(frame[column]) else pd.Timestamp(bound)
        frame = frame[getattr(frame[column], keep)(_no_zone(stamp))]
    return frame


def _no_zone(stamp: Any) -> Any:
    return stamp.tz_localize(None) if getattr(stamp, "tzinfo", None) is not None else stamp


def wall(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Times of a zone as what a clock on the wall showed."""
    zoned = [name for name in columns if isinstance(frame[name].dtype, pd.DatetimeTZDtype)]
    return frame.assign(**{name: frame[name].dt.tz_localize(None) for name in zoned})


def own_axes(axes: Axes | None, *, width: float = 9, height: float = 3.2) -> Axes:
    """The axes given, or those of a new figure of so many inches."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def two_axes(axes: Sequence[Axes] | None) -> tuple[Axes, Axes]:
    if axes is not None:
        above, below = axes
        below.sharex(above)
        return above, below
    import matplotlib.pyplot as plt

    _, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(10, 4.8), layout="constrained", height_ratios=(2.2, 1))
    return above, below


def legend(axes: Axes) -> None:
    """One line above the axes, where nothing is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels) or 1, frameon=False,
        fontsize="small", borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip


def calm(axes: Axes, times: pd.Series, *, labels: bool = True) -> None:
    """No box, short dates."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if pd.api.types.is_datetime64_any_dtype(times):
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.tick_params(labelbottom=labels, labelsize="small")


def save_picture(axes: Axes, path: str | Path, *, dots_per_inch: int = 130) -> None:
    """Write the figure of these axes to a file, and let go of it."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(path, dpi=dots_per_inch)
    plt.close(figure)
