"""What is made while the caller is in ``torch.inference_mode()`` or ``torch.no_grad()`` works as well outside of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_frames import quick, sine_frame
from streams import assert_like, begin, by_item, feed, plain_model, rich_frames, rich_model, rows_of

import hamts

Mode = Callable[[], Any]
MODES = [pytest.param(torch.inference_mode, id="inference_mode"), pytest.param(torch.no_grad, id="no_grad")]


@pytest.mark.parametrize("store", ["padded", "paged"])
@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_was_made_in_a_mode_goes_on_outside_and_inside(mode: Mode, store: str) -> None:
    model = plain_model()
    plain, rows = begin(model, rows_of(model), 120, store=store)
    with mode():
        stream, _ = begin(model, rows_of(model), 120, store=store)
    for turn in range(4):
        part = rows.iloc[turn * 40 : (turn + 1) * 40]
        plain.update(part)
        if turn % 2:
            with mode():
                stream.update(part)
        else:
            stream.update(part)
    assert stream.state_hash() == plain.state_hash()
    assert_like(by_item(stream.forecast(12)), by_item(plain.forecast(12)), tolerance=0.0)


@pytest.mark.parametrize("store", ["padded", "paged"])
def test_every_write_of_a_stream_made_in_inference_mode_works_outside(store: str, tmp_path: Path) -> None:
    model = plain_model()
    df = rows_of(model)
    with torch.inference_mode():
        stream, rows = begin(model, df, 120, store=store)
        stream.update(rows.iloc[:60])
        stream.spill(tmp_path, [stream.item_ids[0]])
    first, second = sorted(stream.item_ids)
    times = df["ds"].unique()
    stream.update(rows.iloc[60:120])
    stream.pin((times[100], times[110]), "seen", item=first)
    stream.forget((times[130], times[140]), item=second)
    stream.add(df[df["unique_id"] == first].assign(unique_id="new"))
    stream.drop([second])
    with torch.inference_mode():
        again = hamts.Stream.from_state(model, *stream.state())
    assert again.state_hash() == stream.state_hash()
    again.update(rows[rows["unique_id"] == first].iloc[60:90])


def test_a_stream_of_every_role_that_was_made_in_inference_mode_goes_on_outside() -> None:
    model = rich_model()
    with torch.inference_mode():
        stream, rows = begin(model, rich_frames()["df"], 100)
    before = len(stream.routes())
    feed(stream, rows.iloc[:60], [60])
    assert len(stream) and len(stream.routes()) >= before


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_in_a_mode_learns_what_a_fit_outside_learns(mode: Mode, tmp_path: Path) -> None:
    df = sine_frame(items=1, steps=120)
    plain = quick(df, 12)
    with mode():
        model = quick(df, 12)
        model.save(tmp_path / "model")
        loaded = hamts.load(tmp_path / "model")
        inside = loaded.predict()
    assert not any(x.is_inference() for each in (model, loaded) for x in each._fitted.network.state_dict().values())
    for forecast in (inside, model.predict(), loaded.predict()):
        np.testing.assert_array_equal(forecast.quantiles, plain.predict().quantiles)
