"""Controls on the same weights: counted chance, lots, schedules, the newest, the truth, and another router's choice.

I items · L layers · T patches · C channels
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from laws import CAPS, assert_same_memory, assert_same_run, run
from model_frames import quick, sine_frame
from networks import CHANNELS, make_config, make_network, make_panel, make_store, policy_for, take_items

import hamts
from hamts.controls import control_policies
from hamts.errors import DataError
from hamts.evaluation import backtest, choose_windows, layer_usage
from hamts.nn.controls import Control, counted_uniform
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork
from hamts.remembered import memory_parts, read_panel

LENGTHS = (260, 200, 150)


@pytest.fixture(scope="module")
def setting() -> dict[str, Any]:
    network, panel = make_network(make_config(router="surprise+tags")), make_panel(LENGTHS, seed=7)
    windows = choose_windows(panel, 7, n_windows=3, step_size=None, cutoffs=None)
    policies = [network.policy(torch.tensor([0.2], dtype=torch.float64))] * 2
    model = backtest(network, panel, windows, policies, time_unit=1.0, keep_traces=True)
    return {"network": network, "panel": panel, "windows": windows, "model": model.rollout}


def policies_of(setting: dict[str, Any], memory: str, **options: Any) -> list[Policy]:
    given = {"share": 0.2, "time_unit": 1.0, "seed": 0, **options}
    return control_policies(
        setting["network"], setting["panel"], setting["windows"], memory, model=setting["model"], **given
    )


def usage_of(setting: dict[str, Any], memory: str, **options: Any) -> tuple[np.ndarray, Any]:
    network, panel, windows = (setting[name] for name in ("network", "panel", "windows"))
    done = backtest(
        network, panel, windows, policies_of(setting, memory, **options), time_unit=1.0, keep_traces=True
    ).rollout
    return layer_usage(network, done, panel.n_items), done


# ---- chance that is counted


def test_counted_chance_is_even_and_depends_on_its_coordinates_alone() -> None:
    key, position = torch.arange(40), torch.arange(500, dtype=torch.float64).expand(40, 500)
    chance = counted_uniform(3, 1, key, position, 5)
    assert chance.shape == (40, 500, 5) and chance.min() >= 0 and chance.max() < 1
    counts = torch.histc(chance, 20, 0, 1)
    assert (counts - 5000).abs().max() < 5 * 5000**0.5
    flat = (chance - 0.5).flatten(1)
    # neighbours in every direction know nothing of one another: five deviations
    for one, other in (
        (chance[1:], chance[:-1]), (chance[:, 1:], chance[:, :-1]), (chance[..., 1:], chance[..., :-1]),
        (chance, counted_uniform(4, 1, key, position, 5)), (chance, counted_uniform(3, 2, key, position, 5)),
    ):  # fmt: skip
        assert abs(float(((one - 0.5) * (other - 0.5)).mean()) * 12) < 5 / one.numel() ** 0.5
    assert flat.std() == pytest.approx(12**-0.5, rel=0.01)
    part = counted_uniform(3, 1, key[[7]], position[[7], 100:103], 5)
    assert torch.equal(part[0], chance[7, 100:103])
    single = counted_uniform(3, 1, key[[7]], position[[7], 100:103], torch.tensor([[4, 0, 2]]))
    assert torch.equal(single[0], chance[7, [100, 101, 102], [4, 0, 2]])


# ---- the laws hold for controls too


def control(kind: str, items: int, **changes: Any) -> Policy:
    network = make_network(make_config(router="surprise+tags"))
    given = {"phase": 0.4} if kind == "stride" else {}
    return policy_for(
        network, items, use_tags=False, control=Control(kind, torch.arange(items) + 5, **given), **CAPS, **changes
    )


@pytest.mark.parametrize("kind", ["random", "stride", "recency"])
def test_a_control_is_the_same_in_any_chunks_and_alone(kind: str) -> None:
    network, panel = make_network(make_config(router="surprise+tags")), make_panel(seed=7)
    store, policy = make_store(panel), control(kind, 3)
    wanted = run(network, store, policy)
    assert wanted.kept > 0
    for size in (1, 5):
        assert_same_run(run(network, store, policy, chunk_patches=size), wanted, 1e-10)
    one = control(kind, 1)
    assert one.control is not None
    one = replace(one, control=replace(one.control, key=torch.tensor([7])))
    alone = run(network, make_store(take_items(panel, [2])), one, cutoffs=[np.array([], dtype=int)])
    assert alone.memory is not None and wanted.memory is not None
    assert_same_memory(wanted.memory.select(torch.tensor([2])), alone.memory, 1e-10)


@pytest.mark.parametrize("share", [0.13, 0.25, 0.5])
@pytest.mark.parametrize("phase", [0.0, 1.0, 2.5])
def test_a_schedule_is_even_and_moves_with_its_phase(share: float, phase: float) -> None:
    position = torch.arange(1000, dtype=torch.float64)[None]
    kept, _ = Control("stride", torch.zeros(1).long(), phase=phase).decide(position, 2, torch.tensor([share]))
    assert torch.equal(kept[..., 0], kept[..., 1])
    at = kept[0, :, 0].nonzero()[:, 0]
    assert abs(len(at) - 1000 * share) <= 1
    gaps = at.diff()
    assert int(gaps.max()) - int(gaps.min()) <= 1
    first, _ = Control("stride", torch.zeros(1).long(), phase=0.0).decide(position + phase, 2, torch.tensor([share]))
    assert torch.equal(first, kept)


# ---- what each control keeps


def test_chance_lots_and_schedules_keep_as_much_as_the_model(setting: dict[str, Any]) -> None:
    wanted = layer_usage(setting["network"], setting["model"], 3)
    shuffled, _ = usage_of(setting, "shuffled")
    assert np.allclose(shuffled, wanted, atol=1e-6)
    for memory, within in (("random", 0.06), ("stride", 0.03)):
        got, _ = usage_of(setting, memory)
        assert np.abs(got - wanted).max() < within and np.abs(got - wanted).mean() < within / 2


def test_a_lot_says_nothing_of_the_scores_and_another_seed_draws_another(setting: dict[str, Any]) -> None:
    kept = {}
    for name, memory, seed in (("one", "shuffled", 0), ("again", "shuffled", 0), ("other", "shuffled", 1)):
        _, done = usage_of(setting, memory, seed=seed)
        kept[name] = torch.cat([chunk.layers[0].routed.flatten() for chunk in done.traces])
    model = torch.cat([chunk.layers[0].routed.flatten() for chunk in setting["model"].traces])
    assert torch.equal(kept["one"], kept["again"])
    for other in (kept["other"], model):
        both, expected = (kept["one"] & other).sum(), kept["one"].double().mean() * other.double().mean() * len(other)
        # tokens that cannot be kept make any two choices overlap a little more than chance
        assert float(both) < 2.2 * float(expected)


def test_recency_holds_the_newest_and_as_many_as_the_model(setting: dict[str, Any]) -> None:
    _, done = usage_of(setting, "recency")
    assert done.memory is not None and setting["model"].memory is not None
    for mine, model in zip(done.memory.layers, setting["model"].memory.layers, strict=True):
        held = mine.scratchpad.alive.sum(1)
        assert torch.equal(held, model.scratchpad.alive.sum(1))
        for item in range(3):
            ages = mine.scratchpad.position[item][mine.scratchpad.alive[item]]
            assert ages.max() - ages.min() <= 2 * float(held[item]) / (len(CHANNELS) - 4) + 4


def test_an_oracle_keeps_the_patches_of_its_steps(setting: dict[str, Any]) -> None:
    panel = setting["panel"]
    rows = pd.DataFrame({
        "unique_id": ["item 0", "item 0", "item 2", "nobody"],
        "ds": [panel.starts[0] + np.timedelta64(h, "h") for h in (31, 92)]
        + [panel.starts[2] + np.timedelta64(50, "h"), panel.starts[0]],
        "channel": ["load", "price", "load", "load"],
    })  # fmt: skip
    _, done = usage_of(setting, "oracle", oracle=rows)
    store = make_store(panel)
    lead = store.lead.tolist()
    wanted = {(0, (lead[0] + 31) // 3, 0), (0, (lead[0] + 92) // 3, 1), (2, (lead[2] + 50) // 3, 0)}
    for layer in range(2):
        found = set()
        for chunk in done.traces:
            for b, c, n in chunk.layers[layer].routed.nonzero().tolist():
                found.add((int(chunk.items[b]), int(chunk.first_patch[b]) + n, c))
        # steps of which too little was observed cannot be kept
        assert found <= wanted and len(found) >= 2
    with pytest.raises(DataError, match="names channels that are not there"):
        policies_of(setting, "oracle", oracle=rows.assign(channel="sun"))
    with pytest.raises(DataError, match="needs to be told which steps matter"):
        policies_of(setting, "oracle")


def test_a_graft_of_the_same_router_chooses_as_the_model_does(setting: dict[str, Any]) -> None:
    _, done = usage_of(setting, "graft", graft=setting["network"])
    mine = torch.cat([chunk.layers[0].routed.flatten() for chunk in done.traces])
    model = torch.cat([chunk.layers[0].routed.flatten() for chunk in setting["model"].traces])
    # tagged tokens of event channels are no choice of a score
    event = torch.tensor([c.role == "event" for c in CHANNELS])[:, None]
    able = torch.cat([((c.heard >= 0.5) & ~event).flatten() for c in setting["model"].traces])
    assert torch.equal(mine[able], model[able])


def test_a_graft_by_name_needs_no_weights_of_its_own(setting: dict[str, Any]) -> None:
    _, done = usage_of(setting, "graft", graft="error")
    mine = torch.cat([chunk.layers[1].routed.flatten() for chunk in done.traces])
    model = torch.cat([chunk.layers[1].routed.flatten() for chunk in setting["model"].traces])
    assert mine.any() and not torch.equal(mine, model)
    with pytest.raises(DataError, match=r"Router 'learned' needs weights that were not trained here: \['learned'\]"):
        policies_of(setting, "graft", graft="learned")
    with pytest.raises(DataError, match="Unknown router 'suprise'. Available"):
        policies_of(setting, "graft", graft="suprise")
    with pytest.raises(DataError, match="needs a router to serve with"):
        policies_of(setting, "graft")


def test_a_control_leaves_the_horizon_to_the_model(setting: dict[str, Any]) -> None:
    """What was listed beyond a cutoff was decided by someone who saw it."""
    network: HAMNetwork = setting["network"]
    store = make_store(setting["panel"])
    policies = policies_of(setting, "shuffled")
    everything = [replace(p, control=replace(p.control, keep=torch.ones_like(p.control.keep))) for p in policies]
    cutoffs = [np.array([n - 20]) for n in LENGTHS]
    ends = np.array([n - 20 for n in LENGTHS])
    kept = run(network, store, policies[0], cutoffs=cutoffs, ends=ends)
    from hamts.rollout import forecast_from

    assert kept.memory is not None
    one, _ = forecast_from(network, store, torch.arange(3), torch.from_numpy(ends), kept.memory, 7, policies)
    two, _ = forecast_from(network, store, torch.arange(3), torch.from_numpy(ends), kept.memory, 7, everything)
    assert torch.equal(one, two)


# ---- through the forecaster


@pytest.fixture(scope="module")
def fitted() -> hamts.HAMForecaster:
    frame = sine_frame(items=3, steps=260)
    places = pd.DataFrame({"unique_id": frame["unique_id"].unique(), "service": ["north", "south", "north"]})
    return quick(frame, 6, patch_steps=6, static_df=places, routing={"allocation": "normalised"})


def test_every_control_has_its_row(fitted: hamts.HAMForecaster) -> None:
    frame = sine_frame(items=3, steps=300, seed=1)
    places = pd.DataFrame({"unique_id": frame["unique_id"].unique(), "service": ["north", "south", "north"]})
    truth = frame[["unique_id", "ds"]].iloc[::40]
    against = ["random_memory", "shuffled_memory", "stride_memory", "recency_memory", "oracle_memory", "grafted_memory"]
    scores = fitted.evaluate(
        frame, n_windows=2, against=against, static_df=places, oracle=truth, graft="surprise", by="group",
        group_col="service",
    )  # fmt: skip
    methods = set(scores["method"])
    assert {name for name in against if name != "stride_memory"} | {"HAM", "stride_memory@0"} <= methods
    assert set(scores["group"]) == {"north", "south"}
    for _, rows in scores.groupby("method"):
        assert rows["worst"].sum() == 1 and rows.loc[rows["worst"], "MASE"].item() == rows["MASE"].max()
    assert np.isfinite(scores[["MASE", "WQL"]]).all().all()
    bytes_of = scores.groupby("method")["bytes"].first()
    assert bytes_of["recency_memory"] == pytest.approx(bytes_of["HAM"], rel=0.02)
    assert fitted.plan.model.allocation == "normalised"


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("router", ["surprise", "surprise+tags"])
def test_no_control_holds_more_than_the_model(share: float, router: str) -> None:
    network, panel = make_network(make_config(router=router)), make_panel(LENGTHS, seed=7)
    network.memory_config = replace(network.memory_config, budget_bytes=60 * network.entry_bytes())
    windows = choose_windows(panel, 7, n_windows=3, step_size=None, cutoffs=None)
    served = [network.policy(torch.tensor([share], dtype=torch.float64))] * 2
    model = backtest(network, panel, windows, served, time_unit=1.0, keep_traces=True)
    held = memory_parts(model.memory)["scratchpad"]
    setting = {"network": network, "panel": panel, "windows": windows, "model": model.rollout}
    for memory in ("random", "shuffled", "stride", "recency"):
        policies = policies_of(setting, memory, share=share)
        own = memory_parts(backtest(network, panel, windows, policies, time_unit=1.0).memory)["scratchpad"]
        assert (own <= held).all(), memory
        # where the room is short, it is used
        if share >= 0.5:
            np.testing.assert_allclose(own, held, rtol=0.1, err_msg=memory)


def test_groups_and_fields_of_routing_are_told_where_they_are_wrong(fitted: hamts.HAMForecaster) -> None:
    frame = sine_frame(items=3, steps=300, seed=1)
    places = pd.DataFrame({"unique_id": frame["unique_id"].unique(), "service": ["north", "south", "north"]})
    for options, text in (
        ({"by": "group"}, r"by='group' and group_col= go together"),
        ({"by": "group", "group_col": "node"}, r"Available: \['service'\]. Got 'node'"),
    ):
        with pytest.raises(DataError, match=text):
            fitted.evaluate(frame, static_df=places, against=["no_memory"], **options)
    with pytest.raises(DataError, match="Unknown field 'evict' of routing. Available: .*'eviction'"):
        quick(frame, 6, routing={"evict": "fifo"})
    with pytest.raises(DataError, match=r"Unknown tag type 'fire'. Available: \[\]"):
        quick(frame, 6, routing={"tag_types": [{"name": "fire"}]})
    with pytest.raises(DataError, match="budget_bytes must be 0 or at least"):
        quick(frame, 6, budget_bytes=100)
    with pytest.raises(DataError, match="budget_flops must be at least"):
        quick(frame, 6, routing={"budget_flops": 10.0})


def test_a_saved_model_keeps_how_it_routes(tmp_path: Any) -> None:
    frame = sine_frame(items=2, steps=260)
    model = quick(
        frame, 6, patch_steps=6, router="mix+uncertainty", budget_share=0.3,
        routing={
            "eviction": "reservoir", "threshold": "block", "auxiliary_target": "gain", "write_clip": 3.0,
            "allocation": "learned", "decision": "step", "budget_flops": 1.5e5,
        },
    )  # fmt: skip
    wanted = model.predict().df
    model.save(tmp_path / "model")
    again = hamts.load(tmp_path / "model")
    assert again.plan == model.plan
    assert again.plan.memory.eviction == "reservoir" and again.plan.memory.budget_bytes < 512 * 2**10
    got = again.predict().df
    pd.testing.assert_frame_equal(got, wanted)
    state = again._fitted.remembered.memory.layers[0].carried
    assert state.threshold is not None and state.write_scale is not None and state.expected is not None


def test_usage_is_told_by_layer_channel_item_and_group(fitted: hamts.HAMForecaster) -> None:
    frame = sine_frame(items=3, steps=300, seed=1)
    places = pd.DataFrame({"unique_id": frame["unique_id"].unique(), "service": ["north", "south", "north"]})
    made = {by: fitted.usage(frame, by=by, static_df=places) for by in ("layer", "channel", "item")}
    made["group"] = fitted.usage(frame, by="group", group_col="service", static_df=places)
    assert made["layer"]["layer"].tolist() == [0] and made["item"]["item"].tolist() == ["i0", "i1", "i2"]
    assert made["group"]["group"].tolist() == ["north", "south"]
    network, panel = fitted._fitted.network, fitted._panel_of(frame, places, None)
    remembered, rollout = read_panel(network, panel, network.policy(torch.tensor([0.1])), share=0.1, time_unit=1.0)
    pad = remembered.memory.layers[0].scratchpad
    for table in made.values():
        assert table["worst"].sum() == 1 and (table["asked_share"] == 0.1).all()
        assert (table["burst_share"] >= table["usage_share"] - 1e-9).all()
    assert made["layer"]["usage_share"][0] == pytest.approx(rollout.usage_share)
    # items are as long as one another
    assert made["item"]["usage_share"].mean() == pytest.approx(rollout.usage_share)
    held = pad.alive.sum(1).numpy() * pad.bytes_per_entry()
    assert made["item"]["bytes"].tolist() == held.tolist()
    assert made["layer"]["bytes"][0] == pytest.approx(held.mean())
    with pytest.raises(DataError, match="Unknown by='day'"):
        fitted.usage(frame, by="day", static_df=places)
