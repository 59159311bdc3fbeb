"""A stream gives what one pass over all rows gives, however they were split, saved or ordered on the way (law 2)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from model_frames import rich_frames, sine_frame
from streams import assert_like, begin, by_item, events_of, feed, plain_model, rich_model

import hamts
from hamts.nn.tokens import map_tensors
from hamts.stream import Stream

# one rounding of float32 is 6e-8; a few hundred of them meet in a forecast
SINGLE, DOUBLE = 1e-5, 1e-10


def whole_pass(model: hamts.HAMForecaster) -> dict[Any, np.ndarray]:
    frames = rich_frames()
    del frames["df"]
    return by_item(model.predict(rich_frames()["df"], 24, **frames))


def in_double(model: hamts.HAMForecaster) -> hamts.HAMForecaster:
    """The same model in float64; buffers that are float64 already stay."""
    network = copy.deepcopy(model._fitted.network).double()
    remembered = model._fitted.remembered
    memory = map_tensors(remembered.memory, lambda t: t.double() if t.is_floating_point() else t)
    fitted = replace(model._fitted, network=network, remembered=replace(remembered, memory=memory))
    return type(model)(fitted, None)


@pytest.mark.parametrize("sizes", [[1], [7, 1, 50], [10_000]])
def test_any_split_of_the_rows_gives_the_forecasts_of_one_pass(sizes: list[int]) -> None:
    model, frames = rich_model(), rich_frames()
    stream, rest = begin(model, frames["df"], 150)
    feed(stream, rest, sizes)
    assert_like(by_item(stream.forecast(24, frames["futr_df"])), whole_pass(model), tolerance=SINGLE)


def test_in_double_precision_the_difference_is_rounding() -> None:
    model, frames = in_double(rich_model()), rich_frames()
    stream, rest = begin(model, frames["df"], 150)
    feed(stream, rest, [13])
    assert_like(by_item(stream.forecast(24, frames["futr_df"])), whole_pass(model), tolerance=DOUBLE)


def test_the_same_steps_are_kept_as_in_one_pass() -> None:
    model, frames = rich_model(), rich_frames()
    stream, rest = begin(model, frames["df"], 100)
    feed(stream, rest, [17])
    whole, _ = begin(model, frames["df"], 10_000)
    names = ["unique_id", "channel", "ds_start", "layers", "reason", "status"]
    mine, theirs = (each.routes().sort_values(names, ignore_index=True) for each in (stream, whole))
    assert set(mine["status"]) == {"kept", "pending"} and set(mine["reason"]) == {"tag", "score"}
    assert mine[names].equals(theirs[names])


def test_saving_and_loading_on_the_way_changes_nothing() -> None:
    model, frames = rich_model(), rich_frames()
    stream, rest = begin(model, frames["df"], 150)
    other, _ = begin(model, frames["df"], 150)
    for at in range(0, len(rest), 41):
        part = rest.iloc[at : at + 41]
        stream.update(part, events=events_of(part))
        other.update(part, events=events_of(part))
        arrays, meta = stream.state()
        stream = Stream.from_state(model, arrays, json.loads(json.dumps(meta)))
        assert stream.state_hash() == other.state_hash()
    one, two = (by_item(each.forecast(24, frames["futr_df"])) for each in (stream, other))
    assert_like(one, two, tolerance=0.0)


def test_items_may_come_in_any_order_and_be_added_in_any() -> None:
    model, df = plain_model(), sine_frame(items=3, steps=120)
    stream, rest = begin(model, df, 60)
    feed(stream, rest, [9])
    other = model.stream(df[(df["unique_id"] == "i2")].head(60))
    other.add(df[df["unique_id"] != "i2"].groupby("unique_id").head(60))
    feed(other, rest.sort_values(["unique_id", "ds"], ascending=[False, True]), [60])
    assert other.item_ids != stream.item_ids
    assert_like(by_item(stream.forecast(12)), by_item(other.forecast(12)), tolerance=SINGLE)


def test_a_saved_model_goes_on_where_its_rows_ended(tmp_path: Any) -> None:
    model, frames = rich_model(), rich_frames()
    model.save(tmp_path / "model")
    stream = hamts.load(tmp_path / "model").stream()
    assert_like(
        by_item(stream.forecast(24, frames["futr_df"])),
        by_item(model.predict(None, 24, frames["futr_df"])),
        tolerance=0.0,
    )
    ahead = frames["futr_df"].assign(temperature=0.5)
    nothing = rich_frames()["events"].iloc[:0]
    stream.update(ahead, events=nothing)
    longer = stream.forecast(1, futr_df=_next(frames["futr_df"]))
    whole, rest = begin(model, frames["df"], 200)
    feed(whole, rest, [23])
    whole.update(ahead, events=nothing)
    assert_like(by_item(longer), by_item(whole.forecast(1, futr_df=_next(frames["futr_df"]))), tolerance=SINGLE)


def _next(ahead: Any) -> Any:
    """Known-ahead values of the hour after the last of these."""
    last = ahead.groupby("unique_id").tail(1)
    return last.assign(ds=last["ds"] + np.timedelta64(1, "h"))


def test_a_forecast_disturbs_nothing_also_in_the_middle_of_a_patch() -> None:
    model, df = plain_model(), sine_frame(items=2, steps=100)
    stream, rest = begin(model, df, 50)
    for size in (1, 2, 5, 6):
        stream.update(rest.iloc[:size])
        rest = rest.iloc[size:]
        before = stream.state_hash()
        first = stream.forecast(12).quantiles
        np.testing.assert_array_equal(stream.forecast(12).quantiles, first)
        assert stream.state_hash() == before


def test_items_that_other_items_are_dropped_beside_stay_what_they_are() -> None:
    model, df = plain_model(), sine_frame(items=3, steps=100)
    stream, rest = begin(model, df, 60)
    alone, _ = begin(model, df[df["unique_id"] == "i2"], 60)
    stream.drop(["i0"])
    mine = rest[rest["unique_id"] != "i0"]
    feed(stream, mine, [5])
    feed(alone, mine[mine["unique_id"] == "i2"], [3])
    assert stream.item_ids == ["i1", "i2"]
    assert_like(by_item(stream.forecast(12, items=["i2"])), by_item(alone.forecast(12)), tolerance=SINGLE)
    with pytest.raises(hamts.DataError, match="E-ITEM"):
        stream.forecast(12, items=["i0"])


def test_gaps_advance_the_clock_as_missing_rows_do() -> None:
    model, df = plain_model(), sine_frame(items=2, steps=160)
    holes = df.drop(index=df.index[(df.groupby("unique_id").cumcount() // 20 % 3) == 1])
    stream, rest = begin(model, holes, 40)
    feed(stream, rest, [1])
    assert stream.stats()["gap_steps"] > 30
    assert_like(by_item(stream.forecast(12)), by_item(model.predict(holes, 12)), tolerance=SINGLE)


def test_the_leaves_of_a_memory_come_back_to_the_bit() -> None:
    model, df = plain_model(), sine_frame(items=2, steps=100)
    stream, rest = begin(model, df, 60)
    feed(stream, rest, [4])
    arrays, meta = stream.state()
    again, _ = Stream.from_state(model, arrays, meta).state()
    assert arrays.keys() == again.keys()
    for name, array in arrays.items():
        one, two = (torch.as_tensor(each) for each in (array, again[name]))
        assert torch.equal(one.nan_to_num(7e7), two.nan_to_num(7e7)), name
