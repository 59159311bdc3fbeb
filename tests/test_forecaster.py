"""From a frame to a forecast, on models that are fitted here in seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fitted import CLOSE, apart
from model_frames import ROLES, irregular_frame, quick, rich_frames, sine_frame

import hamts
from hamts.config import MemoryConfig, ModelConfig
from hamts.data.cutoffs import truncate
from hamts.data.frame import to_panel
from hamts.data.panel import Panel
from hamts.data.patches import build_store, irregular_unit
from hamts.errors import DataError, DataWarning
from hamts.evaluation import Spent, policies_for
from hamts.fitting import panel_spec
from hamts.reader import HAMNetwork
from hamts.remembered import horizon_store, read_panel


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
