"""The one shape of data inside hamts: every item's steps in one contiguous array, with offsets.

No pandas here: a Panel is numpy only, so that windows are views and nothing is copied per item.

S steps of all items together · I items · C channels · E static columns
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["Channel", "Dialect", "Frequency", "Panel", "Role", "Schema", "StaticColumn"]

Role = Literal["target", "past", "future", "event", "action"]
Kind = Literal["numeric", "boolean", "categorical"]

KNOWN_AHEAD: tuple[str, ...] = ("future", "action")


@dataclass(frozen=True)
class Channel:
    """One input column of the stream, or one type of an event log.

    ``levels`` are the categories seen when fitting; code 0 is the bucket of unseen ones, code i + 1 is ``levels[i]``.
    ``from_log`` marks a channel that came from the event log beside the frame, not from a column.
    """

    name: str
    role: Role
    kind: Kind = "numeric"
    levels: tuple[str, ...] = ()
    from_log: bool = False


@dataclass(frozen=True)
class StaticColumn:
    """One column of the static frame; categorical codes follow the rule of ``Channel.levels``."""

    name: str
    kind: Kind = "numeric"
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frequency:
    """The clock of all items.

    Attributes:
        kind: ``calendar`` (a pandas offset), ``integer`` (whole numbers) or ``irregular`` (true times per row).
        alias: modern pandas spelling such as ``h``, ``15min``; the step as text for integer clocks; "" without one.
        season_steps: steps in one season (24 for hourly, 1 when there is none that is known).
        steps_per_day: whole steps in a calendar day, or 0 where the frequency does not divide it.
    """

    kind: Literal["calendar", "integer", "irregular"]
    alias: str
    season_steps: int
    steps_per_day: int = 0


@dataclass(frozen=True)
class Dialect:
    """How the user's frame looked, so that the answer looks the same.

    ``id_column`` is None for a wide frame (one item). ``library`` is ``pandas`` or ``polars``.
    """

    name: Literal["nixtla", "gluonts", "wide"]
    id_column: str | None
    time_column: str
    library: Literal["pandas", "polars"]
    time_zone: str | None = None
    time_unit: str = "ns"
    id_dtype: str = "object"


@dataclass(frozen=True)
class Schema:
    """Everything about the columns that fitting fixes and predicting checks. Targets come first in ``channels``."""

    channels: tuple[Channel, ...]
    static: tuple[StaticColumn, ...]
    frequency: Frequency
    dialect: Dialect

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.channels if c.role == "target")

    def indices(self, *roles: Role) -> list[int]:
        """Positions of the channels that have one of these roles."""
        return [i for i, c in enumerate(self.channels) if c.role in roles]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Schema:
        """Rebuild from ``to_dict``, also after a trip through JSON (lists become tuples again)."""
        channels = tuple(Channel(**{**c, "levels": tuple(c["levels"])}) for c in content["channels"])
        static = tuple(StaticColumn(**{**c, "levels": tuple(c["levels"])}) for c in content["static"])
        return cls(channels, static, Frequency(**content["frequency"]), Dialect(**content["dialect"]))


@dataclass(frozen=True)
class Panel:
    """Items on one clock. Item i owns rows ``offsets[i]:offsets[i + 1]`` of ``values``.

    Attributes:
        values: float64 [S, C]; NaN is missing (gaps of the clock are rows of NaN). Categorical channels hold codes.
        offsets: int64 [I + 1].
        item_ids: the users' ids, [I], in order of first appearance.
        starts: time of each item's first row, [I]; datetime64[ns] (UTC where zoned) or int64.
        times: true time of every row, [S], only where the clock is irregular; else None.
        event_offset: float32 [S, C], where inside its step an event of the log lies, in [0, 1); None without a log.
        static_values: float64 [I, E]; categorical columns hold codes; NaN is missing.
        notes: what was done or noticed on the way in, each ``W-CODE: text``.
    """

    values: np.ndarray
    offsets: np.ndarray
    item_ids: np.ndarray
    starts: np.ndarray
    schema: Schema
    times: np.ndarray | None = None
    event_offset: np.ndarray | None = None
    static_values: np.ndarray | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def n_items(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Steps of every item, [I]."""
        return np.diff(self.offsets)

    def item(self, index: int) -> np.ndarray:
        """Values of one item as a view, [T, C]."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]
