"""What tests of a fitted forecaster share: models that are fitted in seconds."""

from __future__ import annotations

import warnings

import numpy as np
from model_frames import ROLES, rich_frames, sine_frame

import hamts
from hamts.errors import DataWarning

# one rounding of float32 in the forecast, in units of its scale
CLOSE = 2e-5


def apart(one: hamts.Forecast, other: hamts.Forecast) -> float:
    """Largest difference of two forecasts in units of the width of the first."""
    width = one.quantiles[..., -1] - one.quantiles[..., 0]
    return float((np.abs(one.quantiles - other.quantiles).max(-1) / width).max())


def fit_sine() -> hamts.HAMForecaster:
    return hamts.fit(sine_frame(), preset="tiny", max_steps=90, batch_windows=24, verbose=False, progress=False)


def fit_rich() -> hamts.HAMForecaster:
    """Every role, a gap and several lengths."""
    data = rich_frames()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return hamts.fit(
            data["df"], preset="tiny", max_steps=6, events=data["events"], static_df=data["static_df"],
            verbose=False, **ROLES,
        )  # fmt: skip
