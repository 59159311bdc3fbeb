"""What a forecaster refuses, and what it chooses where nothing was said."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model_frames import irregular_frame, quick, sine_frame

import hamts
from hamts.data.cutoffs import cutoff_steps, first_observed, truncate
from hamts.data.frame import to_panel
from hamts.data.frequency import make_frequency
from hamts.errors import DataError, DataWarning
from hamts.fitting import channel_units, probability_levels, validation_tail
from hamts.resolve import choose_horizon, choose_patch_steps


@pytest.mark.parametrize("h", [0, -3, 1.5, True, "24"])
def test_a_horizon_must_be_a_whole_number_above_zero(sine: hamts.HAMForecaster, h: Any) -> None:
    for call in (
        lambda: quick(sine_frame(), h),
        lambda: sine.predict(h=h),
        lambda: sine.future_frame(h),
        lambda: sine.cross_validation(sine_frame(), h),
        lambda: sine.evaluate(sine_frame(), h),
    ):
        with pytest.raises(DataError, match="h must be a whole number of steps") as caught:
            call()
        assert caught.value.code == "E-HORIZON"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"preset": "huge"}, "Unknown preset 'huge'.*base.*small.*tiny"),
        ({"router": "oracle"}, "Unknown router 'oracle'"),
        ({"budget_share": 1.5}, r"budget_share must lie in \[0, 1\]"),
        ({"patch_steps": 0}, "patch_steps must be a whole number, at least 1"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"max_time": -1}, "max_time must be above 0"),
        ({"half_life_steps": 0}, "half_life_steps must be above 0"),
        ({"val_size": -1}, "val_size must be"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        quick(sine_frame(), **options)
    assert caught.value.code == "E-OPTION"


def bad_frames() -> dict[str, tuple[str, pd.DataFrame]]:
    df = sine_frame(items=2, steps=60)
    silent = df.assign(y=np.where(df["unique_id"] == "i1", np.nan, df["y"]))
    return {
        "a missing column": ("E-COLUMNS", df.drop(columns=["y"])),
        "a repeated row": ("E-DUP", pd.concat([df, df.iloc[:1]])),
        "an infinite value": ("E-INF", df.assign(y=np.where(df.index == 3, np.inf, df["y"]))),
        "an item without values": ("E-ALLNAN", silent),
        "an item of one row": ("E-SHORT", df.iloc[:61]),
        "no rows": ("E-EMPTY", df.iloc[:0]),
    }


@pytest.mark.parametrize("what", sorted(bad_frames()))
def test_bad_frames_are_refused_before_anything_is_fitted(what: str) -> None:
    code, df = bad_frames()[what]
    with pytest.raises(DataError) as caught:
        quick(df)
    assert caught.value.code == code
    assert caught.value.fix


def test_a_target_among_the_covariates_is_a_leak() -> None:
    with pytest.raises(DataError, match="Target 'y' is also listed in futr_cols") as caught:
        quick(sine_frame(), target="y", futr_cols=["y"])
    assert caught.value.code == "E-LEAK"


def test_missing_future_rows_are_named_with_the_way_out(rich: hamts.HAMForecaster, rich_data: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"must be known ahead.*\n.*future_frame\(24\)"):
        rich.predict()
    with pytest.raises(DataError, match="1 of 72 are missing") as caught:
        rich.predict(futr_df=rich_data["futr_df"].iloc[1:])
    assert caught.value.code == "E-FUTURE"
    assert "'s0'" in caught.value.rows[0]


def test_predict_refuses_what_it_cannot_forecast(sine: hamts.HAMForecaster) -> None:
    df = sine_frame(items=2, steps=60)
    with pytest.raises(DataError, match="column 'y' of fit") as caught:
        sine.predict(df.drop(columns=["y"]))
    assert caught.value.code == "E-SCHEMA"
    silent = df.assign(y=np.where(df["unique_id"] == "i1", np.nan, df["y"]))
    with pytest.raises(DataError, match="at least one value in a target") as caught:
        sine.predict(silent)
    assert caught.value.series == ["i1"]
    with pytest.raises(DataError, match="quantiles and level say the same thing"):
        sine.predict(quantiles=[0.5], level=[80])
    with pytest.raises(DataError, match=r"budget_share must lie in \[0, 1\]"):
        sine.predict(budget_share=2)
    with pytest.raises(DataError, match="static_df and events belong to df"):
        sine.predict(events=df)


def test_numbers_that_are_none_are_refused(sine: hamts.HAMForecaster) -> None:
    weight = sine._fitted.network.head.project.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    try:
        with pytest.raises(DataError, match="values that are not numbers, first at step 1") as caught:
            sine.predict()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert (caught.value.code, caught.value.column, caught.value.series) == ("E-NUMERIC", "y", "i0")


def test_sizes_beyond_what_can_be_computed_are_refused(sine: hamts.HAMForecaster) -> None:
    huge = sine_frame(items=1, steps=60)
    huge.loc[3, "y"] = 1e150
    for call in (lambda: quick(huge, 6), lambda: sine.predict(huge)):
        with pytest.raises(DataError, match=r"smaller than 1e\+100. Column 'y' has 1e\+150") as caught:
            call()
        assert caught.value.code == "E-RANGE"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        with pytest.raises(DataError, match="E-HORIZON-MEM"):
            sine.predict(h=5_000_000)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_units_of_measurement_of_any_size_will_do(size: float) -> None:
    df = sine_frame(items=1, steps=120)
    plain, scaled = quick(df, 6).predict(), quick(df.assign(y=df["y"] * size), 6).predict()
    np.testing.assert_allclose(scaled.quantiles / size, plain.quantiles, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("alias", "length", "h", "patch"),
    [
        ("h", 10_000, 24, 12),
        ("h", 10_000, 6, 6),
        ("h", 10_000, 1, 4),
        ("h", 200, 24, 4),
        ("15min", 10_000, 96, 24),
        ("D", 2000, 7, 7),
        ("ME", 600, 12, 6),
        ("ME", 144, 12, 3),
        ("W-SUN", 2000, 52, 13),
        ("YE-DEC", 40, 10, 1),
        ("1", 5000, 12, 8),
    ],
)
def test_patches_are_about_half_a_season(alias: str, length: int, h: int, patch: int) -> None:
    assert choose_patch_steps(make_frequency(alias), np.array([length]), h) == patch


def test_the_default_horizon_is_one_season() -> None:
    assert choose_horizon(make_frequency("h"), np.array([500])) == 24
    assert choose_horizon(make_frequency("YE-DEC"), np.array([500])) == 12
    assert choose_horizon(make_frequency("YE-DEC"), np.array([20])) == 5


def test_the_validation_tail_lies_behind_the_training_rows() -> None:
    lengths = np.array([1000, 300, 20])
    tail = validation_tail(lengths, h=24, patch_steps=12, val_size=None)
    assert tail.ends.tolist() == [900, 270, 20]
    for end, length, cuts in zip(tail.ends, lengths, tail.cutoffs, strict=True):
        assert (cuts >= end).all()
        assert (cuts + 24 <= length).all()
    assert [len(cuts) for cuts in tail.cutoffs] == [24, 7, 0]
    assert validation_tail(lengths, h=24, patch_steps=12, val_size=200).ends.tolist() == [800, 100, 20]
    assert validation_tail(lengths, h=24, patch_steps=12, val_size=0.2).ends.tolist() == [800, 240, 20]
    assert validation_tail(lengths, h=24, patch_steps=12, val_size=0).ends.tolist() == lengths.tolist()


def test_validation_is_spread_over_many_items() -> None:
    tail = validation_tail(np.full(1000, 200), h=10, patch_steps=5, val_size=None)
    counts = np.array([len(cuts) for cuts in tail.cutoffs])
    assert counts.sum() == 48
    assert counts.max() == 1
    assert len({int(cuts[0]) for cuts in tail.cutoffs if len(cuts)}) > 5


def test_units_come_from_training_rows_only() -> None:
    df = sine_frame(items=2, steps=100)
    panel = to_panel(df)
    ends = np.array([80, 80])
    other = panel.values.copy()
    other[80:100] *= 1000
    units = channel_units(panel, ends)
    changed = channel_units(type(panel)(**{**vars(panel), "values": other}), ends)
    np.testing.assert_array_equal(units, changed)
    wanted = np.median([df["y"].iloc[k : k + 80].std(ddof=0) for k in (0, 100)])
    np.testing.assert_allclose(units, [wanted])


def test_levels_of_the_truth_are_those_of_a_piecewise_linear_distribution() -> None:
    quantiles = np.broadcast_to(np.array([0.0, 1.0, 3.0]), (5, 3))
    truth = np.array([-1.0, 0.5, 2.0, 4.0, np.nan])
    np.testing.assert_allclose(
        probability_levels(quantiles, truth, (0.1, 0.5, 0.9)), [0.05, 0.3, 0.7, 0.95, np.nan], rtol=1e-12
    )


def test_a_truncated_panel_is_the_panel_of_fewer_rows() -> None:
    df = sine_frame(items=3, steps=50)
    part = truncate(to_panel(df), np.array([20, 0, 50]))
    wanted = to_panel(
        df[((df["unique_id"] == "i0") & (df.groupby("unique_id").cumcount() < 20)) | (df["unique_id"] == "i2")]
    )
    np.testing.assert_array_equal(part.values, wanted.values)
    np.testing.assert_array_equal(part.offsets, wanted.offsets)
    assert part.item_ids.tolist() == ["i0", "i2"]


def test_cutoffs_count_the_steps_up_to_and_with_their_time() -> None:
    panel = to_panel(sine_frame(items=1, steps=50))
    counts = cutoff_steps(panel, ["2024-01-01 02:00", "2024-01-01 02:30", "2023-12-31"])
    assert [each.tolist() for each in counts] == [[3]]
    with pytest.raises(DataError, match="have no zone"):
        cutoff_steps(panel, [pd.Timestamp("2024-01-01", tz="UTC")])
    irregular = to_panel(irregular_frame(), irregular="native")
    stamp = irregular_frame()["ds"].iloc[10]
    assert cutoff_steps(irregular, [stamp])[0].tolist() == [11]


def test_the_first_observed_step_of_a_target_is_found() -> None:
    df = sine_frame(items=2, steps=20)
    df.loc[df.index[:4], "y"] = np.nan
    assert first_observed(to_panel(df)).ravel().tolist() == [4, 0]
