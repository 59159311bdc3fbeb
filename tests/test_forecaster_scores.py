"""Cross-validation and scores of a fitted forecaster, and the dialects and clocks it answers in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from fitted import CLOSE, apart
from model_frames import irregular_frame, quick, sine_frame

import hamts
from hamts.errors import DataError, DataWarning
from hamts.evaluation import seasonal_errors
from hamts.metrics import seasonal_scale


def test_windows_before_a_target_was_ever_seen_are_missing_and_not_scored(sine: hamts.HAMForecaster) -> None:
    df = sine_frame(items=1, steps=200)
    df.loc[df.index[:100], "y"] = np.nan
    stamps = [df["ds"].iloc[60], df["ds"].iloc[150]]
    frame = sine.cross_validation(df, h=8, cutoffs=stamps)
    assert frame["HAM"].isna().tolist() == [True] * 8 + [False] * 8
    scores = sine.evaluate(df, h=8, cutoffs=stamps)
    assert scores["MAE"].notna().all()


def test_cross_validation_equals_predicting_at_that_cutoff(
    rich: hamts.HAMForecaster, rich_data: dict[str, Any]
) -> None:
    df, log = rich_data["df"], rich_data["events"]
    # inside a patch, and the valve turns in the horizon
    cutoff = df["ds"].sort_values().unique()[131]
    windows = rich.cross_validation(
        df, h=12, cutoffs=[cutoff], quantiles=[0.1, 0.5], events=log, static_df=rich_data["static_df"]
    )
    before, after = df[df["ds"] <= cutoff], df[df["ds"] > cutoff]
    forecast = rich.predict(
        before, h=12, futr_df=after.drop(columns=["holiday"]), events=log[log["ds"] <= cutoff],
        static_df=rich_data["static_df"], quantiles=[0.1, 0.5],
    ).df  # fmt: skip
    keys = ["unique_id", "target_name", "ds"]
    pd.testing.assert_frame_equal(windows[keys], forecast[keys])
    for column in ("HAM", "HAM_ql0.1", "HAM_ql0.5"):
        np.testing.assert_allclose(windows[column], forecast[column], rtol=1e-5, atol=1e-4)


def test_cross_validation_gives_the_last_windows_with_their_outcome(sine: hamts.HAMForecaster) -> None:
    df = sine_frame()
    frame = sine.cross_validation(df, h=6, n_windows=3, step_size=5, level=[80])
    assert list(frame.columns) == ["unique_id", "ds", "cutoff", "y", "HAM", "HAM-lo-80", "HAM-hi-80"]
    assert len(frame) == 2 * 3 * 6
    merged = frame.merge(df, on=["unique_id", "ds"], suffixes=("", "_true"))
    assert (merged["y"] == merged["y_true"]).all()
    own = frame[frame["unique_id"] == "i0"]
    assert own["cutoff"].unique().tolist() == [df["ds"].iloc[399 - back] for back in (16, 11, 6)]
    assert (own.groupby("cutoff")["ds"].min() - own["cutoff"].unique() == pd.Timedelta("1h")).all()


def test_cutoffs_can_be_named_by_time(sine: hamts.HAMForecaster) -> None:
    frame = sine.cross_validation(sine_frame(), h=4, cutoffs=["2024-01-10 03:00", "2024-01-12"])
    assert frame["cutoff"].unique().tolist() == [pd.Timestamp("2024-01-10 03:00"), pd.Timestamp("2024-01-12")]


def test_items_too_short_for_a_window_are_left_out_and_named(sine: hamts.HAMForecaster) -> None:
    df = pd.concat([sine_frame(items=1), sine_frame(items=1, steps=10).assign(unique_id="short")])
    with pytest.warns(DataWarning, match="W-SHORT: 1 items have no complete window of 24"):
        frame = sine.cross_validation(df)
    assert frame["unique_id"].unique().tolist() == ["i0"]
    with pytest.raises(DataError, match="No item has one: the longest has 10 steps"):
        sine.cross_validation(sine_frame(items=1, steps=10))


def test_refitting_sees_only_rows_before_each_cutoff() -> None:
    df = sine_frame(items=2, steps=150)
    model = quick(df, 6)
    frame = model.cross_validation(df, n_windows=2, refit=True)
    late = df["ds"] > df["ds"].max() - pd.Timedelta("6h")
    other = model.cross_validation(df.assign(y=np.where(late, -50.0, df["y"])), n_windows=2, refit=True)
    assert (frame["HAM"] == other["HAM"]).all()
    assert (frame["y"] != other["y"]).any()
    assert not (frame["HAM"] == model.cross_validation(df, n_windows=2)["HAM"]).all()


def test_evaluate_has_one_row_per_method_with_its_scores_and_costs(sine: hamts.HAMForecaster) -> None:
    df = sine_frame()
    frame = sine.evaluate(df, n_windows=4).set_index("method")
    assert frame.index.tolist() == ["HAM", "seasonal_naive", "no_memory", "full_memory", "random_memory"]
    assert list(frame.columns) == [
        "MASE", "MSE", "MAE", "WQL", "MSIS", "coverage_80", "coverage_95", "usage_share", "bytes",
    ]  # fmt: skip
    assert frame.loc["no_memory", "usage_share"] == 0
    assert frame.loc["full_memory", "usage_share"] == 1
    assert frame.loc["random_memory", "usage_share"] == pytest.approx(frame.loc["HAM", "usage_share"], abs=0.05)
    order = frame.loc[["no_memory", "HAM", "full_memory"], "bytes"].tolist()
    assert order == sorted(order)
    assert len(set(order)) == 3
    assert frame["MASE"].notna().all()
    assert frame.loc["seasonal_naive", ["MSIS", "coverage_80", "bytes"]].isna().all()
    windows = sine.cross_validation(df, n_windows=4, quantiles=[0.5])
    assert frame.loc["HAM", "MAE"] == pytest.approx(np.abs(windows["y"] - windows["HAM_ql0.5"]).mean(), rel=1e-6)


def test_evaluate_by_target_and_item(rich: hamts.HAMForecaster, rich_data: dict[str, Any]) -> None:
    given = {name: rich_data[name] for name in ("events", "static_df")}
    frame = rich.evaluate(rich_data["df"], n_windows=2, against=["no_memory"], by="target", **given)
    assert frame[["method", "target_name"]].to_numpy().tolist() == [
        ["HAM", "load"], ["HAM", "price"], ["no_memory", "load"], ["no_memory", "price"],
    ]  # fmt: skip
    by_item = rich.evaluate(rich_data["df"], n_windows=2, against=[], by="item", **given)
    assert by_item["unique_id"].tolist() == ["s0", "s1", "s2"]
    with pytest.raises(DataError, match="by must be None, 'target', 'item' or 'group'"):
        rich.evaluate(rich_data["df"], by="day", **given)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="against must be a list of .*no_memory"):
        rich.evaluate(rich_data["df"], against=["lstm"], **given)


def test_seasonal_errors_of_many_cutoffs_equal_those_of_each_history() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 2))
    values[rng.random(values.shape) < 0.2] = np.nan
    cuts = np.array([1, 2, 5, 7, 8, 20, 50])
    wanted = [[seasonal_scale(values[:cut, g], 7) for g in range(2)] for cut in cuts]
    np.testing.assert_allclose(seasonal_errors(values, cuts, 7), wanted, rtol=1e-12)


def test_polars_in_polars_out() -> None:
    df = pl.from_pandas(sine_frame(items=2, steps=150))
    model = quick(df, 6)
    for frame in (
        model.predict().df,
        model.cross_validation(df),
        model.evaluate(df, n_windows=1),
        model.memory_bytes(),
        model.predict().samples(3),
    ):
        assert isinstance(frame, pl.DataFrame)
    assert model.predict().df["ds"].dtype == df["ds"].dtype


def test_the_answer_comes_in_the_library_of_the_history(sine: hamts.HAMForecaster) -> None:
    df = sine_frame()
    asked = sine.predict(pl.from_pandas(df)).df
    assert isinstance(asked, pl.DataFrame)
    assert asked["unique_id"].dtype == pl.String
    np.testing.assert_allclose(asked["HAM"].to_numpy(), sine.predict(df).df["HAM"], rtol=1e-12)


def test_the_gluonts_dialect_is_answered_in_kind() -> None:
    df = sine_frame(items=2, steps=150).rename(columns={"unique_id": "item_id", "ds": "timestamp", "y": "target"})
    model = quick(df, 6)
    assert list(model.predict().df.columns) == ["item_id", "timestamp", "predictions", "0.1", "0.5", "0.9"]
    assert list(model.cross_validation(df, quantiles=[0.5]).columns) == [
        "item_id", "timestamp", "cutoff", "target", "predictions", "0.5",
    ]  # fmt: skip


def test_a_wide_frame_is_one_item_of_several_targets() -> None:
    df = sine_frame(items=2, steps=150).pivot(index="ds", columns="unique_id", values="y")
    model = quick(df, 6)
    frame = model.predict().df
    assert list(frame.columns) == ["target_name", "ds", "HAM", "HAM_ql0.1", "HAM_ql0.5", "HAM_ql0.9"]
    assert frame["target_name"].unique().tolist() == ["i0", "i1"]
    assert apart(model.predict(), model.predict(df)) < CLOSE


def test_an_integer_clock_goes_on_counting() -> None:
    df = pd.DataFrame({"unique_id": 7, "ds": np.arange(0, 300, 2), "y": np.sin(np.arange(150.0))})
    model = quick(df)
    frame = model.predict().df
    assert model.h == 12
    assert frame["ds"].tolist() == list(range(300, 324, 2))
    assert frame["unique_id"].dtype == df["unique_id"].dtype
    assert model.cross_validation(df, h=3, cutoffs=[100])["ds"].tolist() == [102, 104, 106]


def test_irregular_rows_are_read_one_by_one_and_go_on_by_their_typical_gap() -> None:
    df = irregular_frame()
    model = quick(df, 4, irregular="native")
    assert model.config.patch_steps == 1
    forecast = model.predict()
    assert apart(forecast, model.predict(df)) < CLOSE
    own = df[df["unique_id"] == "b"]["ds"]
    wanted = own.iloc[-1] + own.diff().median() * np.arange(1, 5)
    assert (np.abs(forecast.df["ds"].iloc[4:] - wanted) < pd.Timedelta("1us")).all()
    alone = model.predict(df[df["unique_id"] == "b"])
    np.testing.assert_allclose(alone.quantiles[0], forecast.quantiles[1], rtol=1e-4, atol=1e-4)
    frame = model.cross_validation(df, n_windows=2)
    assert set(frame["ds"]) <= set(df["ds"])
