"""The routed-steps table against the live memory, and worth against forecasts from memories without the entry."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hamts.config import MemoryConfig, ModelConfig, TagType
from hamts.data.frame import to_panel
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore, build_store
from hamts.errors import DataError, DataWarning
from hamts.forecaster import HAMForecaster, fit, load
from hamts.nn.backbone import ChannelSpec
from hamts.nn.head import pinball
from hamts.nn.scratchpad import Entries
from hamts.nn.tokens import Policy, map_tensors
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import Rollout, forecast_from, roll
from hamts.routes import add_worth, memory_layers, overlap, routes_table

P, W = 4, 2
SHARE = 0.25


@dataclass(frozen=True)
class World:
    network: HAMNetwork
    store: PatchStore
    panel: Panel
    policy: Policy
    rollout: Rollout

    def table(self, **arguments: object) -> pd.DataFrame:
        return routes_table(
            self.network, self.store, self.panel, rollout=self.rollout, policies=self.policy, **arguments
        )  # type: ignore[arg-type]

    def read(self, ends: np.ndarray | None = None) -> Rollout:
        return roll(
            self.network, self.store, cutoffs=[np.zeros(0, int)] * self.store.n_items, steps=1,
            policies=self.policy, ends=ends, keep_traces=True, chunk_patches=7,
        )  # fmt: skip


def frame(
    lengths: dict[str, int], *, zone: str | None = None, first: str = "2024-03-28 05:00", holes: float = 0.1
) -> pd.DataFrame:
    """Hourly items with gaps, holes, a rare event and an action that is switched now and then."""
    rng = np.random.default_rng(4)
    parts = []
    for number, (name, length) in enumerate(lengths.items()):
        clock = pd.date_range(first, periods=length, freq="h", tz=zone) + pd.Timedelta(hours=3 * number)
        part = pd.DataFrame({"unique_id": name, "ds": clock})
        part["y"] = np.sin(np.arange(length) / 4) + rng.normal(0, 0.3, length)
        part["z"] = rng.normal(5, 1, length)
        part["past"] = rng.normal(size=length).cumsum()
        part["ahead"] = np.arange(length) % 24
        part["event"] = (rng.random(length) < 0.03).astype(float)
        part["action"] = np.repeat(rng.integers(0, 2, length // 20 + 1), 20)[:length].astype(float)
        part.loc[rng.random(length) < holes, "y"] = np.nan
        part.loc[length // 3 : length // 3 + 30, ["y", "z", "past"]] = np.nan
        # rows that are not there at all
        parts.append(part.drop(index=range(length // 2, length // 2 + 9)))
    return pd.concat(parts, ignore_index=True)


def world(
    panel: Panel,
    *,
    router: str = "learned+innovation+tags",
    caps: tuple[int, int],
    layers: int = 2,
    memory: MemoryConfig | None = None,
    resolution: str = "patch",
) -> World:
    patch_steps = P if panel.times is None else 1
    store = build_store(panel, patch_steps=patch_steps, extra_steps=24)
    config = ModelConfig(
        width=16, layers=layers, heads=2, patch_steps=patch_steps, window_patches=W, router=router, dropout=0.0,
        half_life_steps=(24.0, 96.0), resolution=resolution,
    )  # fmt: skip
    names = tuple(channel.name for channel in panel.schema.channels)
    spec = ChannelSpec(store.roles, (0,) * len(store.roles), store.calendar.shape[1], names=names)
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        network = HAMNetwork(config, memory or MemoryConfig(), spec).double().eval()
    policy = replace(network.policy(torch.tensor([SHARE])), cap_kept=caps[0], cap_must=caps[1])
    result = World(network, store, panel, policy, None)  # type: ignore[arg-type]
    sample = result.read()
    for number, layer in enumerate(memory_layers(network)):
        scores = torch.cat([chunk.layers[number].scores[chunk.heard >= 0.5] for chunk in sample.traces])
        layer.thresholds.calibrate(scores)
    return replace(result, rollout=result.read())


@pytest.fixture(scope="module")
def panel() -> Panel:
    with pytest.warns():
        return to_panel(
            frame({"a": 400, "b": 130, "c": 311}, zone="Europe/Berlin"),
            target=["y", "z"], futr_cols=["ahead"], event_cols=["event"], action_cols=["action"],
        )  # fmt: skip


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


# --- the table against the live memory


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


# --- summaries


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


# --- worth


def without(memory: StreamMemory, row: int, position: float, channel: int) -> tuple[StreamMemory, int]:
    """A memory of one row with every copy of an entry cut out of the tensors, and how many there were."""
    one, layers, copies = memory.select(torch.tensor([row])), [], 0
    for layer in one.layers:
        pad = layer.scratchpad
        hit = pad.alive[0] & (pad.position[0] == position) & (pad.channel[0] == channel)
        copies += int(hit.sum())
        kept = map_tensors(pad, lambda tensor: tensor[:, ~hit])  # noqa: B023 - used at once
        layers.append(replace(layer, scratchpad=kept))
    return replace(one, layers=layers), copies


def brute_force(
    world: World, memory: StreamMemory, item: int, cutoff: int, steps: int, policy: Policy, row: pd.Series
) -> tuple[float, int]:
    """Effect of dropping one entry: quantile loss where truth is ahead, else change of the median."""
    lead, first = int(world.store.lead[item]), int(world.store.first_row[item])
    start = (
        row["ds_end"].tz_convert("UTC").tz_localize(None) - pd.Timestamp(world.panel.starts[item])
    ) // pd.Timedelta(hours=1)
    position = float(world.store.position[first + (lead + int(start)) // P])
    channel = [c.name for c in world.panel.schema.channels].index(row["channel"])
    reduced, copies = without(memory, item, position, channel)
    answers = []
    for each in (memory.select(torch.tensor([item])), reduced):
        answers.append(
            forecast_from(world.network, world.store, torch.tensor([item]), torch.tensor([cutoff]), each, steps, policy)
        )
    scale = answers[0][1][0]  # [G]
    full, less = (a[0][0] / scale[:, None, None] for a in answers)  # 2 x [G, F, Q]
    truth = world.panel.item(item)[cutoff : cutoff + steps, :2].T / scale[:, None].numpy()  # [G, F']
    levels = torch.tensor(world.network.config.quantiles, dtype=torch.float64)
    if truth.shape[1] == 0 or np.isnan(truth).all():
        middle = world.network.config.quantiles.index(0.5)
        return float((less - full)[..., middle].abs().mean()), copies
    known = ~np.isnan(truth)
    F = truth.shape[1]
    losses = [pinball(q[:, :F], torch.from_numpy(truth), levels)[torch.from_numpy(known)].mean() for q in (full, less)]
    return float(losses[1] - losses[0]), copies


@pytest.mark.parametrize("ahead", [True, False])
def test_worth_equals_brute_force(small: World, ahead: bool) -> None:
    steps, item = 10, 0
    ends = small.panel.lengths - (14 if ahead else 0)
    rollout = small.read(ends)
    memory = rollout.memory
    assert memory is not None
    table = routes_table(small.network, small.store, small.panel, rollout=rollout, policies=small.policy)
    cutoffs = [np.array([end]) if i == item else np.zeros(0, int) for i, end in enumerate(ends)]
    done = add_worth(
        table, small.network, small.store, small.panel, cutoffs=cutoffs, steps=steps, policies=small.policy,
        seed=1, rows=None, random_draws=1000,
    )  # fmt: skip
    assert (done.loc[done["status"] != "kept", "worth"].isna()).all()
    mine = done[(done["unique_id"] == "a") & (done["status"] == "kept")]
    assert mine["worth"].notna().all()
    assert set(mine["worth_of"]) == {"quantile loss" if ahead else "median change"}
    truth = [brute_force(small, memory, item, int(ends[item]), steps, small.policy, row) for _, row in mine.iterrows()]
    effects, copies = np.array([t[0] for t in truth]), np.array([t[1] for t in truth])
    assert np.abs(effects).max() > 1e-5
    np.testing.assert_allclose(mine["worth"], effects, atol=1e-12)
    # with as many draws as there are entries, random others are all the others
    for place, row in enumerate(mine.itertuples()):
        others = np.delete(effects, place)[np.delete(copies, place) == copies[place]]
        if len(others) == 0:
            assert np.isnan(row.worth_random)
            continue
        expected = [others.mean(), *np.quantile(others, [0.05, 0.95])]
        np.testing.assert_allclose(
            [row.worth_random, row.worth_random_low, row.worth_random_high], expected, atol=1e-12
        )


def test_worth_of_several_cutoffs_is_their_mean(small: World) -> None:
    last = int(small.panel.lengths[0])
    cuts = [np.array([last - 30, last - 25]), np.zeros(0, int), np.zeros(0, int)]
    table = small.table()
    rows = table.index[(table["unique_id"] == "a") & (table["status"] == "kept")]
    arguments = {"steps": 5, "policies": small.policy, "seed": 1, "rows": list(rows)}

    def worth(cutoffs: list[np.ndarray]) -> pd.Series:
        return add_worth(table, small.network, small.store, small.panel, cutoffs=cutoffs, **arguments)["worth"]

    both = worth(cuts)
    each = pd.concat([worth([cuts[0][k : k + 1], cuts[1], cuts[2]]) for k in (0, 1)], axis=1)
    np.testing.assert_allclose(both, each.mean(axis=1), atol=1e-12)
    assert both.notna().sum() > 3


def test_a_number_of_rows_means_the_largest_margins_of_each_item(small: World) -> None:
    table = small.table()
    cutoffs = [np.array([length]) for length in small.panel.lengths]
    arguments = {"cutoffs": cutoffs, "steps": 5, "policies": small.policy, "seed": 1}
    done = add_worth(table, small.network, small.store, small.panel, rows=3, **arguments)
    assert done.groupby("unique_id")["worth"].count().tolist() == [3, 3, 3]
    kept = table[table["status"] == "kept"]
    margin = (kept["score"] - kept["threshold"]).groupby(kept["unique_id"])
    chosen = done["worth"].notna()
    assert (margin.nlargest(3).droplevel(0).index.sort_values() == done.index[chosen]).all()
    again = add_worth(table, small.network, small.store, small.panel, rows=3, **arguments)
    pd.testing.assert_frame_equal(done, again)
    # the table that was given is as it was
    assert "worth" not in table


# --- overlap with labels


def marks(kept: list[int], n: int = 100) -> pd.DataFrame:
    start = pd.date_range("2024-01-01", periods=n, freq="4h")
    status = np.where(np.isin(np.arange(n), kept), "kept", "below")
    return pd.DataFrame(
        {"unique_id": "a", "channel": "y", "ds_start": start, "ds_end": start + pd.Timedelta(hours=3),
         "n_steps": 4, "status": status}
    )  # fmt: skip


def window(first: int, last: int) -> pd.DataFrame:
    start = pd.Timestamp("2024-01-01")
    hours = [pd.Timedelta(hours=4 * first), pd.Timedelta(hours=4 * last + 3)]
    return pd.DataFrame({"unique_id": ["a"], "start": [start + hours[0]], "end": [start + hours[1]]})


def test_overlap_by_hand() -> None:
    table = marks([10, 11, 12, 50])
    found = overlap(table, window(10, 14), seed=0, draws=4000)
    assert found.kept_steps == 16
    assert found.precision == pytest.approx(3 / 4)
    assert found.recall == pytest.approx(3 / 5)
    # every shift is as likely, so chance is the share of time inside the window
    assert found.chance == pytest.approx(0.05, abs=0.01)
    assert found.score == pytest.approx((0.75 - found.chance) / (1 - found.chance))
    assert found.score > found.score_high


def test_overlap_counts_the_steps_of_a_patch_that_lie_inside() -> None:
    half = window(10, 14).assign(start=lambda w: w["start"] + pd.Timedelta(hours=2))
    found = overlap(marks([10, 11]), half, seed=0)
    assert found.precision == pytest.approx(6 / 8)
    assert found.recall == pytest.approx(6 / 18)


def test_overlap_of_random_marks_is_chance_and_of_none_is_unknown() -> None:
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(40):
        found = overlap(marks(rng.choice(100, 20, replace=False).tolist()), window(30, 60), seed=1, draws=200)
        outside += not found.score_low <= found.score <= found.score_high
    assert outside <= 12
    nothing = overlap(marks([]), window(30, 60), seed=1)
    assert np.isnan(nothing.precision) and nothing.recall == 0 and nothing.kept_steps == 0


def test_overlap_takes_a_real_table_and_local_windows(small: World) -> None:
    tagged = frame({"a": 400, "b": 130, "c": 311}, zone="Europe/Berlin")
    tagged = tagged[tagged["event"] == 1]
    windows = pd.DataFrame({"unique_id": tagged["unique_id"], "start": tagged["ds"], "end": tagged["ds"]})
    statuses = ("kept", "pending", "quota_full", "evicted")
    found = overlap(small.table(), windows, seed=0, statuses=statuses, channels=["event"])
    assert found.recall == pytest.approx(1.0)
    assert found.score > found.score_high


# --- on a fitted model


@pytest.fixture(scope="module")
def model() -> HAMForecaster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(
            frame({"a": 400, "b": 230}, zone="Europe/Berlin"), h=12, target=["y", "z"], futr_cols=["ahead"],
            event_cols=["event"], action_cols=["action"], preset="tiny", max_steps=3, verbose=False, progress=False,
        )  # fmt: skip


def test_a_fitted_model_tells_what_its_own_memory_holds(model: HAMForecaster) -> None:
    table = model.routes()
    assert (table["status"] == "kept").any()
    assert (
        table.groupby("unique_id")["bytes"].sum().tolist()
        == model.memory_bytes().set_index("unique_id")["scratchpad"].tolist()
    )
    assert model.routes(by="channel")["tokens"].sum() == len(table)
    assert len(model.routes(refused=False)) < len(table)
    assert len(model.routes(budget_share=0.5, refused=False)) > len(model.routes(refused=False))


def test_a_fitted_model_tells_what_entries_are_worth(model: HAMForecaster) -> None:
    now = model.routes(worth=3)
    assert now.groupby("unique_id")["worth"].count().tolist() == [3, 3]
    assert set(now.loc[now["worth"].notna(), "worth_of"]) == {"median change"}
    then = model.routes(worth=True, at="2024-04-05 17:00")
    assert set(then.loc[then["worth"].notna(), "worth_of"]) == {"quantile loss"}
    with pytest.raises(DataError, match="single entries"):
        model.routes(worth=True, by="channel")


def test_a_loaded_model_asks_for_rows_and_gives_the_same_table(model: HAMForecaster, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    with pytest.raises(DataError, match="Pass df"):
        loaded.routes()
    df = frame({"a": 400, "b": 230}, zone="Europe/Berlin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        pd.testing.assert_frame_equal(loaded.routes(df), model.routes())
        polars = pytest.importorskip("polars")
        assert isinstance(loaded.routes(polars.from_pandas(df)), polars.DataFrame)


# --- other rules of eviction, typed tags and moving thresholds


@pytest.mark.parametrize("eviction, resolution", [
    ("lowest", "patch"), ("must_last", "patch"), ("reservoir", "patch"), ("lowest", "step"), ("fifo", "step"),
])  # fmt: skip
@pytest.mark.parametrize("typed", [False, True])
def test_the_table_and_the_live_memory_agree_under_every_rule(eviction: str, resolution: str, typed: bool) -> None:
    types = (
        TagType(name="event", quota=0.4, before_patches=1, after_patches=2), TagType(name="action", priority=3.0)
    ) if typed else ()  # fmt: skip
    lengths = {"a": 420, "b": 300}
    with pytest.warns():
        panel = to_panel(
            frame(lengths), target=["y", "z"], futr_cols=["ahead"], event_cols=["event"], action_cols=["action"]
        )
    half_life = 30.0 if typed else None
    memory = MemoryConfig(eviction=eviction, tag_types=types, threshold="block", tag_half_life_patches=half_life)
    caps = (14, 9) if resolution == "patch" else (14 * P, 9 * P)
    made = world(panel, router="learned+error+tags", caps=caps, memory=memory, resolution=resolution)
    table = made.table()
    kept = table[table["status"] == "kept"]
    live = made.rollout.memory
    assert live is not None
    for item, name in enumerate(lengths):
        for layer, part in enumerate(live.layers):
            pad = part.scratchpad
            there = pad.alive[item]
            held = {
                (panel.schema.channels[c].name, p)
                for c, p in zip(pad.channel[item][there].tolist(), pad.position[item][there].tolist(), strict=True)
            }
            rows = kept[(kept["unique_id"] == name) & kept["layers"].str.split(",").map(set).ge({str(layer)})]
            lead = int(made.store.lead[item])
            start = pd.Timestamp(panel.starts[item])
            step = (rows["ds_end"] - start) // pd.Timedelta(hours=1)
            assert held == set(zip(rows["channel"], ((lead + step) // P).astype(float), strict=True))
    assert set(table["status"]) >= {"kept", "evicted", "quota_full", "below"}
    stored = sum(int(part.scratchpad.alive.sum()) * part.scratchpad.bytes_per_entry() for part in live.layers)
    assert table["bytes"].sum() == stored
