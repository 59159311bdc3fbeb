"""Attention that entries received against a plain count, worth of sets against forecasts without them, judgements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from model_frames import quick, sine_frame
from routed import World, frame, without, world

import hamts.nn.ham as ham
from hamts.data.frame import to_panel
from hamts.data.patches import build_store
from hamts.errors import DataError
from hamts.nn.head import pinball
from hamts.ops import kernels, naive
from hamts.ops.types import Attended
from hamts.rollout import forecast_from, roll
from hamts.routes import (
    add_reads,
    inside_share,
    judge_worth,
    overlap,
    overlap_by_reason,
    routes_table,
    tagged_not_kept,
    worth_by_reason,
    worth_nothing,
    worth_together,
)  # fmt: skip
from hamts.routes_reads import forecast_reads, read_table
from hamts.routes_sets import worth_of_rows
from hamts.routes_summary import summarise
from hamts.routes_worth import locate_rows


@pytest.fixture(scope="module")
def here() -> World:
    with pytest.warns():
        panel = to_panel(
            frame({"a": 400, "c": 311}, zone="Europe/Berlin"),
            target=["y", "z"], futr_cols=["ahead"], event_cols=["event"], action_cols=["action"],
        )  # fmt: skip
    return world(panel, caps=(9, 6))


def test_read_mass_is_the_mean_attention_of_all_later_reads(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted anew in a recorder around the step-by-step read, one item alone, patch by patch."""
    seen: dict[tuple[float, int], list[float]] = {}

    def recorder(queries: torch.Tensor, **arguments: object) -> Attended:
        result = naive.attend(queries, **arguments)  # type: ignore[arg-type]
        scratch = arguments["scratch"]
        assert scratch is not None and result.scratch_mass is not None
        _, N, C, H, _ = queries.shape
        for m in range(scratch.channel.shape[1]):  # type: ignore[attr-defined]
            first, last = int(scratch.visible_from[0, m]), int(scratch.visible_until[0, m])  # type: ignore[attr-defined]
            steps = len(set(range(N)) & set(range(max(first, 0), min(last, N))))
            if steps:
                marks.append((m, float(result.scratch_mass[0, m]) / (C * H), steps))
        return result

    marks: list[tuple[int, float, int]] = []
    append = ham.append_candidates

    def keep(kept: object, fresh: object, **how: bool) -> object:
        entries, origin = append(kept, fresh, **how)  # type: ignore[arg-type]
        ids.append([(float(p), int(c)) for p, c in zip(entries.position[0], entries.channel[0], strict=True)])
        return entries, origin

    ids: list[list[tuple[float, int]]] = []

    def attend(queries: torch.Tensor, **arguments: object) -> Attended:
        marks.clear()
        result = recorder(queries, **arguments)
        for m, mass, steps in marks:
            total = seen.setdefault(ids[-1][m], [0.0, 0.0])
            total[0] += mass
            total[1] += steps
        return result

    alone = here.panel.item_ids[0]
    monkeypatch.setattr(ham, "append_candidates", keep)
    monkeypatch.setattr(kernels, "attend", attend)
    rollout = replace(here).read(np.array([here.panel.lengths[0], 0]))
    monkeypatch.undo()
    table = routes_table(here.network, here.store, here.panel, rollout=rollout, policies=here.policy)
    done = add_reads(table, here.network, here.store, here.panel, rollout=rollout)
    own = done[(done["unique_id"] == alone) & done["status"].isin(["kept", "evicted", "quota_full"])]
    where = locate_rows(own, here.store, here.panel)
    positions = here.store.position[here.store.first_row[0] + torch.from_numpy(where["patch"].to_numpy())].tolist()
    expected = [seen[key] for key in zip(positions, where["channel"], strict=True)]
    np.testing.assert_allclose(own["read_mass"], [mass / steps for mass, steps in expected], rtol=1e-9)
    assert len(own) > 20
    assert own["read_mass"].between(0, 1).all()
    assert own["read_mass"].max() > 1e-3
    assert done.loc[done["status"].isin(["below", "pending"]), "read_mass"].isna().all()


def test_reads_do_not_depend_on_the_chunks(here: World) -> None:
    table = here.table()
    whole = add_reads(table, here.network, here.store, here.panel, rollout=here.rollout)
    fine = roll(
        here.network, here.store, cutoffs=[np.zeros(0, int)] * 2, steps=1, policies=here.policy, keep_traces=True,
        chunk_patches=3,
    )  # fmt: skip
    again = add_reads(table, here.network, here.store, here.panel, rollout=fine)
    np.testing.assert_allclose(again["read_mass"], whole["read_mass"], rtol=1e-7)
    rows = read_table(here.network, here.store, fine)
    assert (rows["last_patch"] - rows["first_patch"] <= 2).all()
    assert (rows["patch"] < rows["last_patch"]).all()


