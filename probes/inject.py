"""Items of a probe laid into real series, with the controls without which their scores mean nothing.

B sequences · T context rows · C channels · N rows of the real series
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from hamts.errors import DataError
from probes.contract import EVALUATION_SEED, Draws, ProbeBatch, ProbeConfig, generator
from probes.floors import fit_ridge, ridge_answer
from probes.registry import get_probe
from probes.scores import best_floor, query_error

__all__ = ["CARRIERS", "Controls", "SemiSynthetic", "from_catalog"]

# set of the catalogue, and the numeric columns that carry items
CARRIERS = {
    "ett/ETTh1": ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"),
    "epf/NP": ("price", "grid_load_forecast", "wind_power_forecast"),
    "bike_sharing": ("users", "temp", "hum", "windspeed"),
    "household_power": (),
}
TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.2
MAD_TO_SIGMA = 1.4826
LEAK_SKILL, CHANGED_ERROR = 0.02, 0.02
# that the forecaster of the controls reads, as many as a convolution of the networks
AUTOREGRESSION_ROWS = 3


@dataclass(frozen=True)
class Controls:
    """The mandatory companions of a semi-synthetic result."""

    leak_skill: float  # of cheap features where nothing was injected; must be within 0.02 of 0
    phase_skill: float  # the same on a carrier of random phases
    carrier_change: float  # of the non-event MASE of a forecaster fitted with items in its training; at most 2 %
    passed: bool

    def __str__(self) -> str:
        return (
            f"without items: skill of cheap features {self.leak_skill:.3f}, on random phases {self.phase_skill:.3f} (at"
            f" most {LEAK_SKILL}); items change the non-event MASE by {100 * self.carrier_change:.1f} % (at most"
            f" {100 * CHANGED_ERROR:g} %)"
        )


class SemiSynthetic:
    """A probe whose background is real.

    Items are added to windows of the series, in robust units (1.48 x the median absolute first difference of the
    training part); nothing of the series is replaced, and rows that are labelled anomalous are avoided.

    Args:
        probe: a suite or rung: der, xcb, act or pbc.
        frame: numeric columns in time order; rows are taken as equally spaced.
        amplitude: a, of the items in robust units; 0 injects nothing (a control).
        avoid: rows not to inject into, [N] bool.
        name: of the carrier, for reports.

    Raises:
        DataError: E-PROBE-CHANNELS (too few columns), E-PROBE-ROWS (too few rows).
    """

    def __init__(
        self,
        probe: str,
        frame: pd.DataFrame,
        *,
        columns: Sequence[str] | None = None,
        amplitude: float = 2.0,
        avoid: np.ndarray | None = None,
        name: str = "",
    ) -> None:
        self.probe, self.rung = get_probe(probe)
        chosen = list(columns) if columns else [c for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c])]
        missing = [column for column in chosen if column not in frame.columns]
        if missing or not chosen:
            raise DataError("E-PROBE-CHANNELS", f"The carrier lacks numeric columns: {missing or 'all'}.",
                            fix="Name numeric columns of the table.")  # fmt: skip
        if amplitude < 0:
            raise ValueError(f"amplitude must be 0 or more. Got {amplitude}.")
        values = frame[chosen].interpolate(limit_direction="both").to_numpy(dtype=np.float64)
        train = values[: int(TRAIN_SHARE * len(values))]
        mean, spread = train.mean(0), np.maximum(train.std(0), 1e-9)
        self.values = torch.from_numpy(((values - mean) / spread).astype(np.float32))  # [N, C]
        steps = np.abs(np.diff((train - mean) / spread, axis=0))
        self.unit = torch.from_numpy((MAD_TO_SIGMA * np.maximum(np.median(steps, 0), 1e-3)).astype(np.float32))  # [C]
        self.amplitude, self.name = amplitude, name
        self.avoid = None if avoid is None else torch.from_numpy(np.asarray(avoid, dtype=bool))

    def part(self, part: str, rows: int) -> range:
        """Rows at which windows of a part may start; parts are apart by a window."""
        N = len(self.values)
        train, test = int(TRAIN_SHARE * N), int((TRAIN_SHARE + VALIDATION_SHARE) * N)
        bounds = {
            "train": (0, train - rows),
            "validation": (train + rows, test - rows),
            "test": (test + rows, N - rows),
        }
        low, high = bounds[part]
        if high <= low:
            raise DataError(
                "E-PROBE-ROWS", f"The {part} part of the carrier has no room for windows of {rows} rows.",
                fix="Take a longer series, or a smaller preset.",
            )  # fmt: skip
        return range(low, high)

    def sample(
        self,
        gen: torch.Generator,
        n: int,
        config: ProbeConfig,
        *,
        part: str = "train",
        phases: bool = False,
        amplitude: float | None = None,
    ) -> ProbeBatch:
        """Windows of a part of the series with items added; the truth is that of the probe, in robust units.

        Args:
            phases: give the carrier random phases: the same spectrum, no structure.
            amplitude: instead of the object's.
        """
        size = self.amplitude if amplitude is None else amplitude
        gen_windows = Draws(gen)("windows")
        batch = self.probe.sample(gen, n, replace(config, carrier="none", noise=0.0))
        T, C = batch.context_rows, batch.x.shape[-1]
        if self.values.shape[1] < C:
            raise DataError(
                "E-PROBE-CHANNELS", f"{self.probe.name} needs {C} channels, the carrier has {self.values.shape[1]}.",
                fix="Take a carrier with more columns, or a suite with fewer channels.",
            )  # fmt: skip
        starts = self.part(part, T)
        first = torch.randint(starts.start, starts.stop, (n,), generator=gen_windows)  # [B]
        rows = first[:, None] + torch.arange(T)  # [B, T]
        window = self.values[rows][..., :C]  # [B, T, C]
        if phases:
            window = random_phases(window, gen_windows)
        unit = self.unit[:C]
        x = batch.x.clone()
        items = torch.nan_to_num(x[:, :T]) * unit * size  # [B, T, C]
        gone = x[:, :T].isnan()
        x[:, :T] = torch.where(gone, math.nan, window + items)
        if self.avoid is not None:
            spoiled = self.avoid[rows] & batch.crit[:, :T]  # [B, T]
            hit = batch.need.clamp_min(0)[..., None] == torch.where(spoiled, torch.arange(T), -2)[:, None, None]
            mask = batch.y_mask & ~hit.any(-1).any(-1)[..., None]
            batch = replace(batch, y_mask=mask)
        return replace(batch, x=x)

    def controls(self, config: ProbeConfig, *, sequences: int = 512, seed: int = 0) -> Controls:
        """Nothing injected, random phases, and what injecting does to the carrier's own naive error."""
        leak = self._skill(config, sequences, seed, phases=False)
        phase = self._skill(config, sequences, seed, phases=True)
        change = self._carrier_change(config, sequences, seed)
        passed = max(leak, phase) <= LEAK_SKILL and change <= CHANGED_ERROR
        return Controls(leak, phase, change, passed)

    def _skill(self, config: ProbeConfig, n: int, seed: int, *, phases: bool) -> float:
        """Skill of cheap features on carriers without items: what can be had for nothing."""
        train = self.sample(generator(seed), n, config, part="train", phases=phases, amplitude=0.0)
        test = self.sample(generator(EVALUATION_SEED + seed), n, config, part="test", phases=phases, amplitude=0.0)
        # the floors of the generator would tell: only statistics of the rows and the query's key
        bare = [replace(batch, floor={}) for batch in (train, test)]
        features = [self.probe.shortcut_features(batch) for batch in bare]
        weights = fit_ridge(features[0][train.asked], train.y[train.asked])
        error = float(query_error(ridge_answer(features[1], weights), test).nanmean())
        _, floor = best_floor({"mean": train.y[train.asked].mean(0).expand_as(test.y), **test.floor}, test)
        return 1.0 - error / float(floor.nanmean())

    def _carrier_change(self, config: ProbeConfig, n: int, seed: int) -> float:
        """Relative change of the non-event MASE by injecting: of an autoregression fitted with and without items.

        It sees which rows carry an event or an action, is fitted on all other rows, and is scored on the test part at
        rows that no item touched, nor any of the rows that it reads: what changes is what it learned of the carrier.
        """
        part = {"train": seed, "test": EVALUATION_SEED + seed}
        with_items, plain = (
            {name: self.sample(generator(stream), n, config, part=name, amplitude=amplitude)
             for name, stream in part.items()}
            for amplitude in (None, 0.0)
        )  # fmt: skip
        T = config.context_rows
        touched = ((with_items["test"].x - plain["test"].x).nan_to_num().abs() > 1e-6).any(-1)[:, :T]  # [B, T]
        calm = ~touched.unfold(1, AUTOREGRESSION_ROWS + 1, 1).any(-1)  # [B, T - lags]
        if not bool(calm.any()):
            return math.inf
        ahead = plain["test"].x[:, AUTOREGRESSION_ROWS:T].nan_to_num()  # [B, T - lags, C]
        naive = plain["train"].x[:, :T].nan_to_num().diff(dim=1).abs().mean((0, 1))  # [C]
        errors = []
        for batch in (with_items["train"], plain["train"]):
            guess = _lags(plain["test"]) @ _autoregression(batch)
            errors.append(float(((guess - ahead).abs() / naive.clamp_min(1e-9))[calm].mean()))
        return abs(errors[0] - errors[1]) / max(errors[1], 1e-9)


