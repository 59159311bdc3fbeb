"""What a stream says beside its forecasts: surprise, learned intervals, what-ifs, edits by hand, an exported step."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model_frames import quick, rich_frames, sine_frame
from streams import assert_like, begin, by_item, feed, plain_model, rich_model

from hamts.errors import DataError
from hamts.forecast import quantile_at
from hamts.stream import Stream
from hamts.stream_calibration import p_values, push_scores, row_scores, shifted, track_shift
from hamts.stream_export import TOKEN_FIELDS, export_step, plain_state, plain_tokens

LEVELS = (0.1, 0.5, 0.9)


def started(**options: Any) -> tuple[Stream, pd.DataFrame]:
    return begin(plain_model(), sine_frame(items=2, steps=240), 50, **options)


# --- surprise


def test_a_score_of_one_lies_on_the_edge_of_the_interval() -> None:
    quantiles = np.array([[[0.0, 2.0, 3.0], [10.0, 20.0, 50.0]]]).repeat(4, 0)
    actual = np.array([[3.0, 20.0], [1.0, 20.0], [2.0, 80.0], [np.nan, np.nan]])
    scores, targets = row_scores(quantiles, np.ones((4, 2)), actual, LEVELS)
    np.testing.assert_allclose(scores, [1.0, 0.5, 2.0, np.nan])
    assert targets.tolist() == [0, 0, 1, -1]


def test_a_p_value_is_the_rank_among_the_last_scores() -> None:
    kept = np.array([[1.0, 2.0, 3.0, np.nan]] * 3)
    np.testing.assert_allclose(p_values(np.array([2.0, 9.0, np.nan]), kept), [3 / 4, 1 / 4, np.nan])
    ring, count = push_scores(kept[:1], np.array([3]), np.array([[4.0, np.nan, 5.0]]))
    assert ring.tolist() == [[5.0, 2.0, 3.0, 4.0]] and count.tolist() == [5]


def test_scores_use_what_was_known_when_the_patch_began() -> None:
    stream, rest = started()
    feed(stream, rest.iloc[:20], [3])
    # 60 hours of each item were read, patches hold 6
    ahead = quantile_at(stream.forecast(6).quantiles, stream.model.config.quantiles, 0.5)[:, 0]
    now = rest.iloc[20:32]
    stream.update(now.iloc[:5])
    one = stream.surprise
    stream.update(now.iloc[5:])
    both = pd.concat([one, stream.surprise], ignore_index=True)
    for row, item in enumerate(("i0", "i1")):
        mine = both[both["unique_id"] == item]
        levels = [
            quantile_at(stream._items.table["ahead_quantiles"][row], stream.model.config.quantiles, q) for q in LEVELS
        ]
        assert np.isnan(levels[0]).all(), "the patch is over, its forecast gone"
        assert mine["score"].notna().all() and (mine["target"] == "y").all()
    fresh, _ = begin(plain_model(), sine_frame(items=2, steps=240), 60)
    fresh.update(now)
    whole = fresh.surprise
    np.testing.assert_allclose(both["score"], whole["score"], rtol=1e-3)
    apart = now["y"].to_numpy() - ahead[[0, 1] * 6, np.repeat(np.arange(6), 2)]
    assert (np.argsort(np.abs(apart))[-1]) in np.argsort(whole["score"].to_numpy())[-4:]


def test_what_comes_later_changes_no_score() -> None:
    scores = []
    for change in (0.0, 40.0):
        stream, rest = started()
        rows = rest.iloc[:60].copy()
        rows.iloc[31:, rows.columns.get_loc("y")] += change
        stream.update(rows)
        scores.append(stream.surprise.iloc[:31])
    pd.testing.assert_frame_equal(*scores)


def test_an_outlier_has_the_smallest_p_value_and_calm_rows_are_uniform() -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=900), 200)
    found = []
    for at in range(0, len(rest), 200):
        stream.update(rest.iloc[at : at + 200])
        found.append(stream.surprise)
    calm = pd.concat(found[3:])["p_value"]
    # 1,000 p-values of a stationary series; 5 % lie within 3 deviations of a binomial, with room for dependence
    assert abs((calm <= 0.05).mean() - 0.05) < 0.04 and abs((calm <= 0.5).mean() - 0.5) < 0.12
    end = rest["ds"].max()
    stream.update({"unique_id": "i0", "ds": np.datetime64(end + pd.Timedelta("1h")), "y": 500.0})
    assert stream.surprise["p_value"][0] == pytest.approx(1 / (1 + 512))


def test_without_surprise_nothing_is_forecast_on_the_way() -> None:
    stream, rest = started(surprise=False)
    feed(stream, rest.iloc[:30], [7])
    assert stream.surprise["score"].isna().all()
    with_it, _ = started()
    feed(with_it, rest.iloc[:30], [7])
    assert_like(by_item(stream.forecast(12)), by_item(with_it.forecast(12)), tolerance=0.0)


# --- learned intervals


def test_quantiles_move_by_what_they_missed() -> None:
    quantiles = np.array([[[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]]])
    actual = np.array([[[5.0, np.nan]]])
    shift, steps = track_shift(np.zeros((1, 1, 3)), quantiles, np.ones((1, 1)), actual, levels=LEVELS, rate=0.1)
    np.testing.assert_allclose(shift, [[[0.01, 0.05, 0.09]]])
    assert steps.tolist() == [[1]]
    moved = shifted(quantiles, np.array([[[3.0, 0.0, 0.0]]]), np.full((1, 1), 2.0), np.array([[[0.0, 4.0]]]))
    np.testing.assert_allclose(moved[0, 0, 0], [1.0, 2.0, 4.0])


def test_coverage_of_a_hardly_trained_model_approaches_what_was_asked() -> None:
    model = plain_model()
    stream, rest = begin(model, sine_frame(items=2, steps=1500), 100, calibration_rate=0.05)
    hits: dict[bool, list[float]] = {True: [], False: []}
    at = rest["ds"].min()
    while len(rest) >= 12:
        part, rest = rest.iloc[:12], rest.iloc[12:]
        for learned in hits if at > pd.Timestamp("2024-01-30") else ():
            levels = stream.forecast(6, calibrated=learned)
            low, high = (quantile_at(levels.quantiles, levels.levels, q)[:, 0] for q in (0.1, 0.9))  # [I, F]
            truth = part.pivot(index="unique_id", columns="ds", values="y").to_numpy()
            hits[learned].append(float(((truth >= low) & (truth <= high)).mean()))
        stream.update(part)
        at = part["ds"].max()
    raw, learned = np.mean(hits[False]), np.mean(hits[True])
    assert abs(learned - 0.8) < 0.06
    assert abs(raw - 0.8) > abs(learned - 0.8)


def test_learning_is_off_unless_asked_for_and_kept_in_the_state() -> None:
    stream, rest = started(calibrate=True)
    feed(stream, rest.iloc[:240], [11])
    plain = stream.forecast(12, calibrated=False).quantiles
    learned = stream.forecast(12).quantiles
    assert not np.array_equal(plain, learned) and (np.diff(learned, axis=-1) >= 0).all()
    again = Stream.from_state(stream.model, *stream.state())
    np.testing.assert_array_equal(again.forecast(12).quantiles, learned)


# --- what-ifs


def test_a_scenario_is_two_forecasts_from_one_state() -> None:
    frames = rich_frames()
    stream, _ = begin(rich_model(), frames["df"], 150)
    before = stream.state_hash()
    ahead = stream.future_frame(24).assign(wind_plan=0.3, kind="a", valve=0.0)
    found = stream.scenario({"valve": 1.0}, 24, ahead)
    np.testing.assert_array_equal(found.planned.quantiles, stream.forecast(24, ahead).quantiles)
    np.testing.assert_array_equal(found.changed.quantiles, stream.forecast(24, ahead.assign(valve=1.0)).quantiles)
    np.testing.assert_allclose(found.df["difference"], found.df["changed"] - found.df["planned"], atol=1e-12)
    assert found.df["difference"].abs().max() > 0 and set(found.df["basis"]) == {"model-based, not causal"}
    same = stream.scenario({"valve": 0.0}, 24, ahead)
    assert (same.df["difference"] == 0).all()
    assert stream.state_hash() == before
    for wrong in ({"load": 1.0}, {"valve": [1.0, 2.0]}, {"valve": np.nan}):
        with pytest.raises(DataError, match="E-OPTION"):
            stream.scenario(wrong, 24, ahead)


# --- an operator's hand


def test_pinned_steps_are_kept_while_others_are_evicted() -> None:
    model = quick(sine_frame(items=1, steps=240), 6, patch_steps=4, budget_share=1.0, budget_bytes=6_000)
    stream, rest = begin(model, sine_frame(items=1, steps=900), 100)
    soon = stream.pin(("2024-01-06", "2024-01-06 07:00"), "commissioning")
    past = stream.pin(("2024-01-04", "2024-01-04 03:00"), "shutdown")
    assert (soon.entries, soon.window) == (0, 0) and past.entries == 1
    feed(stream, rest, [50])
    table = stream.routes()
    kept = table[table["label"] != ""]
    assert kept["ds_start"].tolist() == [pd.Timestamp(f"2024-01-{day}") for day in ("04", "06", "06 04:00")]
    assert set(kept["reason"]) == {"tag"}
    others = table[(table["label"] == "") & (table["status"] == "kept")]
    assert others["ds_start"].min() > pd.Timestamp("2024-01-20")
    assert [pin["label"] for pin in stream.pins] == ["commissioning", "shutdown"]
    again = Stream.from_state(model, *stream.state())
    assert again.pins == stream.pins


def test_a_router_without_tags_cannot_pin() -> None:
    model = quick(sine_frame(items=1, steps=240), 6, patch_steps=4, router="surprise")
    with pytest.raises(DataError, match="E-OPTION.*router"):
        model.stream().pin(("2024-01-02", "2024-01-03"), "x")


def test_forgetting_removes_what_is_exact_and_says_what_stays() -> None:
    frames = rich_frames()
    stream, _ = begin(rich_model(), frames["df"], 10_000)
    span = ("2024-04-03 00:00", "2024-04-04 23:00")
    others = stream.routes().query("unique_id != 's0'")
    left = stream.forget(span, "sensor fault", item="s0")
    table = stream.routes()
    mine = table[(table["unique_id"] == "s0")]
    inside = (mine["ds_end"] >= pd.Timestamp("2024-04-02 22:00")) & (
        mine["ds_start"] <= pd.Timestamp("2024-04-04 21:00")
    )
    assert left["entries_removed"] > 0 and not inside.any()
    pd.testing.assert_frame_equal(
        table.query("unique_id != 's0'").reset_index(drop=True), others.reset_index(drop=True)
    )
    assert left["state_still_holds_it"] and left["forecast_moved"] > 0 and "history" in left["note"]
    assert stream.pins[-1]["action"] == "forget" and stream.pins[-1]["label"] == "sensor fault"


def test_with_its_history_an_item_forgets_altogether() -> None:
    df = sine_frame(items=2, steps=200)
    stream, _ = begin(plain_model(), df, 10_000)
    span = ("2024-01-05", "2024-01-05 23:00")
    mine = df[df["unique_id"] == "i0"]
    left = stream.forget(span, item="i0", history=mine)
    assert not left["state_still_holds_it"] and min(left["state_difference"].values()) > 0
    never = mine[(mine["ds"] < "2024-01-05") | (mine["ds"] >= "2024-01-06")]
    assert_like(by_item(stream.forecast(12, items=["i0"])), by_item(plain_model().predict(never, 12)), tolerance=1e-5)
    with pytest.raises(DataError, match="E-OPTION.*history"):
        stream.forget(span, item="i1", history=df)


def test_rows_of_the_open_patch_can_be_forgotten_too() -> None:
    df = sine_frame(items=2, steps=200)
    stream, rest = begin(plain_model(), df, 50)
    stream.update(rest.iloc[:4])
    left = stream.forget(("2024-01-03 02:00", "2024-01-03 03:00"), item="i0")
    assert left["open_rows_removed"] == 2
    with pytest.raises(DataError, match="E-OPTION.*holds no step"):
        stream.forget(("2023-01-01", "2023-01-02"), item="i0")
    with pytest.raises(DataError, match="E-ITEM"):
        stream.forget(("2024-01-03", "2024-01-04"))


# --- exported


@pytest.mark.parametrize("rich", [False, True])
def test_an_exported_step_runs_back_with_equal_results(rich: bool) -> None:
    df = rich_frames()["df"] if rich else sine_frame(items=2, steps=240)
    stream, rest = begin(rich_model() if rich else plain_model(), df, 100)
    buffer = io.BytesIO()
    torch.export.save(export_step(stream), buffer)
    buffer.seek(0)
    graph = torch.export.load(buffer).module()
    item, network = stream.item_ids[0], stream._network
    state, seen = plain_state(stream, [item]), []
    chunk = stream._stepper.chunk

    def recorded(rows: Any, *, complete: bool) -> Any:
        made = chunk(rows, complete=complete)
        if complete:
            seen.append({name: getattr(made, name).contiguous() for name in TOKEN_FIELDS})
        return made

    stream._stepper.chunk = recorded  # type: ignore[method-assign]
    feed(stream, rest[rest["unique_id"] == item].iloc[:63], [5])
    assert len(seen) >= 10
    for tokens in seen:
        outputs, state = graph(tokens, state)
    wanted = plain_state(stream, [item])
    assert state.keys() == wanted.keys() and outputs["routed"].shape[1] == network.config.layers
    alive = {name: leaf for name, leaf in wanted.items() if name.endswith(".alive")}
    assert sum(int(leaf.sum()) for leaf in alive.values()) > 5
    for name, leaf in wanted.items():
        got, pad = state[name], alive.get(f"{name.rsplit('.', 1)[0]}.alive")
        if pad is not None:
            # what is not alive may hold anything
            got, leaf = got[pad], leaf[pad]
        torch.testing.assert_close(got, leaf, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    if not rich:
        open_tokens = plain_tokens(stream, [item])
        begun = int(open_tokens["observed"].sum())
        ahead, _ = graph(open_tokens, state)
        rest_of_patch = stream.forecast(6 - begun, items=[item]).quantiles
        np.testing.assert_allclose(ahead["quantiles"][:, :, begun:], rest_of_patch, rtol=1e-5, atol=1e-5)
