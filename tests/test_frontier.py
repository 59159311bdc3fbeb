"""The frontier: one network under every budget, scored window by window.

X windows · G targets · F future steps
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from model_frames import quick, sine_frame

import hamts
from hamts.cli import main
from hamts.data.patches import build_store
from hamts.errors import DataError
from hamts.frontier import Losses, interval, measure_points, pareto, windows_at
from hamts.plot_frontier import save_frontier

SHARES = (0.0, 0.3, 1.0)


@functools.cache
def frame() -> pd.DataFrame:
    return sine_frame(items=2, steps=220)


@functools.cache
def model() -> hamts.HAMForecaster:
    return quick(frame(), 6, router="surprise", patch_steps=3, max_steps=3)


@functools.cache
def table() -> pd.DataFrame:
    return model().frontier(frame(), shares=SHARES, memories=("model", "random"), n_windows=3)


def test_one_row_for_each_budget_and_memory_and_none_where_nothing_is_kept() -> None:
    rows = table()[["memory", "budget_share"]].to_records(index=False).tolist()
    assert rows == [("model", 0.0), ("model", 0.3), ("random", 0.3), ("model", 1.0), ("random", 1.0)]


def test_more_budget_takes_more_bytes_and_more_attention() -> None:
    own = table()[table()["memory"] == "model"]
    for column in ("usage_share", "bytes", "scratchpad_bytes", "scratchpad_attention"):
        assert own[column].is_monotonic_increasing, column
    nothing = own.iloc[0]
    assert nothing["usage_share"] == nothing["scratchpad_bytes"] == nothing["scratchpad_attention"] == 0
    # window, state and normaliser are the same at every budget
    rest = own["bytes"] - own["scratchpad_bytes"]
    assert rest.nunique() == 1
    assert (own["scratchpad_attention"] <= 1).all()
    assert (table()[["ms_per_step", "ms_per_forecast"]] > 0).all().all()


def test_scores_are_those_of_evaluate() -> None:
    wanted = model().evaluate(frame(), n_windows=3, against=[], budget_share=0.3).iloc[0]
    got = table()[(table()["memory"] == "model") & (table()["budget_share"] == 0.3)].iloc[0]
    for column in ("WQL", "MASE", "usage_share", "bytes"):
        assert got[column] == pytest.approx(wanted[column], rel=1e-9)


def test_intervals_hold_the_score_and_the_same_seed_gives_the_same() -> None:
    for score in ("WQL", "MASE"):
        assert (table()[f"{score}_low"] <= table()[score]).all()
        assert (table()[score] <= table()[f"{score}_high"]).all()
    again = model().frontier(frame(), shares=(0.3,), n_windows=3)
    for column in ("WQL", "WQL_low", "WQL_high"):
        assert again[column].iloc[0] == table()[column].iloc[1]


def test_an_interval_is_that_of_the_windows_chosen() -> None:
    losses = Losses(
        quantile=np.array([1.0, 1.0, 3.0, 3.0, 100.0]), size=np.ones(5), scaled=np.ones(5), rows=np.arange(5)
    )
    chosen = np.array([True, True, True, True, False])
    low, high = interval(losses, chosen, "WQL")
    assert losses.wql(chosen) == 2.0
    assert 1.0 <= low < 2.0 < high <= 3.0
    assert np.isnan(interval(losses, np.arange(5) == 4, "WQL")).all()


def test_no_point_of_the_front_is_beaten() -> None:
    cost, error = np.array([1.0, 2.0, 2.0, 3.0, 4.0]), np.array([5.0, 3.0, 4.0, 3.0, np.nan])
    assert pareto(cost, error).tolist() == [True, True, False, False, False]


def test_windows_may_be_at_other_moments_of_each_item() -> None:
    fitted = model()._fitted
    panel = model()._panel_of(frame(), None, None)
    windows = windows_at(panel, 6, [np.array([100, 50, 215]), np.array([], dtype=np.int64)])
    # in order of time; the last would end beyond the item
    assert windows.cuts.tolist() == [50, 100]
    assert windows.left_out == 1
    np.testing.assert_array_equal(windows.actual[1, 0], panel.item(0)[100:106, 0])
    point = measure_points(fitted, panel, windows, shares=(0.3,), timed=())[0]
    assert np.isnan(point.ms_per_step)
    assert point.losses.rows.tolist() == [0, 1]
    with pytest.raises(DataError, match="No window of 6 steps fits"):
        windows_at(panel, 6, [np.array([218]), np.array([0])])


def test_a_rival_is_one_point_and_has_no_controls() -> None:
    rival = quick(frame(), 6, mixer="window", patch_steps=3, budget_bytes=20_000)
    rows = rival.frontier(frame(), n_windows=2)
    assert rows["memory"].tolist() == ["model"]
    assert rows["scratchpad_bytes"].iloc[0] > 0
    with pytest.raises(DataError, match="mixer 'window' has none"):
        rival.frontier(frame(), n_windows=2, memories=["model", "random"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shares": [0.1, 2.0]}, "shares must lie"), ({"memories": ["mode"]}, r"memories must be of .*'shuffled'")],
)
def test_bad_options_are_answered(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model().frontier(frame(), n_windows=1, **options)


def test_the_command_writes_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model().save(tmp_path / "model")
    frame().to_csv(tmp_path / "rows.csv", index=False)
    out, picture = tmp_path / "front.csv", tmp_path / "front.png"
    words = ["frontier", str(tmp_path / "model"), "--data", str(tmp_path / "rows.csv"), "--shares", "0,0.5"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--windows", "2", "--out", str(out), "--plot", str(picture)])
    assert not ended.value.code
    rows = pd.read_csv(out)
    assert rows["budget_share"].tolist() == [0.0, 0.5]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(out)])
    assert ended.value.code == 2
    with pytest.raises(DataError, match="x must be one of"):
        save_frontier(rows, picture, x="memory")


# --- several budgets at once


@pytest.mark.parametrize(("seed", "threshold"), [(0, "fixed"), (2, "fixed"), (0, "quantile")])
def test_budgets_read_side_by_side_give_what_each_gives_alone(
    monkeypatch: pytest.MonkeyPatch, seed: int, threshold: str
) -> None:
    from hamts import frontier

    tagged = sine_frame(items=2, steps=200).assign(event=lambda rows: (np.arange(len(rows)) % 37 == 0).astype(float))
    options: dict[str, Any] = {"event_cols": ["event"], "patch_steps": 3, "max_steps": 2}
    fitted = quick(tagged, 6, router="surprise+tags", routing={"threshold": threshold}, **options)
    panel = fitted._panel_of(tagged, None, None)
    windows = windows_at(panel, 6, [np.array([60, 100, 150]), np.array([90, 100])])
    asked: Any = {"shares": (0.0, 0.1, 0.3, 1.0), "memories": ("model", "random", "shuffled", "recency"), "timed": ()}
    asked["seed"] = seed
    alone = measure_points(fitted._fitted, panel, windows, **asked)
    groups, controls = frontier._groups, frontier.Histories.read_controls
    monkeypatch.setattr(frontier, "_groups", lambda shares, side_by_side: groups(shares, side_by_side=True))
    monkeypatch.setattr(
        frontier.Histories, "read_controls", lambda self, asked, side_by_side: controls(self, asked, side_by_side=True)
    )
    together = measure_points(fitted._fitted, panel, windows, **asked)
    assert len(alone) == len(together) == 13
    for one, two in zip(alone, together, strict=True):
        assert (one.memory, one.budget_share, one.usage_share) == (two.memory, two.budget_share, two.usage_share)
        assert one.bytes == two.bytes
        assert one.scratchpad_attention == pytest.approx(two.scratchpad_attention, abs=1e-6)
        np.testing.assert_allclose(one.losses.quantile, two.losses.quantile, rtol=1e-4)


def test_controls_may_be_measured_at_fewer_budgets() -> None:
    panel = model()._panel_of(frame(), None, None)
    windows = windows_at(panel, 6, [np.array([100]), np.array([100])])
    points = measure_points(
        model()._fitted, panel, windows, shares=SHARES, memories=("model", "random"), control_shares=(0.3,),
        timed=("model",),
    )  # fmt: skip
    assert [(point.memory, point.budget_share) for point in points] == [
        ("model", 0.0), ("model", 0.3), ("random", 0.3), ("model", 1.0)
    ]  # fmt: skip
    assert [np.isfinite(point.ms_per_step) for point in points] == [True, True, False, True]


def test_forecasts_that_wait_for_one_another_are_those_made_at_once() -> None:
    from hamts.evaluation import policies_for
    from hamts.rollout import roll

    fitted = model()._fitted
    panel = model()._panel_of(frame(), None, None)
    store = build_store(panel, patch_steps=3, extra_steps=0, time_unit=1.0)
    cutoffs = [np.array([50, 51, 90, 140, 200]), np.array([70, 90, 91])]
    results = [
        roll(
            fitted.network, store, cutoffs=cutoffs, steps=6, policies=policies_for(fitted.network, "model", 0.3),
            held_bytes=held,
        )
        for held in (0, 40_000, 2**30)
    ]  # fmt: skip
    for result in results[1:]:
        np.testing.assert_allclose(result.quantiles, results[0].quantiles, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.scale, results[0].scale, rtol=1e-12)