def _lags(batch: ProbeBatch) -> torch.Tensor:
    """What an autoregression reads: the rows before each row from the first that has enough, their flags, a 1."""
    T = batch.context_rows
    x = batch.x[:, :T].nan_to_num()  # [B, T, C]
    flags = torch.cat([batch.events, batch.actions], -1)[:, :T].abs().sum(-1, keepdim=True) > 0  # [B, T, 1]
    told = torch.cat([x, flags.to(x), x * flags], -1)  # [B, T, 2 C + 1]
    past = told[:, :-1].unfold(1, AUTOREGRESSION_ROWS, 1).flatten(2)  # [B, T - lags, (2 C + 1) lags]
    return torch.cat([past, torch.ones_like(past[..., :1])], -1)


def _autoregression(batch: ProbeBatch) -> torch.Tensor:
    """Least squares of each row on the rows before it, [inputs, C]."""
    rows = slice(AUTOREGRESSION_ROWS, batch.context_rows)
    # what an event row itself shows is the event's, and known to be
    quiet = (torch.cat([batch.events, batch.actions], -1)[:, rows].abs().sum(-1) == 0).flatten()  # [B (T - lags)]
    past = _lags(batch).flatten(0, 1)[quiet].double()
    ahead = batch.x[:, rows].nan_to_num().flatten(0, 1)[quiet].double()
    gram = past.T @ past + 1e-3 * torch.eye(past.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, past.T @ ahead).float()


def random_phases(window: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    """Series of the same spectrum with random phases, [B, T, C]."""
    spectrum = torch.fft.rfft(window, dim=1)  # [B, F, C]
    angle = 2 * math.pi * torch.rand(spectrum.shape, generator=gen)
    angle[:, 0] = 0.0  # the mean keeps its sign
    turned = torch.polar(spectrum.abs(), spectrum.angle() * 0 + angle)
    turned[:, 0] = spectrum[:, 0]
    return torch.fft.irfft(turned, n=window.shape[1], dim=1)


def from_catalog(probe: str, carrier: str = "ett/ETTh1", **options: Any) -> SemiSynthetic:
    """A probe on a carrier of the catalogue: ``ett/ETTh1``, ``epf/NP``, ``bike_sharing`` or ``household_power``."""
    from hamts.data.catalog import load_dataset

    data = load_dataset(carrier)
    first = data.df[data.df["unique_id"] == data.df["unique_id"].iloc[0]]
    columns = [c for c in CARRIERS.get(carrier, ()) if c in first.columns] or None
    frame = first.drop(columns=["unique_id", "ds"])
    return SemiSynthetic(probe, frame, columns=columns, name=carrier, **options)
