"""The table of what was routed, against the live memory, and its summaries."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from routed import P, W, World, frame, three_items, world

from hamts.data.frame import to_panel
from hamts.data.panel import Panel
from hamts.errors import DataWarning
from hamts.nn.scratchpad import Entries
from hamts.reader import StreamMemory
from hamts.routes import routes_table


@pytest.fixture(scope="module")
def panel() -> Panel:
    return three_items()


@pytest.fixture(scope="module")
def small(panel: Panel) -> World:
    """Caps that are full long before the end."""
    return world(panel, caps=(9, 6))


def live_entries(world: World, memory: StreamMemory, item: int, layer: int) -> set[tuple[float, str]]:
    pad = memory.layers[layer].scratchpad
    names = [c.name for c in world.panel.schema.channels]
    alive = pad.alive[item]
    return {(float(p), names[int(c)]) for p, c in zip(pad.position[item][alive], pad.channel[item][alive], strict=True)}


def table_entries(world: World, table: pd.DataFrame, item: int, layer: int) -> set[tuple[float, str]]:
    """The same from the table, whose times are turned back into positions."""
    panel = world.panel
    own = table[(table["unique_id"] == panel.item_ids[item]) & (table["status"] == "kept")]
    own = own[own["layers"].str.split(",").map(lambda held: str(layer) in held).astype(bool)]
    if panel.times is not None:
        times = panel.times[panel.offsets[item] : panel.offsets[item + 1]]
        step = np.searchsorted(times, own["ds_end"].to_numpy())
    else:
        zone = panel.schema.dialect.time_zone
        start = pd.Timestamp(panel.starts[item])
        ends = own["ds_end"].dt.tz_convert("UTC").dt.tz_localize(None) if zone else own["ds_end"]
        step = ((ends - start) // pd.Timedelta(hours=1)).to_numpy()
    patch = (int(world.store.lead[item]) + step) // world.store.patch_steps
    position = world.store.position[world.store.first_row[item] + torch.from_numpy(patch.astype(np.int64))].tolist()
    return set(zip(position, own["channel"], strict=True))


def assert_equals_live(world: World, table: pd.DataFrame, memory: StreamMemory | None) -> None:
    assert memory is not None
    for item in range(world.store.n_items):
        for layer in range(world.network.config.layers):
            expected = live_entries(world, memory, item, layer)
            assert table_entries(world, table, item, layer) == expected


@pytest.mark.parametrize("caps", [(9, 6), (1, 1), (0, 0), (0, 3), (40, 2), (5000, 5000), (None, None)])
def test_kept_rows_are_exactly_what_the_scratchpads_hold(panel: Panel, caps: tuple[int, int]) -> None:
    here = world(panel, caps=caps)
    table = here.table()
    assert_equals_live(here, table, here.rollout.memory)
    if caps == (9, 6):
        assert set(table["status"]) == {"kept", "pending", "below", "evicted", "quota_full"}
        assert {"event", "action", "learned", "innovation", ""} == set(table["reason"])
    if caps == (0, 0):
        assert "kept" not in set(table["status"])


@pytest.mark.parametrize("router", ["surprise", "tags", "surprise+innovation"])
def test_kept_rows_are_what_the_scratchpads_hold_with_other_routers(panel: Panel, router: str) -> None:
    here = world(panel, router=router, caps=(12, 8), layers=1)
    assert_equals_live(here, here.table(), here.rollout.memory)
    if router == "tags":
        assert here.table()["score"].isna().all()


def test_the_table_of_an_earlier_moment_is_that_of_a_roll_that_ended_there(small: World) -> None:
    at = pd.Timestamp("2024-04-05 17:00", tz="Europe/Berlin")
    ends = np.array(
        [int((np.asarray(ts) <= at).sum()) for ts in (
            pd.date_range(pd.Timestamp(s, tz="UTC"), periods=n, freq="h")
            for s, n in zip(small.panel.starts, small.panel.lengths, strict=True)
        )]
    )  # fmt: skip
    shorter = small.read(ends)
    early = small.table(at=at)
    assert_equals_live(small, early, shorter.memory)
    from_shorter = routes_table(
        small.network, small.store, small.panel, rollout=shorter, policies=small.policy, at=at
    )  # fmt: skip
    # scores of unequal chunk shapes differ by rounding
    pd.testing.assert_frame_equal(early, from_shorter, rtol=1e-9)
    naive = small.table(at="2024-04-05 17:00")
    pd.testing.assert_frame_equal(early, naive)
    assert (early["age"] >= 0).all()


def test_bytes_of_the_rows_sum_to_those_of_the_live_tensors(small: World) -> None:
    memory = small.rollout.memory
    assert memory is not None
    live = sum(
        int(layer.scratchpad.alive.sum()) * sum(
            getattr(layer.scratchpad, f.name)[0, 0].numel() * getattr(layer.scratchpad, f.name).element_size()
            for f in fields(Entries)
            if getattr(layer.scratchpad, f.name) is not None
        )
        for layer in memory.layers
    )  # fmt: skip
    assert small.table()["bytes"].sum() == live


def test_only_observed_tokens_have_rows_and_values_are_means_of_what_was_observed(small: World) -> None:
    table, df = small.table(), frame({"a": 400, "b": 130, "c": 311}, zone="Europe/Berlin")
    rows = table[table["channel"].isin(["y", "z", "past", "ahead", "action"])].sample(200, random_state=1)
    for row in rows.itertuples():
        inside = df[(df["unique_id"] == row.unique_id) & df["ds"].between(row.ds_start, row.ds_end)][row.channel]
        assert row.n_steps == inside.notna().sum() > 0
        assert row.value == pytest.approx(inside.mean())
    assert (table.loc[table["channel"] == "event", "tag"].str.contains("event")).all()
    assert (table["ds_end"] - table["ds_start"] <= pd.Timedelta(hours=P - 1)).all()
    assert str(table["ds_start"].dt.tz) == "Europe/Berlin"


def test_reasons_scores_and_times_agree_with_the_decision(small: World) -> None:
    table = small.table()
    by_score = table["reason"].isin(["learned", "innovation"])
    assert (table.loc[by_score, "score"] >= table.loc[by_score, "threshold"]).all()
    tagged = table["reason"].isin(["event", "action"])
    assert (table.loc[tagged, "tag"] != "").all()
    assert not (table.loc[tagged, "status"] == "below").any()
    assert (table["status"] == "quota_full").equals(tagged & table["evicted_at"].notna() & (table["status"] != "kept"))
    assert (table.loc[table["status"] == "below", "reason"] == "").all()
    written = table["written_at"].notna()
    assert written.equals(table["status"].isin(["kept", "evicted", "quota_full"]))
    assert (table.loc[written, "written_at"] - table.loc[written, "ds_end"] == pd.Timedelta(hours=P * W)).all()
    gone = table["evicted_at"].notna()
    assert gone.equals(table["status"].isin(["evicted", "quota_full"]))
    assert (table.loc[gone, "evicted_at"] >= table.loc[gone, "written_at"]).all()
    assert (table.loc[table["status"] == "pending", "age"] < P * (W + 1)).all()


def test_a_token_of_which_too_little_was_observed_has_no_reason_even_above_the_threshold() -> None:
    with pytest.warns():
        table = world(
            to_panel(frame({"a": 300}, holes=0.7), target=["y", "z"], event_cols=["event"]), caps=(9, 9)
        ).table()
    sparse = table[(table["n_steps"] < P / 2) & (table["channel"] == "y") & (table["tag"] == "")]
    assert len(sparse) > 0
    assert set(sparse["status"]) <= {"below", "pending"}
    assert (sparse["score"] >= sparse["threshold"]).any()
    assert (sparse["reason"] == "").all()


def test_refused_rows_can_be_left_out(small: World) -> None:
    table = small.table()
    expected = table[table["status"] != "below"].reset_index(drop=True)
    pd.testing.assert_frame_equal(small.table(refused=False), expected)


@pytest.mark.parametrize("kind", ["integer", "irregular"])
def test_other_clocks(kind: str) -> None:
    df = frame({"a": 150, "b": 90})
    df = df.drop(columns=["ahead", "action"])
    native = kind == "irregular"
    if native:
        df["ds"] += pd.to_timedelta(np.random.default_rng(2).integers(0, 3000, len(df)), unit="s")
    else:
        df["ds"] = (df["ds"] - pd.Timestamp("2024-01-01")) // pd.Timedelta(hours=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        panel = to_panel(df, target=["y", "z"], event_cols=["event"], irregular="native" if native else "error")
    here = world(panel, caps=(9, 6))
    table = here.table()
    if native:
        assert_equals_live(here, table, here.rollout.memory)
        at = df["ds"].iloc[80]
        ends = np.array([(df.loc[df["unique_id"] == name, "ds"] <= at).sum() for name in panel.item_ids])
        assert_equals_live(here, here.table(at=at), here.read(ends).memory)
    else:
        memory = here.rollout.memory
        assert memory is not None
        assert (table["status"] == "kept").sum() > 0
        assert table["written_at"].dtype == "Int64"
        assert (here.table(at=int(df["ds"].iloc[80]))["ds_end"] <= df["ds"].iloc[80]).all()
        with pytest.raises(ValueError, match="calendar"):
            here.table(by="hour")


def test_a_rollout_without_traces_is_refused(small: World) -> None:
    with pytest.raises(ValueError, match="keep_traces"):
        routes_table(small.network, small.store, small.panel, rollout=replace(small.rollout, traces=[]))


@pytest.mark.parametrize("by", ["channel", "hour", "weekday", "tag", "layer", "reason"])
def test_summaries_count_every_token(small: World, by: str) -> None:
    table, summary = small.table(), small.table(by=by)
    statuses = ["kept", "pending", "below", "quota_full", "evicted"]
    assert (summary[statuses].sum(axis=1) == summary["tokens"]).all()
    assert summary["bytes"].sum() == table["bytes"].sum() or by == "tag"
    if by == "layer":
        assert (summary["tokens"] == len(table)).all()
        memory = small.rollout.memory
        assert memory is not None
        assert summary["kept"].tolist() == [int(layer.scratchpad.alive.sum()) for layer in memory.layers]
    elif by != "tag":
        assert summary["tokens"].sum() == len(table)
        assert summary["kept"].sum() == (table["status"] == "kept").sum()


def test_an_unknown_summary_names_the_known_ones(small: World) -> None:
    with pytest.raises(ValueError, match="Available.*weekday"):
        small.table(by="month")
