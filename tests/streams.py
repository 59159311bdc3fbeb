"""Streams that tests feed, and the rows they are fed with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from model_frames import ROLES, quick, rich_frames, sine_frame
from networks import calibrate_on, open_scratchpad, perturb

import hamts
from hamts.data.patches import build_store
from hamts.stream import Stream


@cache
def rich_model() -> hamts.HAMForecaster:
    """Every role, an event log and static columns; entries weigh as much as fresh keys."""
    frames = rich_frames()
    model = quick(
        frames["df"],
        24,
        events=frames["events"],
        static_df=frames["static_df"],
        patch_steps=6,
        budget_share=0.4,
        **ROLES,
    )
    return shaken(model)


@cache
def plain_model() -> hamts.HAMForecaster:
    """One target, two items, patches of 6 hours."""
    return shaken(quick(sine_frame(items=2, steps=240), 12, patch_steps=6, budget_share=0.3))


def shaken(model: hamts.HAMForecaster) -> hamts.HAMForecaster:
    """The same with weights that hide nothing by being 0 or 1, and its memories read anew."""
    network = model._fitted.network
    perturb(network, torch.Generator().manual_seed(3), size=0.1)
    for layer in network.backbone.layers():
        open_scratchpad(layer)
    calibrate_on(network, build_store(model._panel, patch_steps=model.config.patch_steps, extra_steps=0))
    again = type(model)(model._fitted, model._panel)
    remembered, *_ = again._read(rows_of(model), model._fitted.remembered.share, *asides_of(model))
    return type(model)(replace(model._fitted, remembered=remembered), model._panel)


def rows_of(model: hamts.HAMForecaster) -> pd.DataFrame:
    return rich_frames()["df"] if with_log(model) else sine_frame(items=2, steps=240)


def asides_of(model: hamts.HAMForecaster) -> tuple[Any, Any]:
    return (rich_frames()["static_df"], rich_frames()["events"]) if with_log(model) else (None, None)


def events_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Events of the log that lie in the hours of these rows."""
    log = rich_frames()["events"]
    hours = set(zip(rows["unique_id"], rows["ds"], strict=True))
    inside = [(each.unique_id, each.ds.floor("h")) in hours for each in log.itertuples()]
    return log[inside]


def begin(model: hamts.HAMForecaster, df: pd.DataFrame, steps: int, **options: Any) -> tuple[Stream, pd.DataFrame]:
    """A stream over the first rows of every item, and the other rows in the order of time."""
    early = df.groupby("unique_id").cumcount() < steps
    history = df[early]
    asides = {}
    if with_log(model):
        asides = {"static_df": rich_frames()["static_df"], "events": events_of(history)}
    return model.stream(history, **asides, **options), df[~early].sort_values(["ds", "unique_id"], kind="stable")


def feed(stream: Stream, rows: pd.DataFrame, sizes: Iterable[int]) -> None:
    """Update by frames of these sizes, over and over until the rows are used up."""
    at, turn = 0, list(sizes)
    while at < len(rows):
        for size in turn:
            part = rows.iloc[at : at + size]
            if len(part):
                stream.update(part, events=events_of(part) if with_log(stream.model) else None)
            at += size


def by_item(forecast: hamts.Forecast) -> dict[Any, np.ndarray]:
    return dict(zip(forecast.item_ids.tolist(), forecast.quantiles, strict=True))


def assert_like(one: dict[Any, np.ndarray], other: dict[Any, np.ndarray], *, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for item, quantiles in one.items():
        np.testing.assert_allclose(quantiles, other[item], rtol=tolerance, atol=tolerance)


def with_log(model: hamts.HAMForecaster) -> bool:
    return any(channel.from_log for channel in model.schema.channels)
