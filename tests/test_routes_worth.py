"""What kept rows are worth, how they overlap labels, and the same of a fitted model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from routed import P, World, frame, three_items, without, world

from hamts.config import MemoryConfig, TagType
from hamts.data.frame import to_panel
from hamts.data.panel import Panel
from hamts.errors import DataError, DataWarning
from hamts.forecaster import HAMForecaster, fit, load
from hamts.nn.head import pinball
from hamts.nn.tokens import Policy
from hamts.reader import StreamMemory
from hamts.rollout import forecast_from
from hamts.routes import add_worth, overlap, routes_table


@pytest.fixture(scope="module")
def panel() -> Panel:
    return three_items()


@pytest.fixture(scope="module")
def small(panel: Panel) -> World:
    """Caps that are full long before the end."""
    return world(panel, caps=(9, 6))


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