def test_what_a_forecast_reads_are_entries_of_its_memory(here: World) -> None:
    memory = here.rollout.memory
    assert memory is not None
    reads = forecast_reads(
        here.network, here.store, item=0, cutoff=int(here.panel.lengths[0]), memory=memory.select(torch.tensor([0])),
        steps=10, policies=here.policy,
    )  # fmt: skip
    table = here.table()
    where = locate_rows(table, here.store, here.panel)
    kept = where[(table["status"] == "kept") & (where["item"] == 0)]
    assert set(zip(reads["channel"], reads["patch"], strict=True)) == set(
        zip(kept["channel"], kept["patch"], strict=True)
    )
    assert reads["forecast_mass"].is_monotonic_decreasing
    assert 0 < reads["forecast_mass"].sum() <= 1


def test_worth_of_a_set_equals_a_forecast_without_all_of_it(here: World) -> None:
    steps, item = 10, 0
    ends = here.panel.lengths - 14
    rollout = here.read(ends)
    memory = rollout.memory
    assert memory is not None
    table = routes_table(here.network, here.store, here.panel, rollout=rollout, policies=here.policy)
    rows = table[(table["unique_id"] == "a") & (table["status"] == "kept")].iloc[[0, 3, 4]]
    where = locate_rows(rows, here.store, here.panel)
    cutoffs = [np.array([ends[0]]), np.zeros(0, int)]
    arguments = {"cutoffs": cutoffs, "steps": steps, "policies": here.policy, "seed": 1}
    result = worth_of_rows(rows, here.network, here.store, here.panel, **arguments)
    one = memory.select(torch.tensor([item]))
    answers = [one]
    for place in where.itertuples():
        position = float(here.store.position[here.store.first_row[item] + place.patch])
        one, copies = without(one, 0, position, place.channel)
        assert copies > 0
    answers.append(one)
    levels = torch.tensor(here.network.config.quantiles, dtype=torch.float64)
    losses = []
    for each in answers:
        quantiles, scale = forecast_from(
            here.network, here.store, torch.tensor([item]), torch.tensor([int(ends[0])]), each, steps, here.policy
        )
        truth = torch.from_numpy(here.panel.item(item)[ends[0] : ends[0] + steps, :2].T.copy()) / scale[0, :, None]
        known = ~truth.isnan()
        losses.append(float(pinball(quantiles[0] / scale[0, :, None, None], truth, levels)[known].mean()))
    assert result.worth == pytest.approx(losses[1] - losses[0], abs=1e-12)
    assert abs(result.worth) > 1e-7
    assert (result.entries, result.forecasts, result.of) == (3.0, 1, "quantile loss")
    assert result.random_low <= result.random <= result.random_high
    # one at a time does not add up to all at once
    nothing = worth_of_rows(rows[:0], here.network, here.store, here.panel, **arguments)
    assert nothing.words == "none of them was held"
    assert np.isnan(nothing.worth)


def test_routes_of_a_forecaster_say_what_was_read_and_worth_together_takes_its_rows() -> None:
    df = sine_frame(items=2, steps=300)
    model = quick(df, 12, budget_share=0.3, router="surprise")
    table = model.routes(df)
    kept = table[table["status"] == "kept"]
    assert kept["read_mass"].between(0, 1).all() and len(kept) > 0
    result = worth_together(model, df, kept, cutoffs=[df["ds"].max() - pd.Timedelta(hours=24)])
    assert result.forecasts == 2 and result.of == "quantile loss"
    assert result.words in ("help more than random entries", "hurt", "as any other")
    with pytest.raises(DataError, match="E-EMPTY"):
        worth_together(model, df, kept[:0], cutoffs=[df["ds"].max()])
    with pytest.raises(DataError, match="E-SHORT.*complete"):
        model.routes(df.groupby("unique_id").head(1))


def test_tagged_steps_that_were_not_kept_are_listed(here: World) -> None:
    table = here.table()
    missed = tagged_not_kept(table)
    # the quota of six is full long before the end: every tagged token is kept, pending or listed
    asked = table[table["reason"].isin(["event", "action"]) & (table["status"] != "pending")]
    gone = asked[asked["status"] != "kept"]
    assert set(missed["status"]) == set(gone["status"]) == {"quota_full"}
    listed = missed.assign(channel=missed["channels"].str.split(",")).explode("channel")
    keys = ["unique_id", "channel", "ds_start"]
    assert sorted(map(tuple, listed[keys].to_numpy())) == sorted(map(tuple, gone[keys].to_numpy()))
    assert missed["kept"].sum() <= (asked["status"] == "kept").sum()
    # without tags, what is tagged is listed unless its score kept it
    plain = tagged_not_kept(table.assign(reason="", status=np.where(table["status"] == "kept", "kept", "below")))
    assert set(plain["status"]) == {"below"}
    assert len(tagged_not_kept(table.assign(tag=""))) == 0


