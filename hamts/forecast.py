"""The result of a prediction: quantiles in the caller's units, shown in the caller's dialect.

Levels between the trained ones are linear; below the lowest and above the highest trained level the distribution is
flat, so no sample lies outside of them. The point forecast ``HAM`` is the mean of that same quantile function.

I items (or windows) · G targets · F future steps · Q quantile levels · R residual windows · A levels asked for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hamts.data.answer import forecast_frame
from hamts.data.panel import Schema
from hamts.errors import DataError
from hamts.options import rising_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Asked", "Forecast", "resolve_levels"]

MODEL = "HAM"
PLOTTED = (50, 80, 95)


@dataclass(frozen=True)
class Asked:
    """Which part of the distribution the answer shows: quantiles, or central intervals in percent."""

    quantiles: tuple[float, ...]
    intervals: tuple[float, ...] = ()

    def columns(self, dialect: str) -> dict[str, float]:
        """Name of each column and the quantile level in it."""
        if dialect == "gluonts":
            return {f"{level:g}": level for level in self.quantiles}
        if not self.intervals:
            return {f"{MODEL}_ql{level:g}": level for level in self.quantiles}
        low = {f"{MODEL}-lo-{width:g}": (100 - width) / 200 for width in reversed(self.intervals)}
        return low | {f"{MODEL}-hi-{width:g}": (100 + width) / 200 for width in self.intervals}


def resolve_levels(
    quantiles: Sequence[float] | None,
    level: Sequence[float] | float | None,
    *,
    default: Sequence[float],
    trained: Sequence[float],
) -> Asked:
    """What to show, checked. Raises DataError E-QUANTILE: both given, out of (0, 1) or of what was trained."""
    if quantiles is not None and level is not None:
        raise DataError("E-QUANTILE", "quantiles and level say the same thing. Got both.", fix="Pass one of them.")
    if level is None:
        asked = Asked(rising_levels(default if quantiles is None else quantiles))
    else:
        try:
            widths = sorted({float(width) for width in (level if isinstance(level, Sequence) else [level])})
        except (TypeError, ValueError) as error:
            found = f"level must be a number in percent, or several. Got {level!r}."
            raise DataError("E-QUANTILE", found, fix="level=[80], say.") from error
        if not widths or not all(1 <= width < 100 for width in widths):
            raise DataError(
                "E-QUANTILE", f"level is in percent, from 1 up to 100. Got {level!r}.", fix="level=[80], say."
            )
        edges = {(100 + sign * width) / 200 for width in widths for sign in (-1, 1)}
        asked = Asked(tuple(sorted(edges)), tuple(widths))
    outside = [each for each in asked.quantiles if not trained[0] - 1e-9 <= each <= trained[-1] + 1e-9]
    if outside:
        raise DataError(
            "E-QUANTILE",
            f"Quantiles must lie within the trained levels {trained[0]:g} to {trained[-1]:g}. Got {outside}.",
            fix=f"Fit with quantiles={sorted({*outside, 0.5})}, or ask for less.",
        )
    return asked


@dataclass(frozen=True, repr=False)
class Forecast:
    """Quantiles of every item, target and step, with the frames that show them.

    Attributes:
        quantiles: [I, G, F, Q] float64, in the units of the targets, rising along Q. NaN for a target never observed.
        levels: [Q], the trained levels.
        item_ids: [I].
        times: [I, F].
        asked: what ``df`` shows.
        templates: [R, G, F'] where the truth fell in past forecasts; what ``samples`` takes its dependence from.
        notes: what was noticed on the way, each ``W-CODE: text``.
    """

    quantiles: np.ndarray
    levels: tuple[float, ...]
    item_ids: np.ndarray
    times: np.ndarray
    schema: Schema
    asked: Asked
    templates: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1), dtype=np.float32))
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        items, targets, steps, _ = self.quantiles.shape
        return f"Forecast({items} items, targets {list(self.schema.targets[:targets])}, {steps} steps)"

    @property
    def mean(self) -> np.ndarray:
        """Mean of the quantile function, [I, G, F]."""
        return quantile_mean(self.quantiles, self.levels)

    @cached_property
    def df(self) -> Any:
        """Long frame in the dialect and library of the input: id, target_name (several targets), time, point, levels.

        Columns are ``HAM`` with ``HAM_ql0.1`` or ``HAM-lo-80``; in the gluonts dialect ``predictions`` and ``0.1``.
        """
        return self._frame(self.asked)

    def quantile(self, q: float | Sequence[float]) -> Any:
        """``df`` with these quantiles instead. Raises DataError E-QUANTILE beyond the trained levels."""
        levels = q if isinstance(q, Sequence) else [q]
        return self._frame(resolve_levels(levels, None, default=(), trained=self.levels))

    def to_nixtla(self) -> Any:
        """Columns unique_id, ds, HAM, ...; several targets become ids of their own, ``item/target``."""
        return self._renamed("nixtla", "unique_id", "ds")

    def to_fev(self) -> Any:
        """Columns item_id, timestamp, predictions, "0.1", ...; several targets become ids of their own."""
        return self._renamed("gluonts", "item_id", "timestamp")

    def samples(self, n: int = 100, seed: int = 0) -> Any:
        """Joint paths over steps and targets: a long frame with ``sample_id`` and the values in the point column.

        Each step's values are the forecast's own quantiles at n even levels; which of them belong to one path follows
        the ranks of one window of past residuals (Schaake shuffle, Clark et al. 2004). Steps beyond the fitted
        horizon take the ranks of the steps one horizon before. Items are drawn apart.
        """
        if n < 1:
            raise DataError("E-OPTION", f"n must be at least 1. Got {n!r}.", fix="samples(n=100)")
        items, targets, steps, _ = self.quantiles.shape
        generator = np.random.default_rng(seed)
        paths = np.empty((items, n, targets, steps))
        for item in range(items):
            ranks = rank_paths(self.templates, n=n, targets=targets, steps=steps, generator=generator)
            paths[item] = values_at(self.quantiles[item], self.levels, (ranks + 0.5) / n)
        names = np.arange(n)[None, :, None, None]
        columns = {"sample_id": np.broadcast_to(names, paths.shape), self._point(): paths}
        return self._long(
            np.repeat(self.item_ids, n),
            np.repeat(self.times, n, axis=0),
            {name: each.reshape(items * n, targets, steps) for name, each in columns.items()},
        )

    def plot(
        self,
        history: Any = None,
        *,
        item: Any = None,
        target: str | None = None,
        history_steps: int | None = None,
        axes: Axes | None = None,
    ) -> Axes:
        """Draw one item's forecast with its intervals after the last rows of ``history``: ``plot.plot_forecast``."""
        from hamts.plot import plot_forecast

        frame = self._frame(resolve_levels(None, PLOTTED, default=(), trained=self.levels))
        return plot_forecast(frame, history, item=item, target=target, history_steps=history_steps, axes=axes)

    def _point(self) -> str:
        return "predictions" if self.schema.dialect.name == "gluonts" else MODEL

    def _frame(self, asked: Asked) -> Any:
        return self._long(self.item_ids, self.times, self.value_columns(asked))

    def value_columns(self, asked: Asked | None = None) -> dict[str, np.ndarray]:
        """The point forecast and each level asked for, by column name, [I, G, F] each."""
        chosen = asked or self.asked
        columns = {self._point(): self.mean}
        for name, level in chosen.columns(self.schema.dialect.name).items():
            columns[name] = quantile_at(self.quantiles, self.levels, level)
        return columns

    def _long(self, item_ids: np.ndarray, times: np.ndarray, columns: Mapping[str, np.ndarray]) -> Any:
        return targets_first(forecast_frame(self.schema, item_ids, times, columns), self.schema)

    def _renamed(self, name: str, id_column: str, time_column: str) -> Any:
        schema, old = self.schema, self.schema.dialect
        several = len(schema.targets) > 1
        ids = self.item_ids
        dialect = replace(old, name=name, id_column=id_column, time_column=time_column)  # type: ignore[arg-type]
        quantiles, times = self.quantiles, self.times
        if several:
            ids = np.array([f"{item}/{target}" for item in self.item_ids for target in schema.targets], dtype=object)
            quantiles = quantiles.reshape(len(ids), 1, *quantiles.shape[2:])
            times = np.repeat(times, len(schema.targets), axis=0)
            dialect = replace(dialect, id_dtype="String" if old.library == "polars" else "object")
            first = next(c for c in schema.channels if c.role == "target")
            schema = replace(schema, channels=(first,))
        shown = replace(self, quantiles=quantiles, item_ids=ids, times=times, schema=replace(schema, dialect=dialect))
        return shown.df


def targets_first(frame: Any, schema: Schema) -> Any:
    """The frame with ``target_name`` right after the id, where it has one."""
    names = list(frame.columns)
    if "target_name" not in names:
        return frame
    names.remove("target_name")
    names.insert(0 if schema.dialect.id_column is None else 1, "target_name")
    return frame[names]


def quantile_mean(quantiles: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Mean of the piecewise linear quantile function, flat beyond its outermost levels: [..., Q] -> [...]."""
    grid = np.asarray(levels)
    edges = np.concatenate([[0.0], (grid[1:] + grid[:-1]) / 2, [1.0]])  # [Q + 1]
    return quantiles @ np.diff(edges)


def quantile_at(quantiles: np.ndarray, levels: Sequence[float], level: float) -> np.ndarray:
    """Quantiles at one level, linear between the trained ones: [..., Q] -> [...]."""
    grid = np.asarray(levels)
    exact = np.flatnonzero(np.abs(grid - level) < 1e-9)
    if len(exact):
        return quantiles[..., exact[0]]
    right = int(np.clip(np.searchsorted(grid, level), 1, len(grid) - 1))
    weight = (level - grid[right - 1]) / (grid[right] - grid[right - 1])
    return quantiles[..., right - 1] + weight * (quantiles[..., right] - quantiles[..., right - 1])


def values_at(quantiles: np.ndarray, levels: Sequence[float], probability: np.ndarray) -> np.ndarray:
    """Values at a level of their own for each path and step, flat tails: [G, F, Q], [n, G, F] -> [n, G, F]."""
    grid = np.asarray(levels)
    wanted = np.clip(probability, grid[0], grid[-1])  # [n, G, F]
    right = np.clip(np.searchsorted(grid, wanted), 1, len(grid) - 1)  # [n, G, F]
    weight = (wanted - grid[right - 1]) / (grid[right] - grid[right - 1])  # [n, G, F]
    whole = np.broadcast_to(quantiles, (*right.shape, len(grid)))  # [n, G, F, Q]
    low = np.take_along_axis(whole, right[..., None] - 1, -1)[..., 0]  # [n, G, F]
    high = np.take_along_axis(whole, right[..., None], -1)[..., 0]  # [n, G, F]
    return low + weight * (high - low)


def rank_paths(
    templates: np.ndarray, *, n: int, targets: int, steps: int, generator: np.random.Generator
) -> np.ndarray:
    """Rank of each path at each step, 0..n-1 once each, ordered like past residuals: [n, G, F] int64.

    Without residual windows the steps are independent. What was not observed in a window is drawn at random.
    """
    noise = generator.random((n, targets, steps))  # [n, G, F]
    if len(templates):
        rounds = -(-n // len(templates))
        chosen = np.concatenate([generator.permutation(len(templates)) for _ in range(rounds)])[:n]  # [n]
        drawn = templates[chosen][:, :, np.arange(steps) % templates.shape[2]].astype(np.float64)  # [n, G, F]
        # ties, as of one window used twice, are broken at random
        noise = np.where(np.isnan(drawn), noise, drawn + 1e-6 * noise)
    order = noise.argsort(axis=0)
    return order.argsort(axis=0)
