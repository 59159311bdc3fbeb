"""Scores around events, rolling forecasts of labelled sets, transfer on disk, and the report's panels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hamts
from hamts.errors import DataError
from probes import real_run
from probes.adapter import ROLLING_LEVELS, HamtsAdapter
from probes.api import load_report, run_probes
from probes.cli import main
from probes.contract import CONTRACT_VERSION
from probes.events import EventForecasts, event_scores, exceedance, quantile_crps, threshold_weighted
from probes.frames import ProbeFromFrame
from probes.plots import lines_svg, ticks
from probes.real import RealResult, edit_test
from probes.real_run import RealPlan, naive_rolling, read_real, run_real, training_part
from probes.real_table import crossed_interval, real_table
from probes.report import html_report
from probes.report_panels import crossover
from probes.suites.cfr import effect_by_tau
from probes.transfer import TransferPlan, run_transfer

torch.set_num_threads(1)
LEVELS = ROLLING_LEVELS


def normal_quantiles(mean: np.ndarray, spread: float) -> dict[float, np.ndarray]:
    scores = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
    return {level: mean + spread * score for level, score in zip(LEVELS, scores, strict=True)}


# --- scores


def test_crps_of_a_point_is_its_absolute_error() -> None:
    actual = np.array([[1.0, 4.0], [np.nan, 2.0]])
    guess = np.array([[2.0, 2.0], [0.0, 2.5]])
    found = quantile_crps(actual, {0.5: guess})
    assert found[0].tolist() == pytest.approx([1.0, 2.0])
    assert math.isnan(found[1, 0])
    assert found[1, 1] == pytest.approx(0.5)


def test_crps_of_quantiles_is_near_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    actual = rng.normal(size=(500, 1))
    found = quantile_crps(actual, normal_quantiles(np.zeros((500, 1)), 1.0))
    normal = torch.distributions.Normal(0.0, 1.0)
    z = torch.from_numpy(actual)
    exact = z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - math.pi**-0.5
    assert found == pytest.approx(exact.numpy(), abs=0.02)


def test_a_threshold_weighs_what_lies_beyond_it() -> None:
    actual, guess = np.array([[1.0, 5.0, 5.0]]), np.array([[2.0, 2.0, 7.0]])
    tau = np.array([[3.0]])
    # below the threshold nothing counts; above it, distances from the threshold or from one another
    assert threshold_weighted(actual, {0.5: guess}, tau)[0].tolist() == pytest.approx([0.0, 2.0, 2.0])
    assert threshold_weighted(actual, {0.5: guess}, tau, upper=False)[0].tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_the_threshold_weighted_score_is_proper() -> None:
    """The true distribution scores better than one that always forecasts extremes, and than one that never does."""
    rng = np.random.default_rng(0)
    actual = rng.normal(size=(4_000, 1))
    tau, zero = np.full((4_000, 1), 1.6), np.zeros((4_000, 1))
    scores = {
        name: threshold_weighted(actual, normal_quantiles(zero + shift, spread), tau).mean()
        for name, shift, spread in (("true", 0.0, 1.0), ("loud", 2.0, 1.0), ("quiet", -1.0, 0.3))
    }
    assert scores["true"] < scores["quiet"] < scores["loud"]


def test_the_chance_of_exceeding_lies_between_the_quantiles() -> None:
    quantiles = {0.1: np.array([[0.0]]), 0.5: np.array([[1.0]]), 0.9: np.array([[3.0]])}
    for tau, chance in ((1.0, 0.5), (2.0, 0.3), (9.0, 0.1), (-5.0, 0.9)):
        assert exceedance(quantiles, np.array([tau]))[0, 0] == pytest.approx(chance)
    assert exceedance({0.5: np.array([[1.0, 5.0]])}, np.array([2.0]))[0].tolist() == [0.0, 1.0]


def make_forecasts(rows: int = 40) -> EventForecasts:
    rng = np.random.default_rng(0)
    actual = rng.normal(size=(rows, 4))
    event = np.full((rows, 4), -1)
    event[::10] = np.arange(len(event[::10]))[:, None]
    actual[::10] += 4.0
    return EventForecasts(
        actual=actual, quantiles=normal_quantiles(np.zeros((rows, 4)), 1.0), event=event, scale=np.full(rows, 2.0),
        tau={0.95: np.full(rows, 1.64), 0.99: np.full(rows, 2.33)}, block=np.arange(rows) // 5,
    )  # fmt: skip


def test_events_are_scored_apart_and_drawn_together() -> None:
    forecasts = make_forecasts()
    found = event_scores(forecasts)
    inside = forecasts.event >= 0
    assert found.events == 4
    assert found.values["event_window_mase"] == pytest.approx(np.abs(forecasts.actual[inside]).mean() / 2.0)
    assert found.values["non_event_mase"] == pytest.approx(np.abs(forecasts.actual[~inside]).mean() / 2.0)
    assert found.values["coverage_80"] < 0.2
    assert found.values["base_rate_95"] == pytest.approx((forecasts.actual > 1.64).mean())
    for name, (low, high) in found.intervals.items():
        value = found.values[name]
        assert math.isnan(low) or low <= value <= high, name
    assert {row["metric"] for row in found.rows()} == set(found.values)
    with pytest.raises(ValueError, match="need their median"):
        EventForecasts(
            actual=forecasts.actual, quantiles={0.1: forecasts.actual}, event=forecasts.event, scale=forecasts.scale,
            tau=forecasts.tau, block=forecasts.block,
        )  # fmt: skip


# --- labelled sets


@pytest.fixture(scope="module")
def labelled() -> ProbeFromFrame:
    rng = np.random.default_rng(0)
    y = np.sin(2 * np.pi * np.arange(600) / 24) + 0.1 * rng.normal(size=600)
    windows = pd.DataFrame(
        [{"unique_id": s, "start": start, "end": start + 11, "label": "storm"} for s in "ab" for start in (200, 400)]
    )
    df = pd.concat([pd.DataFrame({"unique_id": s, "ds": np.arange(600), "y": y}) for s in "ab"], ignore_index=True)
    return ProbeFromFrame(df, critical=windows, target=["y"])


def test_a_forecaster_is_fitted_on_what_came_before(labelled: ProbeFromFrame) -> None:
    train = training_part(labelled)
    assert train.groupby("unique_id")["ds"].max().to_dict() == {"a": 399, "b": 399}
    rolling = naive_rolling(labelled.df, ("y",), horizon=12, windows=3, season=24)
    assert len(rolling) == 2 * 3 * 12
    first = rolling[(rolling["unique_id"] == "a") & (rolling["cutoff"] == 563)]
    y = labelled.df[labelled.df["unique_id"] == "a"]["y"].to_numpy()
    assert first[0.5].to_numpy() == pytest.approx(y[540:552])
    assert first["y"].to_numpy() == pytest.approx(y[564:576])
    with pytest.raises(ValueError, match="Unknown labelled set 'moon'"):
        RealPlan(name="moon")


def test_a_run_on_a_labelled_set_goes_on_where_it_stopped(
    labelled: ProbeFromFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RealPlan(name="batadal", max_time=1.0)
    monkeypatch.setitem(real_run.SETTINGS, "batadal", real_run.Setting(season=24, period=24, ages=(24,), horizon=12))
    monkeypatch.setattr(real_run, "labelled_probe", lambda name: labelled)
    monkeypatch.setattr("hamts.data.catalog.load_dataset", lambda name: SimpleNamespace(fit_kwargs=lambda: {"freq": 1}))
    fits, stops = [], [True, False]
    usual, detect = hamts.fit, real_run.detection_test
    monkeypatch.setattr(hamts, "fit", lambda *a, **k: fits.append(k["accelerator"]) or usual(*a, **k))

    def stopped_once(*arguments: Any, **options: Any) -> Any:
        if stops.pop(0):
            raise KeyboardInterrupt
        return detect(*arguments, **options)

    monkeypatch.setattr(real_run, "detection_test", stopped_once)
    with pytest.raises(KeyboardInterrupt):
        run_real(plan, tmp_path, device="cpu")
    assert read_real(tmp_path) == []
    # what is kept answers as the forecaster in memory did
    adapter = HamtsAdapter(hamts.load(plan.parts(tmp_path) / "model.hamts"), device="cpu")
    again = edit_test(labelled, adapter, horizon=12, period_rows=24)
    assert run_real(plan, tmp_path, device="cpu") == run_real(plan, tmp_path, device="cpu")
    assert fits == ["cpu"]
    assert stops == []
    content = read_real(tmp_path)[0]
    assert [test["test"] for test in content["tests"]] == ["edit", "drop", "lead", "lead"]
    assert content["tests"][0]["value"] == again.value
    assert content["tests"][3]["budget_share"] == 0.0
    assert list((tmp_path / "real/parts").iterdir()) == []
    with pytest.raises(DataError, match="device must be auto, cpu or cuda"):
        run_real(RealPlan(name="tep"), tmp_path, device="cuda:1")
    with pytest.raises(DataError, match="workers must be at least 1. Got 0."):
        run_real(RealPlan(name="tep"), tmp_path, device="cpu", workers=0)


def test_series_hit_by_one_event_are_drawn_together() -> None:
    from probes.real import _summary

    rows: list[dict[str, Any]] = [
        {"label": "storm", "later": 7, "value": value, "unique_id": series}
        for series, value in (("a", 1.0), ("b", 3.0))
    ]
    one = _summary("edit", rows)
    # one event: nothing to draw but itself
    assert (one.value, one.low, one.high, one.events) == (2.0, 2.0, 2.0, 1)
    two = _summary("edit", [*rows, {"label": "storm", "later": 9, "value": 8.0, "unique_id": "a"}])
    assert two.events == 2
    assert (two.low, two.high) == (2.0, 8.0)
    assert isinstance(two, RealResult)
    assert len(two.to_json()["rows"]) == 3


# --- several fits


def test_fits_and_events_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    events = rng.normal(size=6)
    tables = [np.stack([4 * (events + shift), np.full(6, 4.0)], 1) for shift in (0.0, 1.0, 2.0)]
    value, low, high = crossed_interval(tables)
    assert value == pytest.approx(events.mean() + 1.0)
    one = crossed_interval(tables[:1])
    assert high - low > one[2] - one[1] > 0
    # fits that agree add nothing
    same = crossed_interval([tables[0]] * 3)
    assert same == pytest.approx(one)


def test_a_table_of_fits_has_a_column_for_each_set_and_preset() -> None:
    def fit(seed: int, preset: str) -> dict[str, object]:
        rows = [
            {"label": "storm", "later": f"2013-0{n}", "value": 0.1 * n + seed, "age_rows": age}
            for n in (1, 2)
            for age in (24, 168)
        ]
        scores = {"metric": "event_window_mase", "value": 1.0, "groups": [[2.0, 2], [4.0, 2]]}
        return {
            "set": "batadal", "preset": preset, "events": 2,
            "tests": [
                {"test": "edit", "events": 2, "rows": rows},
                {"test": "lead", "events": 2, "budget_share": 0.1, "rows": rows},
            ],
            "event_scores": {"ham": [scores], "seasonal_naive": [scores]},
        }  # fmt: skip

    text = real_table([fit(0, "tiny"), fit(1, "tiny"), fit(0, "small")])
    head, _, *rows = text.splitlines()
    assert head == "|  | batadal, tiny (2 events, 2 fits) | batadal, small (2 events, 1 fits) |"
    assert rows[0].startswith("| edit | 0.650 [0.100, 1.200] | 0.150 [0.100, 0.200] |")
    assert [row.split(" | ")[0] for row in rows[1:3]] == ["| lead, first age", "| lead, second age"]
    assert rows[3] == "| MASE in windows | 1.500 [1.000, 2.000] | 1.500 [1.000, 2.000] |"


# --- transfer


def test_a_transfer_is_written_once(tmp_path: Path) -> None:
    plan = TransferPlan(steps=6, overrides=(("missed_tags", 0.2), ("false_tags", 4.0)))
    path = run_transfer(plan, tmp_path, budgets=(1.0,), streams=1, sequences=8)
    content = json.loads(path.read_text())
    assert set(content["scores"]) == {"der/derD", "act/actS", "pbc/pbcD"}
    assert "recall_corrected" in content["scores"]["pbc/pbcD"][0]
    before = path.stat().st_mtime_ns
    assert run_transfer(plan, tmp_path).stat().st_mtime_ns == before


# --- the report


def test_effects_before_any_sets_in_are_left_out() -> None:
    from probes.contract import generator
    from probes.registry import get_probe

    probe, _ = get_probe("cfr")
    batch = probe.sample(generator(0), 4, probe.config("smoke"))
    horizon = batch.extra["baseline"].shape[1]
    errors = effect_by_tau(torch.zeros_like(batch.y), batch, horizon)
    assert bool(errors[0].isnan())
    # assuming no effect is the floor itself
    assert errors[-1] == pytest.approx(1.0)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(64, 4096, log=True) == [64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0]
    assert ticks(3.0, 3.0) == [3.0]
    assert "nothing to draw" in lines_svg({"a": [(1.0, math.nan)]}, title="t", x_name="x", y_name="y")


def test_the_bytes_from_which_one_line_is_above() -> None:
    state = pd.DataFrame({"bytes": [100.0, 400.0], "skill": [0.5, 0.5]})
    rising = pd.DataFrame({"bytes": [100.0, 400.0], "skill": [0.0, 1.0]})
    assert 195 < float(crossover(rising, state)) < 210
    assert crossover(state, rising.assign(skill=[0.6, 0.9])) == "never"
    assert "all sizes" in crossover(rising.assign(skill=[0.6, 0.9]), state)
    assert crossover(state, state.assign(bytes=[900.0, 950.0])) == "no common sizes"


def test_a_report_has_ten_panels_with_failing_gates_first(tmp_path: Path) -> None:
    report = run_probes(["der/der", "stream/drift_mean"], tier="T0", preset="smoke", out=tmp_path, progress=False)
    from probes.gates import validate, write_gate

    passed = validate("der/der", gates=["G7"], folder=tmp_path)[0]
    failing = type(passed)("der", "der", "G5", False, 0.5, 0.9, "as if")
    write_gate(tmp_path / "gates" / "der" / "x.json", failing,
               {"contract_version": CONTRACT_VERSION, "suite_version": 1})  # fmt: skip
    real = {
        "set": "moon", "preset": "tiny", "seed": 0, "budget_share": 0.1, "events": 2,
        "tests": [
            {"test": "lead", "value": 0.1, "low": 0.0, "high": 0.2, "events": 2, "note": "", "budget_share": 0.1,
             "rows": [{"age_rows": 24, "value": 0.1, "label": "flood", "later": "x"}]},
            {"test": "none", "note": "no pair"},
        ],
        "detection": [{"unique_id": "a", "windows": 2, "rows": 90, "patches": 30, "kept": 3, "recall": 1.0,
                       "chance": 0.5, "reach": 0.4, "precision_distance": 0.7, "corrected": 1.0}],
        "event_scores": {name: [{"metric": "crps", "value": 0.5}] for name in ("ham", "seasonal_naive")},
    }  # fmt: skip
    (tmp_path / "real" / "sets").mkdir(parents=True)
    (tmp_path / "real" / "sets" / "moon.json").write_text(json.dumps(real))
    page = load_report(tmp_path).to_html()
    for number in range(1, 11):
        assert f"<h2>{number} · " in page
    assert page.index("FAIL der/der G5") < page.index("<h3>")
    assert "moon, tiny (2 events, 1 fits)" in page
    assert "1.00 (1.00 to 1.00, 1 fits)" in page
    assert len(read_real(tmp_path)) == 1
    assert "- FAIL" in load_report(tmp_path).to_markdown()
    assert "No gates were run" in html_report(report.documents)


def test_commands_say_what_they_need(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, words in (
        (["real"], "No set was named"),
        (["real", "moon", "-o", str(tmp_path)], "Unknown labelled set"),
        (["run", "der", "--budgets", "1,two", "-o", str(tmp_path)], "Numbers between commas"),
        (["run", "der", "--state-width", "3", "-o", str(tmp_path)], "even, and at least 2"),
        (["transfer", "--test", "moon", "-o", str(tmp_path)], "Unknown probe"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(DataError):
        load_report(tmp_path)