def test_worth_is_judged_against_random_drops() -> None:
    table = pd.DataFrame({
        "status": "kept", "worth": [0.3, 0.1, -0.4, 0.05, np.nan, 0.3, 0.1, -0.01],
        "worth_random_low": -0.1, "worth_random_high": [0.2, 0.2, 0.2, -0.05, 0.2, 0.2, 0.2, 0.2],
        "worth_of": ["quantile loss"] * 4 + [""] + ["median change"] * 2 + ["quantile loss"],
    })  # fmt: skip
    words = ["helps", "nothing", "hurts", "helps", "", "moves", "nothing", "nothing"]
    assert judge_worth(table).tolist() == words
    assert len(worth_nothing(table)) == 3
    with pytest.raises(DataError, match="worth"):
        judge_worth(table[["status"]])


def test_summaries_carry_worth_and_attention(here: World) -> None:
    table = add_reads(here.table(), here.network, here.store, here.panel, rollout=here.rollout)
    table["worth"] = np.where(table["status"] == "kept", 2.0, np.nan)
    summary = summarise(table, "channel").set_index("channel")
    kept = table[table["status"] == "kept"].groupby("channel")["read_mass"].mean()
    pd.testing.assert_series_equal(summary["read_mass"].dropna(), kept)
    assert (summary["worth"].dropna() == 2.0).all()


def test_overlap_of_each_reason_and_the_share_of_rows_inside_windows(here: World) -> None:
    table = here.table()
    windows = pd.DataFrame({
        "unique_id": ["a"], "start": [pd.Timestamp("2024-04-02 03:00", tz="Europe/Berlin")],
        "end": [pd.Timestamp("2024-04-08 20:00", tz="Europe/Berlin")],
    })  # fmt: skip
    ever = ("kept", "evicted", "quota_full")
    lines = overlap_by_reason(table, windows, seed=0, statuses=ever, draws=50).set_index("reason")
    kept = table[table["status"].isin(ever)]
    assert set(lines.index) == {*kept["reason"], "all"}
    assert lines.loc["all", "kept_steps"] == overlap(table, windows, seed=0, statuses=ever).kept_steps
    inside = inside_share(table, windows)
    own = table["unique_id"].eq("a")
    assert (inside[~own] == 0).all()
    starts, ends = table["ds_start"], table["ds_end"]
    within = own & (starts >= windows["start"][0]) & (ends <= windows["end"][0])
    assert (inside[within] == 1).all() and within.sum() > 20
    assert (inside[own & ((ends < windows["start"][0]) | (starts > windows["end"][0]))] == 0).all()
    # one channel's patches, by hand
    event = kept[kept["reason"] == "event"].drop_duplicates(["unique_id", "ds_start"])
    steps = table.groupby(["unique_id", "ds_start"])["n_steps"].max()
    weight = steps.loc[pd.MultiIndex.from_frame(event[["unique_id", "ds_start"]])].to_numpy()
    assert lines.loc["event", "precision"] == pytest.approx((inside[event.index] * weight).sum() / weight.sum())


def test_worth_by_reason_has_a_line_for_each_reason() -> None:
    df = sine_frame(items=1, steps=300)
    model = quick(df, 12, budget_share=0.4, router="surprise+innovation")
    kept = model.routes(df).query("status == 'kept'")
    cutoffs = [df["ds"].max() - pd.Timedelta(hours=24)]
    lines = worth_by_reason(model, df, kept, cutoffs=cutoffs, seed=3)
    assert lines["reason"].tolist() == sorted(set(kept["reason"]))
    for line in lines.itertuples():
        alone = worth_together(model, df, kept[kept["reason"] == line.reason], cutoffs=cutoffs, seed=3)
        assert (line.worth, line.random_low, line.words) == (alone.worth, alone.random_low, alone.words)


def test_the_steps_of_a_token_share_what_it_receives() -> None:
    df = sine_frame(items=1, steps=300)
    model = quick(df, 12, budget_share=0.3, router="surprise", routing={"resolution": "step"})
    assert model.config.entries_per_token == model.config.patch_steps > 1
    kept = model.routes(df).query("status == 'kept'")
    assert len(kept) > 3 and kept["read_mass"].between(0, 1).all()
    network, panel = model._fitted.network, model._panel_of(df, None, None)
    store = build_store(panel, patch_steps=model.config.patch_steps, extra_steps=12)
    policy = network.policy(torch.tensor([0.3]))
    rollout = roll(
        network, store, cutoffs=[np.zeros(0, int)], steps=1, policies=policy, keep_traces=True, chunk_patches=5
    )  # fmt: skip
    rows = read_table(network, store, rollout)
    steps = rows["last_patch"] - rows["first_patch"] + 1
    assert (rows["sights"] <= steps * model.config.layers).all()
    # nothing is lost: a chunk's rows have all the attention that its entries received
    first = rollout.traces[-1]
    received = sum(float((layer.entries_mass * layer.entries_sights).sum()) for layer in first.layers)
    mine = rows[rows["first_patch"] == int(first.first_patch[0])]
    readers = len(store.roles) * model.config.heads
    assert mine["mass"].sum() == pytest.approx(received / readers, rel=1e-5)
