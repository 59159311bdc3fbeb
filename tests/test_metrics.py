"""Scores equal the same formulas written out as loops, and never count what was not observed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamts.metrics import (
    DECILES,
    climatology_quantiles,
    paired_interval,
    row_losses,
    score,
    seasonal_naive,
    seasonal_scale,
)

LEVELS = (0.01, 0.025, 0.05, *DECILES, 0.95, 0.975, 0.99)
R, F = 7, 5


def example(rng: np.random.Generator) -> dict:
    """Forecasts with sorted quantiles for rows with gaps, and a row in which nothing was observed."""
    actual = rng.normal(size=(R, F)).cumsum(axis=1)
    actual[rng.random((R, F)) < 0.2] = np.nan
    actual[3] = np.nan
    quantiles = np.sort(rng.normal(size=(len(LEVELS), R, F)), axis=0)
    return {
        "actual": actual,
        "quantile_forecasts": dict(zip(LEVELS, quantiles, strict=True)),
        "mean": rng.normal(size=(R, F)),
    }


def loop_score(actual: np.ndarray, quantiles: dict, mean: np.ndarray, scale: np.ndarray) -> dict[str, float]:
    """The definitions, one cell at a time."""
    cells = [(r, f) for r in range(R) for f in range(F) if not math.isnan(actual[r, f])]
    scaled = [(r, f) for r, f in cells if scale[r] > 0]

    def interval_score(r: int, f: int) -> float:
        low, high, y = quantiles[0.025][r, f], quantiles[0.975][r, f], actual[r, f]
        return high - low + 40 * max(low - y, 0) + 40 * max(y - high, 0)

    def pinball(r: int, f: int, level: float) -> float:
        error = actual[r, f] - quantiles[level][r, f]
        return 2 * (level * error if error > 0 else (level - 1) * error)

    weight = sum(abs(actual[r, f]) for r, f in cells)
    weighted = [sum(pinball(r, f, level) for r, f in cells) / weight for level in DECILES]
    return {
        "MSE": sum((actual[r, f] - mean[r, f]) ** 2 for r, f in cells) / len(cells),
        "MAE": sum(abs(actual[r, f] - quantiles[0.5][r, f]) for r, f in cells) / len(cells),
        "MASE": sum(abs(actual[r, f] - quantiles[0.5][r, f]) / scale[r] for r, f in scaled) / len(scaled),
        "MSIS": sum(interval_score(r, f) / scale[r] for r, f in scaled) / len(scaled),
        "weighted_quantile_loss": sum(weighted) / len(weighted),
        "coverage[0.3]": sum(actual[r, f] <= quantiles[0.3][r, f] for r, f in cells) / len(cells),
        "coverage[80%]": sum(quantiles[0.1][r, f] <= actual[r, f] <= quantiles[0.9][r, f] for r, f in cells)
        / len(cells),
        "observed": len(cells),
    }


def test_scores_equal_the_definitions_written_as_loops(rng: np.random.Generator) -> None:
    case = example(rng)
    scale = np.array([0.5, 1.0, 2.0, 1.0, 0.0, np.nan, 3.0])
    found = score(**case, seasonal_error=scale)
    expected = loop_score(case["actual"], case["quantile_forecasts"], case["mean"], scale)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_row_losses_weighted_by_their_cells_give_the_scores(rng: np.random.Generator) -> None:
    case = example(rng)
    scale = np.arange(1.0, R + 1)
    found, rows = score(**case, seasonal_error=scale), row_losses(**case, seasonal_error=scale)
    known = rows["observed"] > 0
    assert np.isnan(rows["MAE"][~known]).all()
    for name in ("MSE", "MAE", "MASE"):
        assert np.average(rows[name][known], weights=rows["observed"][known]) == pytest.approx(found[name], rel=1e-12)
    loss = np.average(rows["quantile_loss"][known], weights=rows["observed"][known])
    assert loss / np.nanmean(np.abs(case["actual"])) == pytest.approx(found["weighted_quantile_loss"], rel=1e-12)


def test_what_stands_where_nothing_was_observed_changes_no_score(rng: np.random.Generator) -> None:
    case = example(rng)
    before = score(**case, seasonal_error=np.ones(R))
    gaps = np.isnan(case["actual"])
    case["mean"][gaps] = np.inf
    for values in case["quantile_forecasts"].values():
        values[gaps] = np.nan
    assert score(**case, seasonal_error=np.ones(R)) == before


def test_scores_do_not_depend_on_the_order_of_rows_and_callers_arrays_stay_as_they_are(
    rng: np.random.Generator,
) -> None:
    case = example(rng)
    copies = {level: values.copy() for level, values in case["quantile_forecasts"].items()}
    turned = {
        "actual": case["actual"][::-1],
        "quantile_forecasts": {level: values[::-1] for level, values in case["quantile_forecasts"].items()},
        "mean": case["mean"][::-1],
    }
    scale = np.arange(1.0, R + 1)
    assert score(**turned, seasonal_error=scale[::-1]) == pytest.approx(score(**case, seasonal_error=scale), rel=1e-12)
    assert all((case["quantile_forecasts"][level] == values).all() for level, values in copies.items())


def test_a_forecast_of_the_truth_scores_zero_and_covers_everything() -> None:
    actual = np.arange(1.0, 11).reshape(2, 5)
    found = score(
        actual, quantile_forecasts=dict.fromkeys(LEVELS, actual), mean=actual, insample=[actual[0]] * 2, season_steps=1
    )
    assert {found[name] for name in ("MASE", "MSE", "MAE", "weighted_quantile_loss", "MSIS")} == {0.0}
    assert {value for name, value in found.items() if name.startswith("coverage")} == {1.0}


def test_without_observations_quantiles_or_scale_a_score_is_nan_not_a_number() -> None:
    nothing = np.full((2, 3), np.nan)
    found = score(nothing, quantile_forecasts={0.1: nothing, 0.9: nothing}, mean=nothing, seasonal_error=np.ones(2))
    assert found.pop("observed") == 0
    assert all(math.isnan(value) for value in found.values())
    ones = np.ones((2, 3))
    found = score(ones, quantile_forecasts={0.5: ones}, mean=ones, seasonal_error=np.zeros(2))
    assert found["MAE"] == 0
    assert all(math.isnan(found[name]) for name in ("MASE", "MSIS", "weighted_quantile_loss"))
    zeros = np.zeros((2, 3))
    found = score(zeros, quantile_forecasts=dict.fromkeys(DECILES, ones), mean=ones, seasonal_error=np.ones(2))
    assert math.isnan(found["weighted_quantile_loss"])
    assert found["MASE"] == 1


def test_a_level_is_found_in_spite_of_rounding() -> None:
    ones = np.ones((1, 1))
    found = score(ones, quantile_forecasts={1 - 0.9: ones, 0.3 * 3: ones}, mean=ones, seasonal_error=np.ones(1))
    assert {"coverage[0.1]", "coverage[0.9]", "coverage[80%]"} <= found.keys()


def test_forecasts_that_cannot_be_scored_are_refused_with_the_rows() -> None:
    ones, gap = np.ones((2, 3)), np.array([[1.0, 1, 1], [1, np.nan, 1]])
    with pytest.raises(ValueError, match=r"Rows \[1\]"):
        score(ones, quantile_forecasts={0.5: gap}, mean=ones, seasonal_error=np.ones(2))
    with pytest.raises(ValueError, match="shape"):
        score(ones, quantile_forecasts={0.5: ones[:1]}, mean=ones, seasonal_error=np.ones(2))
    with pytest.raises(ValueError, match="insample"):
        score(ones, quantile_forecasts={0.5: ones}, mean=ones)
    with pytest.raises(ValueError, match="one history"):
        score(ones, quantile_forecasts={0.5: ones}, mean=ones, insample=[ones[0]])
    with pytest.raises(ValueError, match="one value"):
        score(ones, quantile_forecasts={0.5: ones}, mean=ones, seasonal_error=np.ones(3))


# --- scale and baselines


def test_seasonal_scale_equals_gluonts_where_nothing_is_missing(rng: np.random.Generator) -> None:
    from gluonts.ev.ts_stats import seasonal_error

    history = rng.normal(size=50)
    for season_steps in (1, 7, 24, 80):
        assert seasonal_scale(history, season_steps) == pytest.approx(seasonal_error(history, season_steps)[0])


def test_seasonal_scale_counts_observed_pairs_only() -> None:
    assert seasonal_scale(np.array([1.0, np.nan, 4.0, 5.0, np.nan, 9.0]), 2) == pytest.approx((3 + 4) / 2)
    assert math.isnan(seasonal_scale(np.array([1.0, np.nan, 2.0]), 1))
    assert math.isnan(seasonal_scale(np.array([1.0]), 24))
    assert math.isnan(seasonal_scale(np.array([]), 1))


def loop_naive(history: np.ndarray, season_steps: int, h: int) -> np.ndarray:
    forecasts = np.full(h, np.nan)
    for step in range(h):
        same_phase = [t for t in range(len(history)) if (len(history) + step - t) % season_steps == 0]
        for times in (range(len(history)), same_phase):
            for t in times:
                if not math.isnan(history[t]):
                    forecasts[step] = history[t]
    return forecasts


@given(
    history=st.lists(st.floats(-9, 9) | st.just(math.nan), max_size=30),
    season_steps=st.integers(1, 9),
    h=st.integers(0, 20),
)
def test_seasonal_naive_repeats_the_last_observed_value_of_each_phase(
    history: list[float], season_steps: int, h: int
) -> None:
    found = seasonal_naive(np.array(history), season_steps=season_steps, h=h)
    np.testing.assert_array_equal(found, loop_naive(np.array(history), season_steps, h))


def test_seasonal_naive_of_many_series_is_that_of_each(rng: np.random.Generator) -> None:
    history = rng.normal(size=(2, 3, 40))
    history[rng.random(history.shape) < 0.5] = np.nan
    together = seasonal_naive(history, season_steps=12, h=30)
    assert together.shape == (2, 3, 30)
    for i in range(2):
        for c in range(3):
            np.testing.assert_array_equal(together[i, c], seasonal_naive(history[i, c], season_steps=12, h=30))


def test_climatology_gives_the_quantiles_of_each_phase() -> None:
    history = np.array([0.0, 10, 1, np.nan, 2, 30, np.nan, 20])
    phases = np.arange(8) % 2
    found = climatology_quantiles(history, phases=phases, future_phases=np.array([1, 0, 1]), levels=(0.0, 0.5, 1.0))
    np.testing.assert_allclose(found, [[10, 20, 30], [0, 1, 2], [10, 20, 30]])
    never = climatology_quantiles(history, phases=phases, future_phases=np.array([7]), levels=(0.5,))
    assert never == pytest.approx(np.nanmedian(history))
    assert np.isnan(climatology_quantiles(history * np.nan, phases=phases, future_phases=phases, levels=(0.5,))).all()


# --- comparing two forecasts


def test_the_interval_of_a_difference_holds_the_truth_about_as_often_as_it_says(rng: np.random.Generator) -> None:
    hits = []
    for seed in range(150):
        # neighbouring cutoffs and the three items of a cutoff err together
        shared = np.convolve(rng.normal(size=121), [0.7, 0.7], "valid")
        loss_a = 5 + 0.3 + shared[:, None] + 0.5 * rng.normal(size=(120, 3))
        low, high = paired_interval(
            loss_a.ravel(), np.full(360, 5.0), seed=seed, cutoffs=np.repeat(np.arange(120), 3), draws=300
        )[1:]
        hits.append(low <= 0.3 <= high)
    # 90 % is asked for; blocks of finite length cover a little less, and 150 trials leave 0.05 of noise
    assert 0.78 <= np.mean(hits) <= 0.97


def test_the_difference_is_the_mean_over_rows_and_pairs_with_a_gap_do_not_count() -> None:
    loss_a, loss_b = np.array([1.0, 2, np.nan, 4, 5, 9, 9, 9]), np.array([0.0, 0, 0, np.nan, 1, 8, 8, 8])
    difference, low, high = paired_interval(loss_a, loss_b, seed=0)
    assert difference == pytest.approx(np.mean([1, 2, 4, 1, 1, 1]))
    assert low <= difference <= high


def test_the_interval_depends_on_the_seed_alone_and_not_on_the_order_of_rows(rng: np.random.Generator) -> None:
    loss_a, loss_b, cutoffs = rng.normal(size=60), rng.normal(size=60), np.repeat(np.arange(20), 3)
    order = rng.permutation(60)
    first = paired_interval(loss_a, loss_b, seed=1, cutoffs=cutoffs)
    assert paired_interval(loss_a, loss_b, seed=1, cutoffs=cutoffs) == first
    assert paired_interval(loss_a[order], loss_b[order], seed=1, cutoffs=cutoffs[order]) == pytest.approx(first)
    assert paired_interval(loss_a, loss_b, seed=2, cutoffs=cutoffs) != first


def test_too_few_cutoffs_say_nothing() -> None:
    assert paired_interval(np.array([3.0]), np.array([1.0]), seed=0) == (2.0, -math.inf, math.inf)
    assert paired_interval(np.ones(6), np.zeros(6), seed=0, cutoffs=np.zeros(6)) == (1.0, -math.inf, math.inf)
    nothing = paired_interval(np.array([np.nan]), np.array([1.0]), seed=0)
    assert math.isnan(nothing[0])
    assert nothing[1:] == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="cutoffs"):
        paired_interval(np.ones(3), np.ones(3), seed=0, cutoffs=np.zeros(2))
