"""The result object: frames, quantiles, the mean and joint samples, on numbers that can be checked by hand."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest

from hamts.data.panel import Channel, Dialect, Frequency, Schema
from hamts.errors import DataError
from hamts.forecast import Asked, Forecast, quantile_mean, rank_paths, resolve_levels, values_at

matplotlib.use("Agg")

LEVELS = (0.01, 0.1, 0.5, 0.9, 0.99)


def make_forecast(
    *, items: int = 2, targets: tuple[str, ...] = ("y",), steps: int = 3, dialect: str = "nixtla", **changes: object
) -> Forecast:
    """Quantiles -10, -1, 0, 1, 10 about a level of 100 per item, 10 per target and 1 per step."""
    names = {"nixtla": ("unique_id", "ds"), "gluonts": ("item_id", "timestamp"), "wide": (None, "ds")}[dialect]
    schema = Schema(
        channels=tuple(Channel(name, "target") for name in targets),
        static=(),
        frequency=Frequency("calendar", "h", 24, 24),
        dialect=Dialect(dialect, names[0], names[1], "pandas"),  # type: ignore[arg-type]
    )
    level = (
        100.0 * np.arange(items)[:, None, None]
        + 10.0 * np.arange(len(targets))[:, None]
        + np.arange(steps, dtype=float)
    )  # [I, G, F]
    start = np.datetime64("2024-01-01T00", "ns")
    content = {
        "quantiles": level[..., None] + np.array([-10.0, -1.0, 0.0, 1.0, 10.0]),
        "levels": LEVELS,
        "item_ids": np.array([f"i{k}" for k in range(items)], dtype=object),
        "times": np.broadcast_to(start + np.arange(steps) * np.timedelta64(1, "h"), (items, steps)),
        "schema": schema,
        "asked": Asked((0.1, 0.5)),
    }
    return Forecast(**{**content, **changes})  # type: ignore[arg-type]


# --- frames


def test_the_frame_has_one_row_per_item_and_step_with_the_levels_asked_for() -> None:
    frame = make_forecast().df
    assert list(frame.columns) == ["unique_id", "ds", "HAM", "HAM_ql0.1", "HAM_ql0.5"]
    assert frame["unique_id"].tolist() == ["i0"] * 3 + ["i1"] * 3
    assert frame["HAM_ql0.1"].tolist() == [-1, 0, 1, 99, 100, 101]
    assert frame["HAM_ql0.5"].dtype == np.float64


def test_intervals_are_named_by_percent_widest_outside() -> None:
    asked = resolve_levels(None, [80, 98], default=(), trained=LEVELS)
    frame = make_forecast(asked=asked).df
    assert list(frame.columns)[3:] == ["HAM-lo-98", "HAM-lo-80", "HAM-hi-80", "HAM-hi-98"]
    assert frame.iloc[0, 3:].tolist() == [-10, -1, 1, 10]


def test_several_targets_stand_below_each_other_with_their_name() -> None:
    frame = make_forecast(targets=("a", "b"), items=1).df
    assert list(frame.columns)[:4] == ["unique_id", "target_name", "ds", "HAM"]
    assert frame["target_name"].tolist() == ["a"] * 3 + ["b"] * 3
    assert frame["HAM_ql0.5"].tolist() == [0, 1, 2, 10, 11, 12]


def test_a_wide_frame_is_answered_without_ids() -> None:
    frame = make_forecast(targets=("a", "b"), items=1, dialect="wide").df
    assert list(frame.columns) == ["target_name", "ds", "HAM", "HAM_ql0.1", "HAM_ql0.5"]


def test_the_gluonts_dialect_names_columns_by_the_level() -> None:
    frame = make_forecast(dialect="gluonts").df
    assert list(frame.columns) == ["item_id", "timestamp", "predictions", "0.1", "0.5"]


def test_one_forecast_speaks_both_dialects() -> None:
    forecast = make_forecast()
    assert list(forecast.to_fev().columns) == ["item_id", "timestamp", "predictions", "0.1", "0.5"]
    nixtla = make_forecast(targets=("a", "b"), dialect="gluonts").to_nixtla()
    assert list(nixtla.columns) == ["unique_id", "ds", "HAM", "HAM_ql0.1", "HAM_ql0.5"]
    assert nixtla["unique_id"].unique().tolist() == ["i0/a", "i0/b", "i1/a", "i1/b"]
    assert nixtla["HAM_ql0.5"].tolist() == [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]


def test_quantile_shows_other_levels_and_interpolates_between_trained_ones() -> None:
    forecast = make_forecast()
    assert list(forecast.quantile(0.3).columns) == ["unique_id", "ds", "HAM", "HAM_ql0.3"]
    assert forecast.quantile([0.3, 0.7])["HAM_ql0.3"].iloc[0] == pytest.approx(-0.5)


def test_the_repr_says_what_it_is() -> None:
    assert repr(make_forecast(targets=("a", "b"))) == "Forecast(2 items, targets ['a', 'b'], 3 steps)"


# --- levels


@pytest.mark.parametrize(
    ("quantiles", "level", "text"),
    [
        ([0.1], [80], "Got both"),
        ([0.0, 0.5], None, "between 0 and 1"),
        ([0.5, 0.5], None, "distinct"),
        ([], None, "distinct"),
        ([0.001], None, r"within the trained levels 0.01 to 0.99.*\n.*Fit with quantiles="),
        (None, [99.9], "within the trained levels"),
        (None, [0.8], "percent"),
        (None, [100], "percent"),
    ],
)
def test_wrong_levels_are_refused(quantiles: list[float] | None, level: list[float] | None, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        resolve_levels(quantiles, level, default=(0.5,), trained=LEVELS)
    assert caught.value.code == "E-QUANTILE"


def test_levels_come_in_any_order_and_a_single_number_is_enough() -> None:
    assert resolve_levels([0.9, 0.1], None, default=(), trained=LEVELS).quantiles == (0.1, 0.9)
    assert resolve_levels(None, 80, default=(), trained=LEVELS).quantiles == (0.1, 0.9)
    assert resolve_levels(None, None, default=(0.5,), trained=LEVELS).quantiles == (0.5,)


# --- mean and samples


def test_the_mean_is_that_of_the_quantile_function_with_flat_tails() -> None:
    levels = np.linspace(0, 1, 200_001)
    quantiles = np.array([-10.0, -1.0, 0.0, 3.0, 10.0])
    drawn = np.interp(levels, LEVELS, quantiles)
    # a mean over an even grid has the trapezoidal error of its kinks
    assert quantile_mean(quantiles, LEVELS) == pytest.approx(np.trapezoid(drawn, levels), abs=1e-4)


def test_samples_have_exactly_the_forecast_distribution_at_every_step() -> None:
    n = 40
    forecast = make_forecast(templates=np.random.default_rng(0).random((7, 1, 3)).astype(np.float32))
    frame = forecast.samples(n=n, seed=3)
    assert list(frame.columns) == ["unique_id", "ds", "sample_id", "HAM"]
    assert len(frame) == 2 * n * 3
    wanted = np.interp((np.arange(n) + 0.5) / n, LEVELS, [-10.0, -1.0, 0.0, 1.0, 10.0])
    for (item, stamp), rows in frame.groupby(["unique_id", "ds"]):
        level = 100 * int(item[1:]) + pd.Timestamp(stamp).hour
        np.testing.assert_allclose(np.sort(rows["HAM"]) - level, wanted, atol=1e-12)
        assert sorted(rows["sample_id"]) == list(range(n))


def test_samples_repeat_with_their_seed_and_differ_with_another() -> None:
    forecast = make_forecast(templates=np.random.default_rng(0).random((7, 1, 3)).astype(np.float32))
    pd.testing.assert_frame_equal(forecast.samples(9, seed=1), forecast.samples(9, seed=1))
    assert not forecast.samples(9, seed=1).equals(forecast.samples(9, seed=2))


def test_paths_hang_together_like_past_residuals() -> None:
    generator = np.random.default_rng(0)
    persistent = np.repeat(generator.random((64, 1, 1)), 5, axis=2)  # one rank through the whole window
    opposed = np.concatenate([persistent, 1 - persistent], axis=1).astype(np.float32)  # [64, 2, 5]
    ranks = rank_paths(opposed, n=500, targets=2, steps=5, generator=generator)
    assert (np.sort(ranks, axis=0) == np.arange(500)[:, None, None]).all()
    # a window is used eight times, so ranks agree up to those ties
    assert np.corrcoef(ranks[:, 0, 0], ranks[:, 0, 4])[0, 1] > 0.99
    assert np.corrcoef(ranks[:, 0, 0], ranks[:, 1, 0])[0, 1] < -0.99


def test_without_past_residuals_steps_are_drawn_apart() -> None:
    ranks = rank_paths(
        np.zeros((0, 1, 1), dtype=np.float32), n=2000, targets=1, steps=2, generator=np.random.default_rng(0)
    )
    assert abs(np.corrcoef(ranks[:, 0, 0], ranks[:, 0, 1])[0, 1]) < 0.1


def test_unobserved_parts_of_a_window_are_drawn_at_random() -> None:
    templates = np.full((4, 1, 2), np.nan, dtype=np.float32)
    ranks = rank_paths(templates, n=50, targets=1, steps=2, generator=np.random.default_rng(0))
    assert (np.sort(ranks, axis=0) == np.arange(50)[:, None, None]).all()


def test_a_longer_horizon_takes_the_ranks_of_one_horizon_before() -> None:
    templates = np.random.default_rng(0).random((50, 1, 2)).astype(np.float32)
    ranks = rank_paths(templates, n=50, targets=1, steps=4, generator=np.random.default_rng(1))
    np.testing.assert_array_equal(ranks[:, :, :2], ranks[:, :, 2:])


def test_sampled_values_never_leave_the_outermost_quantiles() -> None:
    values = values_at(
        np.array([[[-10.0, -1.0, 0.0, 1.0, 10.0]]]), LEVELS, np.array([1e-9, 0.5, 1 - 1e-9])[:, None, None]
    )
    assert values.ravel().tolist() == [-10.0, 0.0, 10.0]


def test_a_number_of_samples_below_one_is_refused() -> None:
    with pytest.raises(DataError, match="n must be at least 1"):
        make_forecast().samples(0)


# --- picture


def test_a_forecast_draws_itself_after_its_history() -> None:
    stamps = pd.date_range("2023-12-31", periods=24, freq="h")
    history = pd.DataFrame({"unique_id": "i1", "ds": stamps, "y": np.arange(24.0)})
    axes = make_forecast().plot(history, item="i1")
    assert axes.get_lines()
    matplotlib.pyplot.close("all")
