"""From a frame to a forecast and its scores, on models that are fitted here in seconds."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from model_frames import ROLES, irregular_frame, quick, rich_frames, sine_frame

import hamts
from hamts.config import MemoryConfig, ModelConfig
from hamts.data.cutoffs import cutoff_steps, first_observed, truncate
from hamts.data.frame import to_panel
from hamts.data.frequency import make_frequency
from hamts.data.panel import Panel
from hamts.data.patches import build_store, irregular_unit
from hamts.errors import DataError, DataWarning
from hamts.evaluation import Spent, policies_for, seasonal_errors
from hamts.fitting import channel_units, panel_spec, probability_levels, validation_tail
from hamts.metrics import seasonal_scale
from hamts.reader import HAMNetwork
from hamts.remembered import horizon_store, read_panel
from hamts.resolve import choose_horizon, choose_patch_steps

# one rounding of float32 in the forecast, in units of its scale
CLOSE = 2e-5


@pytest.fixture(scope="module")
def sine() -> hamts.HAMForecaster:
    return hamts.fit(sine_frame(), preset="tiny", max_steps=90, batch_windows=24, verbose=False, progress=False)


@pytest.fixture(scope="module")
def rich_data() -> dict[str, Any]:
    return rich_frames()


@pytest.fixture(scope="module")
def rich(rich_data: dict[str, Any]) -> hamts.HAMForecaster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return hamts.fit(
            rich_data["df"], preset="tiny", max_steps=6, events=rich_data["events"], static_df=rich_data["static_df"],
            verbose=False, **ROLES,
        )  # fmt: skip


def apart(one: hamts.Forecast, other: hamts.Forecast) -> float:
    """Largest difference of two forecasts in units of the width of the first."""
    width = one.quantiles[..., -1] - one.quantiles[..., 0]
    return float((np.abs(one.quantiles - other.quantiles).max(-1) / width).max())


# --- fit


def test_a_tiny_fit_beats_the_last_value_on_a_noisy_sine(sine: hamts.HAMForecaster) -> None:
    df = sine_frame(steps=640)
    windows = sine.cross_validation(df, n_windows=8, quantiles=[0.5])
    last = df.set_index(["unique_id", "ds"])["y"]
    naive = last.loc[list(zip(windows["unique_id"], windows["cutoff"], strict=True))].to_numpy()
    error, naive_error = np.abs(windows["y"] - windows["HAM_ql0.5"]).mean(), np.abs(windows["y"] - naive).mean()
    assert error < 0.5 * naive_error


def test_fit_says_what_it_resolved_and_the_word_that_changes_it(capsys: pytest.CaptureFixture[str]) -> None:
    quick(sine_frame(items=1, steps=120).assign(x=1.5), verbose=True, progress=True)
    said = capsys.readouterr().out
    assert "target = ['y'] (change with target=)" in said
    assert "past_cols = ['x'] (change with past_cols=)" in said
    assert "h = 24 (one season of 24 steps at 'h'; change with h=)" in said
    assert "patch_steps = " in said
    assert "budget_share = 0.1 (" in said


def test_nothing_is_printed_when_silence_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    quick(sine_frame(items=1, steps=120))
    assert capfd.readouterr().out == ""


def test_fit_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    wanted = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    quick(sine_frame(items=1, steps=120))
    assert torch.equal(torch.rand(3), wanted[0])
    assert (np.random.rand(3) == wanted[1]).all()


def test_both_words_for_an_argument_work_but_not_together(sine: hamts.HAMForecaster) -> None:
    model = quick(sine_frame(items=1, steps=120), prediction_length=6, quantile_levels=[0.2, 0.8])
    assert model.h == 6
    assert model.quantiles == (0.2, 0.8)
    assert len(sine.predict(prediction_length=5, quantile_levels=[0.3]).df) == 10
    with pytest.raises(DataError, match="prediction_length is another word for h"):
        quick(sine_frame(), 6, prediction_length=6)
    with pytest.raises(DataError, match="quantile_levels is another word for quantiles"):
        sine.predict(quantiles=[0.5], quantile_levels=[0.5])


def test_options_of_fit_reach_the_network() -> None:
    model = quick(
        sine_frame(items=1, steps=200), 12, patch_steps=6, window_patches=3, half_life_steps=50, router="surprise+tags",
        budget_share=0.3, budget_bytes=100_000, quantiles=[0.005, 0.5], seed=3,
    )  # fmt: skip
    assert (model.config.patch_steps, model.config.window_patches, model.config.router) == (6, 3, "surprise+tags")
    assert model.config.half_life_steps == (50.0, 200.0, 800.0)
    assert model.config.quantiles[0] == 0.005
    assert list(model.predict().df.columns) == ["unique_id", "ds", "HAM", "HAM_ql0.005", "HAM_ql0.5"]


def test_the_repr_and_properties_say_what_was_fitted(sine: hamts.HAMForecaster) -> None:
    assert repr(sine).startswith("HAMForecaster(targets=[y], items=2, h=24, freq='h', usage_share=0.")
    assert sine.schema.targets == ("y",)
    assert isinstance(sine.config, ModelConfig)
    assert 0 < sine.usage_share < 0.3
    assert sine.report.steps == 90


# --- predict


def test_predicting_from_memory_equals_replaying_the_history(
    sine: hamts.HAMForecaster, rich: hamts.HAMForecaster, rich_data: dict[str, Any]
) -> None:
    assert apart(sine.predict(), sine.predict(sine_frame())) < CLOSE
    future = rich_data["futr_df"]
    given = {name: rich_data[name] for name in ("events", "static_df")}
    stored, replayed = rich.predict(futr_df=future), rich.predict(rich_data["df"], futr_df=future, **given)
    assert apart(stored, replayed) < CLOSE
    pd.testing.assert_frame_equal(
        stored.df[["unique_id", "target_name", "ds"]], replayed.df[["unique_id", "target_name", "ds"]]
    )


def test_every_role_gap_and_length_gives_a_finite_forecast_in_the_callers_zone(
    rich: hamts.HAMForecaster, rich_data: dict[str, Any]
) -> None:
    frame = rich.predict(futr_df=rich_data["futr_df"]).df
    assert list(frame.columns)[:4] == ["unique_id", "target_name", "ds", "HAM"]
    assert len(frame) == 3 * 2 * 24
    assert np.isfinite(frame.iloc[:, 3:].to_numpy()).all()
    assert frame["ds"].dtype == rich_data["df"]["ds"].dtype
    ends = rich_data["df"].groupby("unique_id")["ds"].max()
    first = frame.groupby("unique_id")["ds"].min()
    assert (first - ends == pd.Timedelta("1h")).all()


def test_target_columns_of_the_future_frame_are_never_read(
    rich: hamts.HAMForecaster, rich_data: dict[str, Any]
) -> None:
    future = rich_data["futr_df"]
    other = future.assign(load=np.inf, price="nonsense")
    bare = future.drop(columns=["load", "price"])
    wanted = rich.predict(futr_df=future).quantiles
    for frame in (other, bare):
        assert np.array_equal(rich.predict(futr_df=frame).quantiles, wanted)


def test_what_is_known_ahead_is_read(rich: hamts.HAMForecaster, rich_data: dict[str, Any]) -> None:
    future = rich_data["futr_df"]
    changed = future.assign(valve=1.0 - future["valve"])
    assert not np.array_equal(rich.predict(futr_df=changed).quantiles, rich.predict(futr_df=future).quantiles)


def test_the_callers_frames_are_left_as_they_were(rich: hamts.HAMForecaster) -> None:
    given = rich_frames()
    kept = {name: frame.copy(deep=True) for name, frame in given.items()}
    rich.predict(given["df"], futr_df=given["futr_df"], events=given["events"], static_df=given["static_df"])
    quick(given["df"], events=given["events"], static_df=given["static_df"], **ROLES)
    for name, frame in given.items():
        pd.testing.assert_frame_equal(frame, kept[name])


def test_quantiles_never_cross_and_the_mean_lies_inside(rich: hamts.HAMForecaster, rich_data: dict[str, Any]) -> None:
    forecast = rich.predict(futr_df=rich_data["futr_df"])
    assert (np.diff(forecast.quantiles, axis=-1) >= 0).all()
    assert (forecast.quantiles[..., 0] <= forecast.mean).all()
    assert (forecast.mean <= forecast.quantiles[..., -1]).all()
    assert forecast.quantiles.dtype == np.float64


def test_an_item_alone_is_forecast_as_among_others_and_in_any_order(sine: hamts.HAMForecaster) -> None:
    df = sine_frame(items=3)
    together = sine.predict(df)
    for k in range(3):
        alone = sine.predict(df[df["unique_id"] == f"i{k}"])
        np.testing.assert_allclose(alone.quantiles[0], together.quantiles[k], rtol=CLOSE, atol=CLOSE)
    shuffled = sine.predict(df.sample(frac=1, random_state=0))
    order = [together.item_ids.tolist().index(item) for item in shuffled.item_ids]
    np.testing.assert_allclose(shuffled.quantiles, together.quantiles[order], rtol=CLOSE, atol=CLOSE)


def test_shift_and_scale_of_a_target_shift_and_scale_its_forecast(sine: hamts.HAMForecaster) -> None:
    df = sine_frame()
    plain = sine.predict(df)
    moved = sine.predict(df.assign(y=7 * df["y"] - 300))
    width = plain.quantiles[..., -1:] - plain.quantiles[..., :1]
    assert (np.abs((moved.quantiles + 300) / 7 - plain.quantiles) / width).max() < 1e-3


def test_a_new_item_is_forecast_from_its_history(sine: hamts.HAMForecaster) -> None:
    df = sine_frame(items=1, steps=60).assign(unique_id="new")
    frame = sine.predict(df, h=3).df
    assert frame["unique_id"].unique().tolist() == ["new"]
    assert np.isfinite(frame["HAM"]).all()


def test_a_history_of_one_row_is_enough(sine: hamts.HAMForecaster) -> None:
    assert np.isfinite(sine.predict(sine_frame(items=1, steps=1)).quantiles).all()


def test_a_longer_horizon_than_fitted_is_noted(sine: hamts.HAMForecaster) -> None:
    with pytest.warns(DataWarning, match="W-HORIZON: 30 steps were asked for, .* fitted to forecast 24"):
        forecast = sine.predict(h=30)
    assert forecast.quantiles.shape[2] == 30
    assert forecast.notes[-1].startswith("W-HORIZON")
    np.testing.assert_allclose(forecast.quantiles[:, :, :24], sine.predict().quantiles, rtol=CLOSE, atol=CLOSE)


def test_another_budget_replays_the_rows_of_the_fit(sine: hamts.HAMForecaster) -> None:
    stored, replayed = sine.predict(budget_share=1.0), sine.predict(sine_frame(), budget_share=1.0)
    assert apart(stored, replayed) < CLOSE
    assert not np.array_equal(stored.quantiles, sine.predict().quantiles)


def test_the_future_frame_is_what_predict_asks_for(rich: hamts.HAMForecaster, rich_data: dict[str, Any]) -> None:
    frame = rich.future_frame()
    assert list(frame.columns) == ["unique_id", "ds"]
    filled = frame.merge(rich_data["futr_df"], on=["unique_id", "ds"], how="left", validate="1:1")
    assert np.array_equal(rich.predict(futr_df=filled).quantiles, rich.predict(futr_df=rich_data["futr_df"]).quantiles)


def test_samples_have_the_quantiles_of_the_forecast(sine: hamts.HAMForecaster) -> None:
    forecast = sine.predict(h=4)
    paths = forecast.samples(n=399, seed=1)
    median = paths.groupby(["unique_id", "ds"])["HAM"].median().to_numpy()
    np.testing.assert_allclose(median, forecast.quantile(0.5)["HAM_ql0.5"].to_numpy(), rtol=1e-9)


def test_a_target_that_an_item_never_had_is_answered_with_missing_values() -> None:
    df = sine_frame(items=2, steps=150).assign(z=lambda f: np.where(f["unique_id"] == "i0", np.nan, f["y"]))
    with pytest.warns(DataWarning, match="W-ALLNAN"):
        model = quick(df, target=["y", "z"])
    frame = model.predict().df.set_index(["unique_id", "target_name"])
    assert frame.loc[("i0", "z"), "HAM"].isna().all()
    assert frame.drop(index=("i0", "z"))["HAM"].notna().all()


# --- memory


def test_reported_bytes_are_those_of_the_live_tensors(sine: hamts.HAMForecaster) -> None:
    frame = sine.memory_bytes()
    assert list(frame.columns) == ["unique_id", "scratchpad", "state", "window", "normaliser", "rows", "total"]
    assert (frame.drop(columns=["unique_id", "total"]).sum(axis=1) == frame["total"]).all()
    layer = sine._fitted.remembered.memory.layers[0]
    D, H, K = 32, 2, 16
    assert frame["state"].iloc[0] == 4 * (H * K * K + 3 * 3 * D + 2 * H)
    assert frame["scratchpad"].tolist() == (layer.scratchpad.alive.sum(1) * layer.scratchpad.bytes_per_entry()).tolist()


def test_a_memory_of_no_steps_and_of_all_steps_are_what_they_say(sine: hamts.HAMForecaster) -> None:
    network = sine._fitted.network
    none, full = policies_for(network, "none", 0.1)[0], policies_for(network, "full", 0.1)[0]
    assert (float(none.share), none.use_tags) == (0.0, False)
    assert (float(full.share), full.cap_kept, full.cap_must) == (1.0, None, None)
    usage = np.array([[0.2, 0.4]])
    random = policies_for(network, "random", 0.1, spent=Spent(usage, [torch.tensor([3, 4])]), seed=1)[0]
    np.testing.assert_allclose(random.share.numpy(), usage[0], rtol=1e-6)
    assert random.control is not None and random.control.kind == "random"
    with pytest.raises(DataError, match=r"memory must be one of .*Got 'some'"):
        policies_for(network, "some", 0.1)


def panels_with_a_future() -> list[tuple[Panel, np.ndarray]]:
    """Panels cut where tags lie in the unfinished patch and the plan changes at once, and the values cut off."""
    given = rich_frames()
    whole = to_panel(given["df"], events=given["events"], static_df=given["static_df"], **ROLES)
    loose = to_panel(irregular_frame(), irregular="native")
    answer = []
    # the fault of s0 is at its step 130; the valve of s1 turns at its step 150; s2 ends on the border of a patch
    for panel, ends in ((whole, np.array([132, 150, 127])), (loose, np.array([100, 60]))):
        steps = np.arange(9)
        future = np.stack([panel.item(i)[end + steps] for i, end in enumerate(ends)])  # [I, F, C]
        future[:, :, panel.schema.indices("target", "past")] = np.nan
        answer.append((truncate(panel, ends), future))
    return answer


@pytest.mark.filterwarnings("ignore::hamts.DataWarning")
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_kept_of_a_history_gives_the_horizon_that_its_rows_give(which: int) -> None:
    panel, future = panels_with_a_future()[which]
    P, unit = (12, 1.0) if which == 0 else (1, irregular_unit(panel))
    config = ModelConfig(width=8, heads=2, layers=1, patch_steps=P)
    network = HAMNetwork(config, MemoryConfig(), panel_spec(panel))
    remembered, _ = read_panel(network, panel, network.policy(torch.ones(1)), share=1.0, time_unit=unit)
    short = horizon_store(network, remembered, panel.schema, future, unit)
    full = build_store(panel, patch_steps=P, extra_steps=9, future=future, time_unit=unit)
    items, cutoffs = torch.arange(panel.n_items), torch.from_numpy(panel.lengths)
    reveal = torch.ones(panel.n_items, dtype=torch.bool)
    kept, wanted = (vars(store.horizon(items, cutoffs, 9, reveal)) for store in (short, full))
    assert which == 1 or kept["tags"].any()
    assert which == 1 or (kept["event_offset"] > 0).any()
    # patches that only some items of a batch need lie behind the horizon of the others
    needed = kept["horizon"].any(-1)
    for name, value in wanted.items():
        if value.dim() >= 2 and name not in ("static_values", "static_codes"):
            axis = 1 if name in ("calendar", "present", "position", "elapsed", "horizon") else 2
            for item in range(panel.n_items):
                rows = needed[item].nonzero()[:, 0]
                torch.testing.assert_close(
                    kept[name][item].index_select(axis - 1, rows),
                    value[item].index_select(axis - 1, rows),
                    rtol=1e-6, atol=1e-6, equal_nan=True,
                )  # fmt: skip
        else:
            torch.testing.assert_close(kept[name], value)


# --- cross-validation and evaluation


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


# --- dialects and clocks


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


# --- bad input


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


# --- defaults


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


# --- moments in a history


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
